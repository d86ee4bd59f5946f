"""Log-likelihoods from a whole stock model on padded batches: for models that roma-ray does not slice, dense ones above all.

B sequences, S longest sequence, P read positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from roma_ray.benchmarks.request_tree import Path
from roma_ray.moe.slices import position_ids


@dataclass(frozen=True)
class Sheet:
    """Some padded sequences and what is read from them."""

    ids_BS: Tensor
    mask_BS: Tensor
    positions_BP: Tensor
    reads: list[tuple[int, int, int]]
    """(request, sequence, first of its columns in `positions_BP`)."""


def sheet_logits(model: PreTrainedModel, sheet: Sheet) -> Tensor:
    """Logits [B, P, V] at a sheet's positions; those at padding mean nothing."""
    mask_BS = sheet.mask_BS.to(model.device)
    output = model(
        input_ids=sheet.ids_BS.to(model.device),
        attention_mask=mask_BS,
        position_ids=position_ids(mask_BS),
        use_cache=False,
        logits_to_keep=sheet.positions_BP.clamp(min=0).to(model.device),
    )
    logits_BPV: Tensor = output.logits
    return logits_BPV


def lay_out_sheets(paths: Sequence[Path], continuations: Sequence[Path], budget: int) -> list[Sheet]:
    """Padded batches of at most `budget` tokens; a path that begins another one is read from it."""
    ordered = sorted(set(paths))
    # Sorted, a path stands right before those that go on from it.
    longest: dict[Path, Path] = {}
    for number in range(len(ordered) - 1, -1, -1):
        path = ordered[number]
        after = ordered[number + 1] if number + 1 < len(ordered) else ()
        longest[path] = longest[after] if after[: len(path)] == path else path
    readers: dict[Path, list[int]] = {}
    for request, path in enumerate(paths):
        readers.setdefault(longest[path], []).append(request)
    rows = sorted(readers, key=lambda p: (-len(p), p))
    sheets, group = [], list[Path]()
    for row in rows:
        if group and len(group[0]) * (len(group) + 1) > budget:
            sheets.append(_sheet(group, readers, paths, continuations))
            group = []
        group.append(row)
    if group:
        sheets.append(_sheet(group, readers, paths, continuations))
    return sheets


def _sheet(
    rows: Sequence[Path], readers: dict[Path, list[int]], paths: Sequence[Path], continuations: Sequence[Path]
) -> Sheet:
    reads, positions = [], []
    for sequence, row in enumerate(rows):
        # Requests that end at one place (single-token choices of a question) read it once.
        wanted: dict[tuple[int, int], int] = {}
        columns: list[int] = []
        for request in readers[row]:
            stop, length = len(paths[request]), len(continuations[request])
            if (stop, length) not in wanted:
                wanted[stop, length] = len(columns)
                columns += range(stop - length, stop)
            reads.append((request, sequence, wanted[stop, length]))
        positions.append(columns)
    return Sheet(_padded(rows, 0), _padded([(1,) * len(r) for r in rows], 0), _padded(positions, -1), reads)


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    width = max(len(r) for r in rows)
    return torch.tensor([[*r, *[fill] * (width - len(r))] for r in rows], dtype=torch.long)
