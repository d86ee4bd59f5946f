"""A method's answers to the validation and test questions, as a table: what every judge reads, whatever gave them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from roma_ray.engine.forward import predict
from roma_ray.engine.question_table import matrix, read_table, table_facts, write_table
from roma_ray.errors import ArtifactError, GuardError
from roma_ray.questions.prompts import Prompt

ANSWERS = "answers.parquet"
_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("answer", pa.int32()),
        ("prediction", pa.int32()),
        ("correct", pa.bool_()),
        ("scores", pa.list_(pa.float32())),
        ("aim", pa.int32()),
        ("routing", pa.list_(pa.float32())),
    ]
)
_FOUND = pa.schema(
    [
        ("row", pa.int64()),
        ("scores", pa.list_(pa.float64())),
        ("aim", pa.int32()),
        ("routing", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class Answers:
    """Log-likelihoods of every choice of some questions, in the order of `rows`, natural logarithm."""

    rows: list[int]
    scores: list[list[float]]
    aims: list[int] | None = None
    """The choice that each question's routing was optimized towards, where that is what a method does."""
    routing_NLE: np.ndarray | None = None
    """Routing rows r at the last prompt token that the method answered with, where it chooses them itself, fp32."""

    def __post_init__(self) -> None:
        """Raises GuardError where a score is not finite: such an answer would be judged by its place in the list."""
        bad = [row for row, scores in zip(self.rows, self.scores, strict=True) if not all(map(math.isfinite, scores))]
        if bad:
            raise GuardError(
                f"{len(bad):,} of {len(self.rows):,} answers of this method are not finite, of question row {bad[0]} first"
            )

    def predictions(self, prompts: Sequence[Prompt], rule: str) -> list[int]:
        """The chosen answers; `prompts` is the whole question table."""
        return [predict(scores, prompts[row], rule) for row, scores in zip(self.rows, self.scores, strict=True)]


def write_answers(path: Path, answers: Answers, prompts: Sequence[Prompt], rule: str) -> None:
    """Judge the answers against the labels of `prompts` (the whole question table) and write them. Raises StorageError."""
    kept = [prompts[row] for row in answers.rows]
    predictions = answers.predictions(prompts, rule)
    routing = answers.routing_NLE
    columns = {
        "row": answers.rows,
        "id": [p.id for p in kept],
        "task": [p.task for p in kept],
        "split": [p.split for p in kept],
        "answer": [p.answer for p in kept],
        "prediction": predictions,
        "correct": [p.answer == chosen for p, chosen in zip(kept, predictions, strict=True)],
        "scores": answers.scores,
        "aim": [None] * len(kept) if answers.aims is None else answers.aims,
        "routing": [None] * len(kept) if routing is None else list(routing.reshape(len(kept), -1)),
    }
    shape = {} if routing is None else {"layers": routing.shape[1], "experts": routing.shape[2]}
    write_table(path, columns, _SCHEMA, shape)


def write_found(path: Path, answers: Answers, facts: Mapping[str, Any]) -> None:
    """Write answers as they are, unjudged, with facts in the table's metadata. Raises StorageError."""
    routing = answers.routing_NLE
    columns = {
        "row": answers.rows,
        "scores": answers.scores,
        "aim": [None] * len(answers.rows) if answers.aims is None else answers.aims,
        "routing": [None] * len(answers.rows) if routing is None else list(routing.reshape(len(routing), -1)),
    }
    shape = {} if routing is None else {"layers": routing.shape[1], "experts": routing.shape[2]}
    write_table(path, columns, _FOUND, {**facts, **shape})


def gathered(tables: Sequence[pa.Table], rows: Sequence[int]) -> Answers:
    """The answers of such tables, in the order of `rows`. Raises ArtifactError where they do not hold each row once."""
    whole = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
    place = {row: n for n, row in enumerate(whole.column("row").to_pylist())}
    if len(place) != len(whole) or place.keys() != set(rows):
        raise ArtifactError("a method's parts do not hold each question once; remove its folder and run again")
    facts, table = table_facts(tables[0]), whole.take(pa.array([place[row] for row in rows], pa.int64()))
    aims = table.column("aim")
    routing = None
    if "layers" in facts:
        shape = (facts["layers"], facts["experts"])
        routing = matrix(table, "routing", shape[0] * shape[1]).reshape(len(table), *shape).copy()
    return Answers(
        list(rows), table.column("scores").to_pylist(), None if aims.null_count else aims.to_pylist(), routing
    )


def read_answers(path: Path, split: str) -> pa.Table:
    """The answers to the questions of one split, in row order. Raises ArtifactError."""
    table = read_table(path, _SCHEMA.names)
    return table.filter(pa.compute.equal(table.column("split"), split)).sort_by("row")


def read_routing_of(path: Path, split: str) -> tuple[list[int], np.ndarray]:
    """Rows and routing [N, L x E] of the answers to one split. Raises ArtifactError where a method chose no routing."""
    table = read_answers(path, split)
    facts = table_facts(table)
    width = facts.get("layers", 0) * facts.get("experts", 0)
    return table.column("row").to_pylist(), matrix(table, "routing", width)
