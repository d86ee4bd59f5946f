"""The activation cache: hidden states that enter the first tuned layer, by question row, memory-mapped.

Written by extraction as flat safetensors shards; `rows.parquet` says where each question's states lie. Training, validation
and scoring read it and never touch the trunk.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from roma_ray.engine.batches import is_letter
from roma_ray.engine.extraction import ROWS, batch_activations, kept_tokens
from roma_ray.engine.forward import Layout
from roma_ray.engine.tables import read_table
from roma_ray.errors import CacheError
from roma_ray.moe.slices import Slice
from roma_ray.questions.prompts import Prompt

_REMEDY = "remove the extraction folder and run again to rebuild it"


class ActivationCache:
    """Hidden states [tokens, D] of each question of a finished extraction."""

    def __init__(self, folder: str | Path) -> None:
        """Open the cache of an extraction stage. Raises CacheError (truncated, foreign), ArtifactError (missing rows)."""
        self.folder = Path(folder)
        table = read_table(self.folder / ROWS, ["row", "batch", "offset", "tokens"])
        self.batch: list[int] = table.column("batch").to_pylist()
        self.offset: list[int | None] = table.column("offset").to_pylist()
        self.tokens: list[int | None] = table.column("tokens").to_pylist()
        self._shards: dict[int, Any] = {}
        totals: dict[int, int] = {}
        for batch, count in zip(self.batch, self.tokens, strict=True):
            totals[batch] = totals.get(batch, 0) + (count or 0)
        self._totals = totals

    def states(self, row: int) -> Tensor:
        """The kept states of a question, [tokens, D] in the cache's type. Raises CacheError."""
        start, count = self.offset[row], self.tokens[row]
        if start is None or count is None:
            raise CacheError(f"question row {row} failed in extraction and has no activations")
        return self._shard(self.batch[row])[start : start + count]

    def _shard(self, batch: int) -> Any:
        if batch not in self._shards:
            path = batch_activations(self.folder, batch)
            _check_header(path, self._totals[batch])
            try:
                handle = safe_open(path, framework="pt")
                self._shards[batch] = handle.get_slice("hidden")
            except (OSError, SafetensorError) as error:
                raise CacheError(f"{path} cannot be read ({error}); {_REMEDY}") from None
        return self._shards[batch]


def _check_header(path: Path, tokens: int) -> None:
    """Compare a shard's header with the file's size and the index. Raises CacheError."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length < size else None
        fact = header["hidden"] if isinstance(header, dict) else {"data_offsets": [0, -1], "shape": []}
        whole = size == 8 + length + fact["data_offsets"][1]
        fits = len(fact["shape"]) == 2 and fact["shape"][0] == tokens
    except (OSError, struct.error, ValueError, KeyError, TypeError, IndexError) as error:
        raise CacheError(f"{path} is not an activation shard ({error}); {_REMEDY}") from None
    if not whole:
        raise CacheError(f"{path} is truncated; {_REMEDY}")
    if not fits:
        raise CacheError(
            f"{path} holds {fact['shape']} instead of {tokens} tokens: it belongs to another run; {_REMEDY}"
        )


def head_input(
    head: Slice, cache: ActivationCache, rows: Sequence[int], prompts: Sequence[Prompt], layout: Layout
) -> Tensor:
    """What a head runs on: the cached states that enter it, or the token ids where it starts at layer 0 (no trunk)."""
    if head.start == 0:
        return layout.ids_BS
    return cached_hidden(cache, rows, prompts, layout).to(head.device, head.dtype)


def cached_hidden(cache: ActivationCache, rows: Sequence[int], prompts: Sequence[Prompt], layout: Layout) -> Tensor:
    """Padded head input [B, S, D] of a layout's sequences, put together from the cache.

    rows: the questions' row numbers, as `prompts` in order; the states come in the cache's type, on the CPU.
    """
    states = [cache.states(row) for row in rows]
    for row, prompt, state_TD in zip(rows, prompts, states, strict=True):
        if state_TD.shape[0] != kept_tokens(prompt):
            raise CacheError(
                f"question row {row} has {state_TD.shape[0]} cached tokens instead of {kept_tokens(prompt)}; {_REMEDY}"
            )
    sequences, length = layout.mask_BS.shape
    hidden_BSD = torch.zeros(sequences, length, states[0].shape[1], dtype=states[0].dtype)
    for sequence, (number, choice) in enumerate(zip(layout.owner, layout.choice, strict=True)):
        prompt, state_TD = prompts[number], states[number]
        base = len(prompt.prompt_ids)
        hidden_BSD[sequence, :base] = state_TD[:base]
        if choice >= 0 and not is_letter(prompt):
            start = base + sum(len(ids) - 1 for ids in prompt.choice_ids[:choice])
            extra = len(prompt.choice_ids[choice]) - 1
            hidden_BSD[sequence, base : base + extra] = state_TD[start : start + extra]
    return hidden_BSD
