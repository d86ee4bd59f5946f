"""The base model's scores on test and validation questions, from the head: once for every tuned model that starts from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from roma_ray.engine.identity import answer_rule
from roma_ray.engine.question_table import matrix, read_table, table_facts, write_table
from roma_ray.engine.scoring import Scores
from roma_ray.engine.setup import Setup
from roma_ray.engine.steps import Facts, make
from roma_ray.errors import BusyError
from roma_ray.store.artifacts import Stage
from roma_ray.store.files import remove_folder

VERSION = 2
SCORES = "scores.parquet"
PARTS = ".parts"
"""Where answers lie, in this stage's folder and in the evaluation's, until they are gathered."""
_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("scores", pa.list_(pa.float64())),
        ("prediction", pa.int32()),
        ("correct", pa.bool_()),
        ("routing", pa.list_(pa.float32())),
    ]
)


def scoring(setup: Setup) -> dict[str, Any]:
    """How answers are scored."""
    return {
        "tokens": setup.config.routing.tokens,
        "rule": answer_rule(setup.config.questions.prompt),
        "batch_tokens": setup.config.extraction.batch_tokens,
    }


def base_stage(setup: Setup, extraction: Stage) -> Stage:
    """Where the base model's scores live."""
    numbers = {**setup.numeric_identity(), "cut": setup.cut, **scoring(setup)}
    return setup.store.stage("base", numbers, {"extract": extraction.fingerprint}, VERSION)


def base_scores(stage: Stage, rows: Sequence[int], score: Callable[[Path], Scores], elsewhere: Path) -> Scores:
    """The scores of `rows` as `score` gives them, kept for the next time. Raises what `score` raises, ArtifactError.

    `score` is told the folder for what it leaves on its way: the stage's, or `elsewhere` while another process fills that one.
    """

    def keep() -> Facts:
        scores = score(stage.path)
        write_scores(stage.path / SCORES, scores)
        remove_folder(stage.path / PARTS)
        return {"rows": len(scores.rows)}

    try:
        kept = scores_of(read_table(make(stage, keep).path / SCORES))
    except BusyError:
        # Another trial is computing the same scores. Waiting would take as long, and longer if it dies.
        return score(elsewhere)
    assert kept.rows == list(rows), "the rows are a function of the extraction, which is part of the stage's identity"
    return kept


def write_scores(path: Path, scores: Scores, **facts: Any) -> None:
    """Write scores as a table, with further facts in its metadata. Raises StorageError."""
    columns = {
        "row": scores.rows,
        "scores": scores.scores,
        "prediction": scores.predictions,
        "correct": scores.correct.tolist(),
        "routing": list(scores.routing_NLE.reshape(len(scores.rows), -1)),
    }
    shape = {"layers": scores.routing_NLE.shape[1], "experts": scores.routing_NLE.shape[2]}
    write_table(path, columns, _SCHEMA, {**shape, **facts})


def scores_of(table: pa.Table) -> Scores:
    """The scores of such a table. Raises ArtifactError."""
    facts = table_facts(table, "layers", "experts")
    routing = matrix(table, "routing", facts["layers"] * facts["experts"])
    return Scores(
        table.column("row").to_pylist(),
        table.column("scores").to_pylist(),
        table.column("prediction").to_pylist(),
        np.array(table.column("correct").to_pylist(), dtype=bool),
        routing.reshape(len(table), facts["layers"], facts["experts"]).copy(),
    )
