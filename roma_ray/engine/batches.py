"""Planned batches: lists of rows fixed by their lengths and a token budget, the same on any number of workers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from roma_ray.engine.decoded import Decoded
from roma_ray.errors import ArtifactError
from roma_ray.questions.prompts import Prompt
from roma_ray.store.tables import read_table, table_facts, write_table

_PLANNED = pa.schema([("rows", pa.list_(pa.int32()))])


class PlannedBatches(Decoded[list[int]]):
    """Planned batches: each the list of its rows. Two arrays hold them, whatever their number."""

    def __init__(self, rows: np.ndarray, starts: np.ndarray) -> None:
        """All batches' rows, one batch after another, and where each batch begins, with the end of the last: [B + 1]."""
        self.rows, self.starts = rows, starts

    @classmethod
    def of(cls, batches: Sequence[Sequence[int]]) -> PlannedBatches:
        """The same batches."""
        starts = np.cumsum([0, *map(len, batches)])
        return cls(np.array([row for batch in batches for row in batch], dtype=np.int64), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def item(self, at: int) -> list[int]:
        """The rows of a batch."""
        rows: list[int] = self.rows[self.starts[at] : self.starts[at + 1]].tolist()
        return rows

    def sums(self, values: np.ndarray) -> np.ndarray:
        """What the rows of each batch have together, [B] int64, of a number a row."""
        totals = np.concatenate([[0], np.cumsum(values[self.rows], dtype=np.int64)])
        return np.diff(totals[self.starts])


def plan_batches(tokens: Sequence[int] | np.ndarray, batch_tokens: int) -> PlannedBatches:
    """Group rows of like length into batches of at most `batch_tokens` tokens (a longer row is alone).

    tokens: what each row adds to a packing. Longest first, ties by row number, so that the batch most likely to run out
    of memory runs first and a batch's attention pads little.
    """
    counts = np.asarray(tokens, dtype=np.int64)
    order = np.lexsort((np.arange(len(counts)), -counts))
    totals = np.cumsum(counts[order])
    starts = [0]
    while starts[-1] < len(order):
        before = totals[starts[-1] - 1] if starts[-1] else 0
        stop = int(np.searchsorted(totals, before + batch_tokens, side="right"))
        starts.append(max(stop, starts[-1] + 1))
    return PlannedBatches(order, np.asarray(starts))


def write_plan(path: Path, plan: PlannedBatches, prefix: int = 0) -> None:
    """Keep planned batches, and the tokens of the prefix that all prompts share. Raises StorageError."""
    rows = pa.ListArray.from_arrays(pa.array(plan.starts, pa.int32()), pa.array(plan.rows, pa.int32()))
    write_table(path, {"rows": rows}, _PLANNED, {"prefix": prefix})


def read_plan(path: Path) -> tuple[int, PlannedBatches]:
    """Tokens of the shared prefix, and the planned batches. Raises ArtifactError for a damaged file."""
    table = read_table(path, _PLANNED.names)
    rows = table.column("rows").combine_chunks()
    if rows.type != _PLANNED.field("rows").type or rows.null_count or rows.values.null_count:
        raise ArtifactError(f"{path} is no plan of batches; remove {path.parent} and run again")
    prefix: int = table_facts(table, "prefix")["prefix"]
    return prefix, PlannedBatches(rows.values.to_numpy().astype(np.int64), rows.offsets.to_numpy())


def is_letter(prompt: Prompt) -> bool:
    """Whether every choice is one token, so that all are scored at the prompt's last position.

    True of the `letter` format always, and of a `cloze` question whose choices are single tokens.
    """
    return all(len(ids) == 1 for ids in prompt.choice_ids)


def epoch_order(rows: Sequence[int], seed: int, epoch: int) -> list[int]:
    """The sample order of an epoch: a function of (seed, epoch) over global row numbers, and of nothing else."""
    generator = np.random.default_rng((seed, epoch))
    return [int(row) for row in np.asarray(sorted(rows))[generator.permutation(len(rows))]]


def chunks(rows: Sequence[int], size: int) -> list[list[int]]:
    """Consecutive groups of at most `size` rows."""
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]
