"""Tables whose rows lie scattered, put in the order of their column `row` without holding them: an external sort by blocks of rows.

What is read is cut into the blocks that its rows belong to and put down in scratch; then one block after another is read
back, sorted and handed on. So a block is held, whatever the number of rows and their width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from roma_ray.errors import ArtifactError
from roma_ray.store.files import roomy
from roma_ray.store.scratch import ScratchTable

BLOCK_ROWS = 16_384
"""Rows that are handed on at once: 64 MB of routing rows at 16 layers of 64 experts."""
_CUT_BYTES = 2**26
"""What is read before it is cut: the fewer cuts, the longer the pieces."""


def in_row_order(tables: Iterable[pa.Table], rows: int, stage: Path) -> Iterator[pa.Table]:
    """The rows of all tables (of one schema, read before this returns) in order, `BLOCK_ROWS` at a time.

    Each number below `rows` is to be there once. What is put down lies in the stage's folder, or with a bucket in this
    machine's scratch, and takes as much room as all tables. Raises ArtifactError, also while it is read; StorageError.
    """
    if rows <= BLOCK_ROWS:
        return iter([_sorted(pa.concat_tables(tables), range(rows), stage)])
    pieces: list[list[int]] = [[] for _ in range(0, rows, BLOCK_ROWS)]
    scratch: ScratchTable | None = None
    try:
        count = 0
        for table in _collected(tables):
            scratch = scratch or ScratchTable(table.schema, roomy(stage))
            for block, piece in _cut(table, rows, stage):
                scratch.append(piece)
                pieces[block].append(count)
                count += 1
        assert scratch is not None, "there are tables"
        reader = scratch.finish(mapped=False)
    finally:
        if scratch is not None:
            scratch.close()
    return _blocks(reader, pieces, rows, stage)


def not_each_once(stage: Path) -> ArtifactError:
    """The error for a stage whose batches' tables are not of its questions."""
    return ArtifactError(f"{stage} does not hold each question once; remove it and run again")


def _collected(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Some tables at a time as one."""
    held: list[pa.Table] = []
    size = 0
    for table in tables:
        held.append(table)
        size += table.nbytes
        if size >= _CUT_BYTES:
            yield pa.concat_tables(held)
            held, size = [], 0
    if held:
        yield pa.concat_tables(held)


def _cut(table: pa.Table, rows: int, stage: Path) -> Iterator[tuple[int, pa.Table]]:
    """The block and the rows of it, each one record batch, of every block that a table has rows of."""
    numbers = table.column("row").to_numpy()
    if ((numbers < 0) | (numbers >= rows)).any():
        raise not_each_once(stage)
    blocks = numbers // BLOCK_ROWS
    order = np.argsort(blocks, kind="stable")
    taken = table.take(pa.array(order)).combine_chunks()
    found, starts = np.unique(blocks[order], return_index=True)
    for block, start, stop in zip(found.tolist(), starts, [*starts[1:], len(order)], strict=True):
        yield block, taken.slice(start, stop - start)


def _blocks(
    reader: pa.ipc.RecordBatchFileReader, pieces: list[list[int]], rows: int, stage: Path
) -> Iterator[pa.Table]:
    for block, mine in enumerate(pieces):
        numbers = range(block * BLOCK_ROWS, min(rows, (block + 1) * BLOCK_ROWS))
        yield _sorted(pa.Table.from_batches([reader.get_batch(n) for n in mine], reader.schema), numbers, stage)


def _sorted(table: pa.Table, numbers: range, stage: Path) -> pa.Table:
    """The rows in order. Raises ArtifactError where they are not these, each once."""
    found = table.column("row").to_numpy()
    order = np.argsort(found, kind="stable")
    if not np.array_equal(found[order], np.arange(numbers.start, numbers.stop)):
        raise not_each_once(stage)
    return table.take(pa.array(order)).combine_chunks()
