"""The question table: every question with its tokens, as the questions stage writes it and all others read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from roma_ray.questions.held_out import parts_in_force
from roma_ray.questions.prompts import Prompt
from roma_ray.store.tables import WRITING as WRITING
from roma_ray.store.tables import matrix as matrix
from roma_ray.store.tables import read_table, rows_of
from roma_ray.store.tables import table_facts as table_facts
from roma_ray.store.tables import write_table as write_table

TABLE = "questions.parquet"
QUESTIONS = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("question", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("answer", pa.int32()),
        ("context", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("choice_ids", pa.list_(pa.list_(pa.int32()))),
        ("choice_chars", pa.list_(pa.int32())),
        ("truncated", pa.bool_()),
    ]
)

FREE_QUESTIONS = pa.schema([*QUESTIONS, ("form", pa.string()), ("verdict", pa.bool_())])
"""Of free-form questions, whose `choices` are the accepted answers."""

REJECTED = pa.schema([("file", pa.string()), ("line", pa.int64()), ("id", pa.string()), ("reason", pa.string())])


def read_prompts(path: str | Path, rows: Sequence[int] | None = None, *, held_out: Sequence[str] = ()) -> list[Prompt]:
    """The encoded prompts of a question table, all or some rows, in the order asked for; parts as with tasks `held_out`."""
    table = read_table(path, [f.name for f in QUESTIONS if f.name not in {"question", "choices", "context"}])
    if rows is not None:
        table = table.take(pa.array(rows, pa.int64()))
    prompts = list(_prompts(table))
    parts = parts_in_force([(p.task, p.split) for p in prompts], held_out)
    return [p if p.split == part else replace(p, split=part) for p, part in zip(prompts, parts, strict=True)]


def _prompts(table: pa.Table) -> Iterator[Prompt]:
    for row in rows_of(table):
        yield Prompt(
            id=row["id"],
            task=row["task"],
            split=row["split"],
            prompt_ids=tuple(row["prompt_ids"]),
            choice_ids=tuple(tuple(ids) for ids in row["choice_ids"]),
            choice_chars=tuple(row["choice_chars"]),
            answer=row["answer"],
            truncated=row["truncated"],
        )
