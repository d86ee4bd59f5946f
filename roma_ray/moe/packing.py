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
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
        return Packing(
            self.segments, self.starts, self.ids_T.to(device), self.positions_T.to(device), device=str(device)
        )

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
    positions: list[int] = []
    ends: list[int] = []
    total = 0
    for number, segment in enumerate(segments):
        assert segment.ids, "a segment holds at least one token"
        assert segment.parent < number, "a parent comes before its children"
        first = ends[segment.parent] if segment.parent >= 0 else 0
        starts.append(total)
        positions.extend(range(first, first + len(segment.ids)))
        ends.append(first + len(segment.ids))
        total += len(segment.ids)
    ids = [token for segment in segments for token in segment.ids]
    return Packing(tuple(segments), tuple(starts), torch.tensor(ids), torch.tensor(positions))


def _queries(packing: Packing, kept: Sequence[int] | None) -> Queries:
    """Group the query tokens by their segments' depth, so that long prompts and short continuations do not pad each other."""
    rank = None if kept is None else {token: n for n, token in enumerate(kept)}
    depths: dict[int, list[tuple[int, list[int]]]] = {}
    for number, segment in enumerate(packing.segments):
        start = packing.starts[number]
        tokens = [t for t in range(start, start + len(segment.ids)) if rank is None or t in rank]
        if tokens:
            depths.setdefault(len(packing.path(number)), []).append((number, tokens))
    groups = tuple(
        _group(packing, part, rank) for _, members in sorted(depths.items()) for part in _bounded(packing, members)
    )
    return Queries(groups, torch.cat([group.rows_N for group in groups]).argsort())


def _bounded(packing: Packing, members: Sequence[tuple[int, list[int]]]) -> Iterator[Sequence[tuple[int, list[int]]]]:
    """Parts of a group whose padded keys stay within a bound: after a long shared segment every question has all its keys."""
    start, longest = 0, 0
    for end, (number, _) in enumerate(members):
        keys = int(packing.positions_T[packing.starts[number]]) + len(packing.span(number))
        if end > start and (end - start + 1) * max(longest, keys) > _KEYS_AT_ONCE:
            yield members[start:end]
            start, longest = end, 0
        longest = max(longest, keys)
    yield members[start:]


def _group(packing: Packing, members: Sequence[tuple[int, list[int]]], rank: dict[int, int] | None) -> Group:
    keys, queries = [], []
    for number, tokens in members:
        path = packing.path(number)
        keys.append([t for part in path for t in packing.span(part)])
        before = len(keys[-1]) - len(packing.span(number))
        queries.append([before + t - packing.starts[number] for t in tokens])
    width, length = max(map(len, queries)), max(map(len, keys))
    asked = [t for _, tokens in members for t in tokens]

    def table(values: Any) -> Tensor:
        return torch.tensor(values, device=packing.device)

    return Group(
        rows_N=table(asked if rank is None else [rank[t] for t in asked]),
        place_N=table([row * width + n for row, some in enumerate(queries) for n in range(len(some))]),
        positions_GQ=table([row + [row[-1]] * (width - len(row)) for row in queries]),
        keys_GK=table([row + [row[0]] * (length - len(row)) for row in keys]),
        key_counts_G=table([len(row) for row in keys]),
        rooted=rank is None and all(packing.segments[n].parent < 0 for n, _ in members),
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


_trim: ContextVar[_Trim | None] = ContextVar("roma_trim", default=None)


@contextmanager
def trimmed_layer(layer: int, keep_N: Tensor) -> Iterator[None]:
    """Inside the block `layer` (whole-model index) computes only the tokens `keep_N`, ascending flat indices."""
    token = _trim.set(_Trim(layer, keep_N))
    try:
        yield
    finally:
        _trim.reset(token)


def kept_tokens(layer: int) -> Tensor | None:
    """The flat tokens that `layer` computes in the running pass, ascending; None for all."""
    trim = _trim.get()
    return trim.keep_N if trim is not None and trim.layer == layer else None


def seen_positions(layer: int, positions: Tensor) -> Tensor:
    """Where flat token positions lie among the tokens that `layer` computes in the running pass; -1 stays."""
    keep_N = kept_tokens(layer)
    if keep_N is None:
        return positions
    keep_N = keep_N.to(positions.device)
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
        if group.rooted and sinks_H is None and not eager and _has_varlen(query, value):
            outputs.append(_varlen(group, mine_NHC, key_THC, value_THC, window, scale))
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


def _has_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether torch's FlashAttention for ragged batches serves this call: half precision on a GPU, torch 2.10 or newer,
    heads of one width for queries and values (DeepSeek's are not)."""
    width = query.shape[-1]
    if width != value.shape[-1] or width > 256 or width % 8:
        return False
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    return find_spec("torch.nn.attention.varlen") is not None


def _varlen(
    group: Group, query_NHC: Tensor, key_THC: Tensor, value_THC: Tensor, window: int | None, scale: float
) -> Tensor:
    """Attention of whole root segments by FlashAttention, without any padding; returns [N, H, C]."""
    from torch.nn.attention.varlen import varlen_attn

    ends = functional.pad(group.key_counts_G.cumsum(0), (1, 0)).to(torch.int32)
    longest = group.keys_GK.shape[1]
    out = varlen_attn(
        query_NHC.contiguous(),
        key_THC.index_select(0, group.rows_N),
        value_THC.index_select(0, group.rows_N),
        ends,
        ends,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query_NHC.shape[1] != key_THC.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


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
