"""Token trees packed flat: no arithmetic on padding, and every shared token computed once.

A packing is a list of segments, each the tokens that follow a parent segment: the instruction that all prompts share, then
each prompt, then each choice's continuation. All tokens lie in one row [1, T] for norms, projections, routers and experts;
only the attention looks at the tree. `moe/passes.py` runs slices on packings.

Shapes: T flat tokens, G segments of a group, Q queries, K keys (both padded within the group), H heads, C head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from roma_ray.moe.sending import sent
from roma_ray.moe.varlen import serves, varlen

# Keys that are gathered for one group: at a width of 2,048 in bf16, 134 MB of keys and as much of values.
_KEYS_AT_ONCE = 32_768


@dataclass(frozen=True)
class Segment:
    """Some tokens and the segment that they follow; -1 for none."""

    ids: tuple[int, ...]
    parent: int = -1


@dataclass(frozen=True)
class Group:
    """Segments whose attention is computed together, padded to one another: the only padding there is."""

    rows_N: Tensor
    """Which of the pass's queries these are, segment by segment."""
    place_N: Tensor
    """Where each lies among the group's padded queries, G x Q flat."""
    positions_GQ: Tensor
    """Position of each query in its own sequence; padding repeats the segment's last."""
    keys_GK: Tensor
    """Flat index of the keys: the ancestors' tokens, then the segment's own; padding repeats the first."""
    key_counts_G: Tensor
    rooted: bool
    """No segment has a parent and every token asks: plain causal attention."""

    def to(self, device: str | torch.device) -> Group:
        """The same tables on a device."""
        named: dict[str, Any] = {k: sent(v, device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **named)

    def visible(self, window: int | None) -> Tensor:
        """Which keys each query sees, bool [G, Q, K]: its past, no further back than `window`."""
        places_K = torch.arange(self.keys_GK.shape[1], device=self.keys_GK.device)
        queries_GQ1 = self.positions_GQ[:, :, None]
        seen = (places_K <= queries_GQ1) & (places_K < self.key_counts_G[:, None, None])
        return seen if window is None else seen & (places_K > queries_GQ1 - window)


@dataclass(frozen=True)
class Packing:
    """Segments laid out flat. Made by `pack`."""

    segments: tuple[Segment, ...]
    starts: tuple[int, ...]
    """First flat token of each segment."""
    firsts: tuple[int, ...]
    """Position of each segment's first token in its own sequence."""
    ids_T: Tensor
    positions_T: Tensor
    """Position of each token in its own sequence, from the root of its tree."""
    device: str = "cpu"
    _queries: dict[int, Queries] = field(default_factory=dict, compare=False, repr=False)

    def flat(self, segment: int, offset: int) -> int:
        """Flat index of a segment's token."""
        assert 0 <= offset < len(self.segments[segment].ids)
        return self.starts[segment] + offset

    def span(self, segment: int) -> range:
        """Flat indices of a segment's tokens."""
        start = self.starts[segment]
        return range(start, start + len(self.segments[segment].ids))

    def path(self, segment: int) -> list[int]:
        """The segments from the root to this one."""
        found = [segment]
        while self.segments[found[-1]].parent >= 0:
            found.append(self.segments[found[-1]].parent)
        return found[::-1]

    def to(self, device: str | torch.device) -> Packing:
        """The same packing with its tensors on a device."""
        ids_T, positions_T = sent(self.ids_T, device), sent(self.positions_T, device)
        return Packing(self.segments, self.starts, self.firsts, ids_T, positions_T, device=str(device))

    def queries(self) -> Queries:
        """The attention of every token."""
        if -1 not in self._queries:
            self._queries[-1] = _queries(self, None)
        return self._queries[-1]

    def queries_of(self, kept: Sequence[int]) -> Queries:
        """The attention of some tokens (ascending flat indices) to all."""
        return _queries(self, kept)

    def __len__(self) -> int:
        return len(self.ids_T)


@dataclass(frozen=True)
class Queries:
    """Groups that together hold each query token once, and the order that puts their outputs back in place."""

    groups: tuple[Group, ...]
    order_N: Tensor


def pack(segments: Sequence[Segment]) -> Packing:
    """Lay segments out flat, in order; a parent must come before its children and no segment may be empty."""
    starts: list[int] = []
    firsts: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    total = 0
    for number, segment in enumerate(segments):
        assert segment.ids, "a segment holds at least one token"
        assert segment.parent < number, "a parent comes before its children"
        first = ends[segment.parent] if segment.parent >= 0 else 0
        starts.append(total)
        firsts.append(first)
        positions.extend(range(first, first + len(segment.ids)))
        ends.append(first + len(segment.ids))
        total += len(segment.ids)
    ids = [token for segment in segments for token in segment.ids]
    return Packing(tuple(segments), tuple(starts), tuple(firsts), torch.tensor(ids), torch.tensor(positions))


def _queries(packing: Packing, kept: Sequence[int] | None) -> Queries:
    """Group the query tokens by their segments' depth, so that long prompts and short continuations do not pad each other."""
    rank = np.arange(len(packing)) if kept is None else np.asarray(kept)
    depths: dict[int, list[_Asked]] = {}
    for number, segment in enumerate(packing.segments):
        start = packing.starts[number]
        first, end = (int(n) for n in np.searchsorted(rank, (start, start + len(segment.ids))))
        if end > first:
            depths.setdefault(len(packing.path(number)), []).append(_Asked(number, first, rank[first:end]))
    groups = [
        _group(packing, part, rooted=kept is None and depth == 1)
        for depth, members in sorted(depths.items())
        for part in _bounded(packing, members)
    ]
    order_N = torch.cat([group.rows_N for group in groups]).argsort()
    return Queries(tuple(group.to(packing.device) for group in groups), sent(order_N, packing.device))


@dataclass(frozen=True)
class _Asked:
    """The query tokens of a segment."""

    segment: int
    first: int
    """Place of the first of them among all that ask."""
    tokens: np.ndarray
    """Flat indices."""


def _bounded(packing: Packing, members: Sequence[_Asked]) -> Iterator[Sequence[_Asked]]:
    """Parts of a group whose padded keys stay within a bound: after a long shared segment every question has all its keys."""
    start, longest = 0, 0
    for end, asked in enumerate(members):
        keys = packing.firsts[asked.segment] + len(packing.segments[asked.segment].ids)
        if end > start and (end - start + 1) * max(longest, keys) > _KEYS_AT_ONCE:
            yield members[start:end]
            start, longest = end, 0
        longest = max(longest, keys)
    yield members[start:]


def _group(packing: Packing, members: Sequence[_Asked], *, rooted: bool) -> Group:
    """The tables of a group, on the CPU."""
    counts = [packing.firsts[asked.segment] + len(packing.segments[asked.segment].ids) for asked in members]
    width, length = max(len(asked.tokens) for asked in members), max(counts)
    rows, places = [], []
    positions_GQ = np.empty((len(members), width), np.int64)
    keys_GK = np.empty((len(members), length), np.int64)
    for n, asked in enumerate(members):
        size, before = len(asked.tokens), 0
        rows.append(np.arange(asked.first, asked.first + size))
        places.append(n * width + np.arange(size))
        positions_GQ[n, :size] = packing.firsts[asked.segment] - packing.starts[asked.segment] + asked.tokens
        positions_GQ[n, size:] = positions_GQ[n, size - 1]
        for part in packing.path(asked.segment):
            span = packing.span(part)
            keys_GK[n, before : before + len(span)] = np.arange(span.start, span.stop)
            before += len(span)
        keys_GK[n, before:] = keys_GK[n, 0]
    return Group(
        rows_N=torch.from_numpy(np.concatenate(rows)),
        place_N=torch.from_numpy(np.concatenate(places)),
        positions_GQ=torch.from_numpy(positions_GQ),
        keys_GK=torch.from_numpy(keys_GK),
        key_counts_G=torch.tensor(counts),
        rooted=rooted,
    )


# -- attention ---------------------------------------------------------------------------------------------------------


class Attention:
    """What a packed pass's attention does: everything, only give its keys and values, or use those of another call."""

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self.queries = packing.queries()
        self.capture = False
        self.captured: tuple[Tensor, Tensor] | None = None


class Captured(Exception):
    """Not an error: a layer's keys and values are there, and the rest of its forward is not wanted."""


@dataclass(frozen=True)
class _Trim:
    layer: int
    keep_N: Tensor
    host_N: Tensor


_trim: ContextVar[_Trim | None] = ContextVar("roma_trim", default=None)


@contextmanager
def trimmed_layer(layer: int, keep_N: Tensor, host_N: Tensor) -> Iterator[None]:
    """Inside the block `layer` (whole-model index) computes only the tokens `keep_N`, ascending flat indices; `host_N` are the
    same on the CPU."""
    token = _trim.set(_Trim(layer, keep_N, host_N))
    try:
        yield
    finally:
        _trim.reset(token)


def kept_tokens(layer: int) -> Tensor | None:
    """The flat tokens that `layer` computes in the running pass, ascending; None for all."""
    trim = _trim.get()
    return trim.keep_N if trim is not None and trim.layer == layer else None


def seen_positions(layer: int, positions: Tensor) -> Tensor:
    """Where flat token positions lie among the tokens that `layer` computes in the running pass; -1 stays.

    Give positions on the CPU: the check that they are there waits for the device that has them.
    """
    trim = _trim.get()
    if trim is None or trim.layer != layer:
        return positions
    keep_N = trim.host_N if positions.device.type == "cpu" else trim.keep_N
    found = torch.searchsorted(keep_N, positions.clamp(min=0)).clamp(max=len(keep_N) - 1)
    present = (keep_N[found] == positions) | (positions < 0)
    assert bool(present.all()), "a token that is read in the last layer must be kept"
    return found.masked_fill(positions < 0, -1)


_running: ContextVar[Attention | None] = ContextVar("roma_packed_attention", default=None)


@contextmanager
def packed_attention(attention: Attention) -> Iterator[None]:
    """Models loaded with one of `ATTENTION`'s implementations attend along the packing's tree inside the `with` block."""
    token = _running.set(attention)
    try:
        yield
    finally:
        _running.reset(token)


def _attention_of(stock: str) -> Any:
    """An attention function for transformers: the packing's where one is running, else the stock one."""

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any
    ) -> tuple[Tensor, None]:
        running = _running.get()
        if running is None:
            stock_function = ALL_ATTENTION_FUNCTIONS.get_interface(stock, _module_eager(module))
            return stock_function(module, query, key, value, attention_mask, **settings)
        if running.capture:
            running.captured = key, value
            raise Captured
        if running.captured is not None:
            key, value = running.captured
        # The mask that transformers hands on is the one made below: the sliding window's size, or None.
        return _attend(running.queries, query, key, value, attention_mask, settings, eager=stock == "eager"), None

    return forward


