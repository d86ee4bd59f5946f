"""The question table: every question with its tokens, as the questions stage writes it and all others read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from roma_ray.engine.stored_prompts import PROMPT_COLUMNS, Prompts
from roma_ray.questions.prompts import Prompt
from roma_ray.store.tables import WRITING as WRITING
from roma_ray.store.tables import iterate_table as iterate_table
from roma_ray.store.tables import matrix as matrix
from roma_ray.store.tables import read_rows as read_rows
from roma_ray.store.tables import read_table as read_table
from roma_ray.store.tables import table_facts as table_facts
from roma_ray.store.tables import write_table as write_table

TABLE = "questions.parquet"
_ROWS_AT_ONCE = 8192
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


def read_prompts(path: str | Path, *, held_out: Sequence[str] = ()) -> Prompts:
    """The encoded prompts of a question table, decoded when they are asked for; parts as with tasks `held_out`."""
    return Prompts(iterate_table(path, PROMPT_COLUMNS), held_out)


def iterate_rows(path: str | Path, columns: Sequence[str], mask_N: np.ndarray) -> Iterator[tuple[Any, ...]]:
    """What the rows of a mask have in some columns of a question table, row by row. Raises ArtifactError."""
    start = 0
    for part in iterate_table(path, columns, _ROWS_AT_ONCE):
        some = part.filter(pa.array(mask_N[start : start + len(part)]))
        yield from zip(*(some.column(name).to_pylist() for name in columns), strict=True)
        start += len(part)


def read_some_prompts(path: str | Path, rows: Sequence[int]) -> list[Prompt]:
    """The encoded prompts of some rows of a question table, in the order asked for."""
    return list(Prompts([read_rows(path, PROMPT_COLUMNS, rows)]))
