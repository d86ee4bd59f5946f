"""Parquet tables with plain typed columns; two-dimensional values are flat lists, their shape in the file's metadata."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from roma_ray.errors import ArtifactError, StorageError
from roma_ray.store.files import local, locals_of, write_atomically
from roma_ray.store.scratch import HELD_BYTES, ScratchTable

WRITING: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
"""How tables are written: a damaged page is then seen when it is read, also where no manifest speaks for the file yet."""

_ROWS_AT_ONCE = 8192

PART_ROWS = 65_536
"""Rows of a part: what is held at once where a table is gone through, and a row group of those that are written in parts."""


def write_table(
    path: str | Path, columns: Mapping[str, Any], schema: pa.Schema, facts: Mapping[str, Any] | None = None
) -> None:
    """Write columns as one Parquet file, atomically; `facts` go into its metadata as JSON under `roma`."""
    table = pa.table([pa.array(columns[name], schema.field(name).type) for name in schema.names], schema=schema)
    if facts is not None:
        table = table.replace_schema_metadata({"roma": json.dumps(dict(facts))})
    write_atomically(path, lambda aside: pq.write_table(table, aside, **WRITING))


def write_parts(path: str | Path, schema: pa.Schema, parts: Iterable[pa.Table]) -> None:
    """Write tables of one schema, one after another, as one Parquet file, atomically. Raises StorageError."""

    def write(aside: Path) -> None:
        with pq.ParquetWriter(aside, schema, **WRITING) as writer:
            for part in parts:
                writer.write_table(part)

    write_atomically(path, write)


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file. Raises ArtifactError when it is missing, corrupted or lacks a column."""
    with _readable(path):
        names = list(columns) if columns is not None else None
        table = pq.read_table(local(path), columns=names, partitioning=None, page_checksum_verification=True)
    _check_columns(path, columns or (), table.column_names)
    return table


def iterate_table(path: str | Path, columns: Sequence[str], rows: int = PART_ROWS) -> Iterator[pa.Table]:
    """The columns of a Parquet file, at most so many rows at a time. Raises as `read_table`."""
    with _opened(path, columns) as file:
        for batch in file.iter_batches(batch_size=rows, columns=list(columns)):
            yield pa.Table.from_batches([batch])
        if not file.metadata.num_rows:
            yield file.schema_arrow.empty_table().select(list(columns))


def read_rows(path: str | Path, columns: Sequence[str], rows: Sequence[int]) -> pa.Table:
    """Some rows of a Parquet file, in the order asked for; only the row groups that hold them are read. Raises as `read_table`."""
    wanted = np.asarray(rows, dtype=np.int64)
    with _opened(path, columns) as file:
        sizes = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < starts[-1]:
            raise ArtifactError(
                f"{path} has {starts[-1]} rows and not all that were asked for; it is of other questions"
            )
        groups = np.searchsorted(starts, wanted, side="right") - 1
        parts, places = [file.schema_arrow.empty_table().select(list(columns))], [np.empty(0, dtype=np.int64)]
        for group in np.unique(groups).tolist():
            mine = np.flatnonzero(groups == group)
            part = file.read_row_group(group, columns=list(columns))
            parts.append(part.take(pa.array(wanted[mine] - starts[group])).select(list(columns)))
            places.append(mine)
    # The metadata of an empty table are the file's, and of a part as well.
    return pa.concat_tables(parts).take(pa.array(np.argsort(np.concatenate(places))))


class Holder:
    """Tables of one schema, added one by one: in memory, or of more than `HELD_BYTES` in this machine's scratch, mapped.

    Pages of a mapped file are not the process's own: the system takes them back when it needs them.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self._held: list[pa.Table] = []
        self._bytes = 0
        self._scratch: ScratchTable | None = None

    def add(self, part: pa.Table) -> None:
        """Put rows behind the others. Raises StorageError."""
        self._bytes += part.nbytes
        if self._scratch is None and self._bytes > HELD_BYTES:
            self._scratch = ScratchTable(self.schema)
            for table in self._held:
                self._scratch.append(table)
            self._held = []
        if self._scratch is None:
            self._held.append(part)
        else:
            self._scratch.append(part)

    def table(self) -> pa.Table:
        """All rows; no more can be added. Raises StorageError."""
        if self._scratch is not None:
            return self._scratch.finish(mapped=True).read_all()
        return pa.concat_tables([self.schema.empty_table(), *self._held])

    def parts(self) -> Callable[[], Iterator[pa.Table]]:
        """What goes through all rows, as often as it is called, a part at a time; no more can be added. Raises StorageError."""
        if self._scratch is None:
            held = self._held
            return lambda: iter(held)
        reader = self._scratch.finish(mapped=False)
        return lambda: (pa.Table.from_batches([reader.get_batch(n)]) for n in range(reader.num_record_batches))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what nobody read."""
        if self._scratch is not None:
            self._scratch.close()


def hold(parts: Iterable[pa.Table]) -> pa.Table:
    """Tables of one schema, at least one, as one that a `Holder` holds. Raises StorageError."""
    stream = iter(parts)
    first = next(stream)
    with Holder(first.schema) as holder:
        holder.add(first)
        for part in stream:
            holder.add(part)
        return holder.table()


def in_parts(table: pa.Table) -> Iterator[pa.Table]:
    """A table as parts of at most `PART_ROWS` rows, each in one piece."""
    for start in range(0, max(1, len(table)), PART_ROWS):
        yield table.slice(start, PART_ROWS).combine_chunks()


def in_groups(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The rows of tables of one schema, so many at a time and the last of what is left, each in one piece."""
    held: list[pa.Table] = []
    size = 0
    for table in tables:
        held.append(table)
        size += len(table)
        while size >= rows:
            whole = pa.concat_tables(held)
            yield whole.slice(0, rows).combine_chunks()
            held, size = [whole.slice(rows)], size - rows
    if size:
        yield pa.concat_tables(held).combine_chunks()


@contextlib.contextmanager
def _opened(path: str | Path, columns: Sequence[str]) -> Iterator[pq.ParquetFile]:
    with _readable(path), pq.ParquetFile(local(path), pre_buffer=False, page_checksum_verification=True) as file:
        _check_columns(path, columns, file.schema_arrow.names)
        yield file


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """What reading a missing or damaged file raises, as an ArtifactError with the remedy."""
    try:
        yield
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; remove its folder and run again to recompute it") from None
    except StorageError:
        raise  # of this machine's scratch: the file may be well
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        # Arrow decodes the names in a damaged file's schema itself.
        raise ArtifactError(
            f"{path} cannot be read ({error}); remove its folder and run again to recompute it"
        ) from None


def _check_columns(path: str | Path, wanted: Sequence[str], there: Sequence[str]) -> None:
    missing = set(wanted) - set(there)
    if missing:
        raise ArtifactError(
            f"{path} lacks the column(s) {', '.join(sorted(missing))}; it was written by another version"
        )


def read_tables(paths: Sequence[Path], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Read Parquet files one after another. Raises as `read_table`."""
    places = locals_of(paths)
    for path in paths:
        try:
            yield read_table(next(places), columns)
        except FileNotFoundError:
            raise ArtifactError(f"{path} is missing; remove its folder and run again to recompute it") from None


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