def _module_eager(module: nn.Module) -> Any:
    """The model file's own eager attention."""
    import sys

    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _attend(
    queries: Queries,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    settings: dict[str, Any],
    *,
    eager: bool,
) -> Tensor:
    """Attention of [1, H, N, C] queries to the [1, H', T, C] keys along the tree; returns [1, N, H, C']."""
    assert not settings.get("dropout"), "packed passes run in evaluation mode"
    assert settings.get("softcap") is None, "no supported family caps its attention"
    scale = settings.get("scaling") or query.shape[-1] ** -0.5
    sinks_H = settings.get("s_aux")
    query_NHC, key_THC, value_THC = (x[0].transpose(0, 1) for x in (query, key, value))
    outputs = []
    for group in queries.groups:
        mine_NHC = query_NHC.index_select(0, group.rows_N)
        if group.rooted and sinks_H is None and not eager and serves(query, key, value, window):
            mine = (mine_NHC, key_THC.index_select(0, group.rows_N), value_THC.index_select(0, group.rows_N))
            outputs.append(varlen(*mine, group.key_counts_G, group.keys_GK.shape[1], window, scale))
            continue
        padded_GQHC = mine_NHC.new_zeros(group.positions_GQ.numel(), *mine_NHC.shape[1:])
        padded_GQHC = padded_GQHC.index_copy(0, group.place_N, mine_NHC).unflatten(0, group.positions_GQ.shape)
        keys_GKHC, values_GKHC = key_THC[group.keys_GK], value_THC[group.keys_GK]
        out_GQHC = _padded(group, padded_GQHC, keys_GKHC, values_GKHC, window, scale, sinks_H, eager=eager)
        outputs.append(out_GQHC.flatten(0, 1).index_select(0, group.place_N))
    return torch.cat(outputs).index_select(0, queries.order_N)[None]


