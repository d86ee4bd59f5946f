"""States after the attention of the first tuned layer: read from the cache, memory-mapped, or computed when they are needed.

Extraction writes them as flat safetensors shards; `rows.parquet` says where each question's states lie. Training, validation
and scoring start from them and never touch the layers below.

T flat tokens of a packing, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from roma_ray.engine.extractor import batch_activations
from roma_ray.engine.forward import Layout, own_tokens
from roma_ray.engine.model_spec import ModelSpec
from roma_ray.engine.question_table import read_table, table_facts
from roma_ray.errors import CacheError
from roma_ray.moe.passes import run_packed
from roma_ray.moe.slices import Slice
from roma_ray.questions.prompts import Prompt
from roma_ray.store.artifacts import read_manifest
from roma_ray.store.files import fetch_ahead
from roma_ray.store.tensors import DAMAGED, check_extent, mapped

ROWS = "rows.parquet"
_REMEDY = "remove the extraction folder and run again to rebuild it"


class States(Protocol):
    """Where a head's input comes from."""

    @property
    def prefix(self) -> int:
        """Tokens of the prompts' shared segment."""

    def packed(self, rows: Sequence[int], layout: Layout) -> Tensor:
        """States [T, D] after the attention of the first tuned layer, of a layout of the questions `rows`."""


class ActivationCache:
    """States of each question of a finished extraction, after the attention of layer `cut`."""

    def __init__(self, folder: str | Path, cut: int, *, ahead: bool = True) -> None:
        """Open the cache of an extraction stage; `ahead`: where it is far away, begin to fetch all of it.

        Raises CacheError (truncated, foreign), ArtifactError (missing rows).
        """
        self.folder, self.cut = Path(folder), cut
        table = read_table(self.folder / ROWS, ["row", "batch", "offset", "tokens", "shard_tokens"])
        self.prefix: int = table_facts(table, "prefix")["prefix"]
        self.batch, self.offset, self.tokens = (
            table.column(name).fill_null(-1).to_numpy() for name in ("batch", "offset", "tokens")
        )
        """[N] each; offset and tokens are -1 of questions that failed."""
        batches, places = np.unique(self.batch, return_index=True)
        totals = table.column("shard_tokens").take(pa.array(places)).to_pylist()
        self._totals: dict[int, int] = dict(zip(batches.tolist(), totals, strict=True))
        self._shards: dict[int, Any] = {}
        if ahead:
            fetch_ahead([batch_activations(self.folder, batch, cut) for batch in self._totals])

    def states(self, row: int) -> Tensor:
        """A question's own states, [tokens, D] in the cache's type: prompt after the prefix, continuations. Raises CacheError."""
        start, count = int(self.offset[row]), int(self.tokens[row])
        if min(start, count) < 0:
            raise CacheError(f"question row {row} failed in extraction and has no activations")
        return self._shard(int(self.batch[row]))[start : start + count]

    def packed(self, rows: Sequence[int], layout: Layout) -> Tensor:
        """States [T, D] of a layout of the questions `rows`, on the CPU in the cache's type. Raises CacheError."""
        parts = []
        for row, prompt in zip(rows, layout.prompts, strict=True):
            own = self.states(row)
            if own.shape[0] != own_tokens(prompt, self.prefix):
                raise CacheError(
                    f"question row {row} has {own.shape[0]} cached tokens instead of {own_tokens(prompt, self.prefix)}; "
                    f"{_REMEDY}"
                )
            parts += _of_gold(own, prompt, self.prefix) if layout.gold_only else [own]
        # Every shard holds the prefix; the first question's serves all, so the choice depends on the rows alone.
        shared = [self._shard(int(self.batch[rows[0]]))[: self.prefix]] if self.prefix else []
        return torch.cat([*shared, *parts])

    def _shard(self, batch: int) -> Any:
        if batch not in self._shards:
            path = batch_activations(self.folder, batch, self.cut)
            _check_header(path, self._totals[batch])
            try:
                self._shards[batch] = mapped(path, "hidden")
            except DAMAGED as error:
                raise CacheError(f"{path} cannot be read ({error}); {_REMEDY}") from None
        return self._shards[batch]


class FrozenLayers:
    """The layers below the tuned experts, run whenever their states are needed: `extraction.cache: false`."""

    def __init__(self, trunk: Slice, cut: int, prefix: int) -> None:
        assert (trunk.start, trunk.stop) == (0, cut + 1)
        self.trunk, self.cut, self.prefix = trunk, cut, prefix

    @torch.no_grad()
    def packed(self, rows: Sequence[int], layout: Layout) -> Tensor:
        """States [T, D] of a layout, on the model's device."""
        out = run_packed(self.trunk, layout.packing, after_attention=[self.cut], keep=[])
        return out.after_attention[self.cut]


def open_states(model: ModelSpec, extraction: str | Path, cut: int, *, ahead: bool = True) -> States:
    """The cache of an extraction at `cut`, or the frozen layers where it kept none. Raises CacheError, ModelError.

    `ahead`: whoever opens them reads most of them.
    """
    settings = read_manifest(extraction)["identity"]["settings"]
    if cut in settings["cuts"]:
        return ActivationCache(extraction, cut, ahead=ahead)
    if settings["cuts"]:
        raise CacheError(f"{extraction} holds the activations of layer(s) {settings['cuts']}, not of layer {cut}")
    return FrozenLayers(model.load(0, cut + 1, with_lm_head=False), cut, prefix_of(extraction))


def prefix_of(extraction: str | Path) -> int:
    """Tokens of the segment that all prompts of an extraction share. Raises ArtifactError."""
    prefix: int = table_facts(read_table(Path(extraction) / ROWS, ["row"]), "prefix")["prefix"]
    return prefix


def _of_gold(own: Tensor, prompt: Prompt, prefix: int) -> list[Tensor]:
    """The states of a question's prompt and gold continuation, without the other choices."""
    base = len(prompt.prompt_ids) - prefix
    start = base + sum(len(ids) - 1 for ids in prompt.choice_ids[: prompt.answer])
    return [own[:base], own[start : start + len(prompt.choice_ids[prompt.answer]) - 1]]


def _check_header(path: Path, tokens: int) -> None:
    """Compare a shard's header with the file's size and the index. Raises CacheError."""
    try:
        shape = check_extent(path)["hidden"]["shape"]
        fits = len(shape) == 2 and shape[0] == tokens
    except EOFError:
        raise CacheError(f"{path} is truncated; {_REMEDY}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path} is not an activation shard ({error}); {_REMEDY}") from None
    if not fits:
        raise CacheError(f"{path} holds {shape} instead of {tokens} tokens: it belongs to another run; {_REMEDY}")


Item = TypeVar("Item")
Made = TypeVar("Made")


def prefetched(make: Callable[[Item], Made], items: Iterable[Item], ahead: int = 2) -> Iterator[Made]:
    """`make` of each item, in order, made in a thread of its own while the caller works on the one before."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    waiting = []
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > ahead:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()
    finally:
        # When the caller stops early, items that have not begun are dropped.
        pool.shutdown(cancel_futures=True)
