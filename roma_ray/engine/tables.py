"""Parquet tables with plain typed columns; two-dimensional values are flat lists, their shape in the file's metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from roma_ray.artifacts import write_atomically
from roma_ray.errors import ArtifactError
from roma_ray.questions.prompts import Prompt

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

WRITING: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
"""How tables are written: a damaged page is then seen when it is read, also where no manifest speaks for the file yet."""

_ROWS_AT_ONCE = 8192

REJECTED = pa.schema([("file", pa.string()), ("line", pa.int64()), ("id", pa.string()), ("reason", pa.string())])


def write_table(
    path: str | Path, columns: Mapping[str, Any], schema: pa.Schema, facts: Mapping[str, Any] | None = None
) -> None:
    """Write columns as one Parquet file, atomically; `facts` go into its metadata as JSON under `roma`."""
    table = pa.table([pa.array(columns[name], schema.field(name).type) for name in schema.names], schema=schema)
    if facts is not None:
        table = table.replace_schema_metadata({"roma": json.dumps(dict(facts))})
    write_atomically(path, lambda aside: pq.write_table(table, aside, **WRITING))


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file. Raises ArtifactError when it is missing, corrupted or lacks a column."""
    try:
        names = list(columns) if columns is not None else None
        table = pq.read_table(path, columns=names, partitioning=None, page_checksum_verification=True)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; remove its folder and run again to recompute it") from None
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(
            f"{path} cannot be read ({error}); remove its folder and run again to recompute it"
        ) from None
    missing = set(columns or ()) - set(table.column_names)
    if missing:
        raise ArtifactError(
            f"{path} lacks the column(s) {', '.join(sorted(missing))}; it was written by another version"
        )
    return table


def table_facts(table: pa.Table, *counts: str) -> dict[str, Any]:
    """The JSON facts written with a table. Raises ArtifactError when they are damaged or lack one of the `counts`."""
    try:
        facts = json.loads((table.schema.metadata or {}).get(b"roma", b"{}"))
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict) or any(type(facts.get(name)) is not int or facts[name] < 0 for name in counts):
        raise ArtifactError("a table's own facts are damaged; remove its folder and run again to recompute it")
    return facts


def matrix(table: pa.Table, column: str, width: int) -> np.ndarray:
    """A flat list column as an array of shape (rows, width). Raises ArtifactError when the rows are not that wide."""
    chunks = table.column(column).combine_chunks()
    values = chunks.flatten().to_numpy(zero_copy_only=False)
    if len(values) != len(table) * width:
        raise ArtifactError(f"column {column} holds {len(values)} values for {len(table)} rows of {width}")
    return values.reshape(len(table), width)


def rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows one by one. All of a million questions' as dictionaries would take more memory than what is made of them."""
    for part in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
        yield from part.to_pylist()


def read_prompts(path: str | Path, rows: Sequence[int] | None = None) -> list[Prompt]:
    """The encoded prompts of a question table, all or some rows, in the order asked for."""
    table = read_table(path, [f.name for f in QUESTIONS if f.name not in {"question", "choices", "context"}])
    if rows is not None:
        table = table.take(pa.array(rows, pa.int64()))
    return list(_prompts(table))


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