def _padded(
    group: Group,
    query_GQHC: Tensor,
    key_GKHC: Tensor,
    value_GKHC: Tensor,
    window: int | None,
    scale: float,
    sinks_H: Tensor | None,
    *,
    eager: bool,
) -> Tensor:
    """Attention of one group, padded queries to padded keys; returns [G, Q, H, C']."""
    query, key, value = (x.transpose(1, 2) for x in (query_GQHC, key_GKHC, value_GKHC))
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if not eager and sinks_H is None:
        plain = group.rooted and window is None
        mask = None if plain else group.visible(window)[:, None]
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=plain, scale=scale
        ).transpose(1, 2)
    logits = (query @ key.transpose(2, 3)) * scale
    logits = logits.masked_fill(~group.visible(window)[:, None], torch.finfo(logits.dtype).min)
    if sinks_H is not None:
        # One more logit a head that takes weight and gives nothing (GPT-OSS).
        sinks = sinks_H.to(logits.dtype).reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], dim=-1)
        logits = logits - logits.max(dim=-1, keepdim=True).values
    weights = functional.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights[..., : key.shape[2]] @ value).transpose(1, 2)


def _window(local_size: int | None = None, **_: Any) -> int | None:
    """What stands for the mask in a packed pass: the sliding window's size, None for full attention."""
    return local_size


def _mask_of(stock: str) -> Any:
    """A mask function for transformers: the window alone while a packed pass runs, else the stock mask."""

    def make(**arguments: Any) -> Any:
        return ALL_MASK_ATTENTION_FUNCTIONS[stock](**arguments) if _running.get() is None else _window(**arguments)

    return make


# transformers' name of each implementation that knows packings, by the stock one that it falls back to.
ATTENTION = {stock: f"roma_{stock}" for stock in ("sdpa", "eager")}
for _stock, _name in ATTENTION.items():
    AttentionInterface.register(_name, _attention_of(_stock))
    AttentionMaskInterface.register(_name, _mask_of(_stock))
