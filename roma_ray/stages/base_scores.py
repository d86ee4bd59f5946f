"""The base model's scores on test and validation questions, from the head: once for every tuned model that starts from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

VERSION = 2
SCORES = "scores.parquet"
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


def base_scores(stage: Stage, rows: Sequence[int], score: Callable[[], Scores]) -> Scores:
    """The scores of `rows` as `score` gives them, kept for the next time. Raises what `score` raises, ArtifactError."""

    def keep() -> Facts:
        scores = score()
        _write(stage, scores)
        return {"rows": len(scores.rows)}

    try:
        return _read(make(stage, keep), rows)
    except BusyError:
        # Another trial is computing the same scores. Waiting would take as long, and longer if it dies.
        return score()


def _write(stage: Stage, scores: Scores) -> None:
    columns = {
        "row": scores.rows,
        "scores": scores.scores,
        "prediction": scores.predictions,
        "correct": scores.correct.tolist(),
        "routing": list(scores.routing_NLE.reshape(len(scores.rows), -1)),
    }
    facts = {"layers": scores.routing_NLE.shape[1], "experts": scores.routing_NLE.shape[2]}
    write_table(stage.path / SCORES, columns, _SCHEMA, facts)


def _read(stage: Stage, rows: Sequence[int]) -> Scores:
    table = read_table(stage.path / SCORES, _SCHEMA.names)
    facts = table_facts(table)
    found: list[int] = table.column("row").to_pylist()
    assert found == list(rows), "the rows are a function of the extraction, which is part of the stage's identity"
    routing = matrix(table, "routing", facts["layers"] * facts["experts"])
    return Scores(
        found,
        table.column("scores").to_pylist(),
        table.column("prediction").to_pylist(),
        np.array(table.column("correct").to_pylist(), dtype=bool),
        routing.reshape(len(found), facts["layers"], facts["experts"]).copy(),
    )
