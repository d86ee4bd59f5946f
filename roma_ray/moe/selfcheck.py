"""Holding a loaded slice against transformers' own forward pass: packed, resumed and trimmed, states, routing and gradients.

Passes on packings rest on what a family's code does: that tokens meet in the attention interface alone, that a block of
zeros leaves the residual stream as it is, that a layer has its parts under known names. A family of which that does not
hold would give wrong numbers without a word. So every slice runs a small token tree both ways before it is used.

Shapes: T flat tokens, S tokens of one sequence, P positions, D width, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from roma_ray.errors import ModelError
from roma_ray.moe.packing import Packing, Segment, pack
from roma_ray.moe.passes import run_packed
from roma_ray.moe.reach import reach_of, read_weights
from roma_ray.moe.reading import read_routing
from roma_ray.moe.routers import router_parameters
from roma_ray.moe.slices import Slice

# A shared beginning, two prompts after it, two continuations each: lengths that no window or chunk divides.
_TREE = ((7, -1), (9, 0), (5, 0), (2, 1), (3, 1), (4, 2), (1, 2))
_SEED = 20_251
# Relative difference of a token's states, and of a gate's gradient, that the type's rounding explains. Families that are
# right stay below 1e-5 in fp32; those that are not differ by 0.1 and more.
_STATES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
# A tie at one of the few kept tokens moves a gate's gradient by 0.2, measured on DeepSeekMoE-16B's shape in bf16.
_GRADIENTS = {torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.5}
# In half precision two experts' scores may tie, and one token's states then differ by an expert: so many tokens may.
_TIES = {torch.float32: 0.0, torch.bfloat16: 0.2, torch.float16: 0.2}


@dataclass(frozen=True)
class SelfCheck:
    """How far a slice's passes are from the stock forward: largest relative differences over tokens (fp32) or their bulk."""

    start: int
    stop: int
    packed: float
    """States after each layer, all tokens in one row."""
    resumed: float
    """What leaves the slice, started from the states after its first attention."""
    trimmed: float
    """The same at few tokens alone."""
    routing: float
    """Routing rows, absolute."""
    gradient: float | None
    """Gates' gradients, resumed and trimmed; None for a slice without routers."""
    reach: float | None
    """Least of its routers' `reach_of`: near 0 where the task loss reaches none of a router's gates."""

    def facts(self) -> dict[str, Any]:
        """Plain values, for a manifest."""
        return asdict(self)


def check_slice(part: Slice) -> SelfCheck | None:
    """Compare a slice's packed passes with its stock forward, one sequence at a time. Raises ModelError naming the layer.

    None where the stock forward itself gives no numbers: damaged weights, of which the work that follows tells more.
    """
    # On few tokens a pass costs what reading the experts costs: each kind of pass is made once, and differentiated if need be.
    gates = [p for router in part.routers for p in router_parameters(router).values()]
    with _requiring(gates):
        return _check(part, gates)


def _check(part: Slice, gates: Sequence[Tensor]) -> SelfCheck | None:
    generator = torch.Generator().manual_seed(_SEED)
    packing = _tree(part, generator).to(part.device)
    states_TD = None
    if part.start > 0:
        width = part.model.config.hidden_size
        states_TD = torch.randn(len(packing), width, generator=generator).to(part.device, part.dtype)
    tolerance, ties = _STATES[part.dtype], _TIES[part.dtype]
    leaves = sorted({token for leaf in _leaves(packing) for token in _tail(packing, leaf)})
    stock = _stock(part, packing, states_TD, leaves, gates)
    if not all(bool(torch.isfinite(states).all()) for states in (*stock.layers, stock.output)):
        return None
    with torch.no_grad():
        packed = _differences(_packed_layers(part, packing, states_TD), stock.layers)
        for place, difference in enumerate(packed):
            _refuse(part, part.start + place, "packed", _worst(difference, ties), tolerance)
        first = run_packed(part, packing, states_TD, after_attention=[part.start])
        read = _worst(_difference(first.states, stock.output), ties)
        _refuse(part, part.start, "read after its attention", read, tolerance)
        middle = first.after_attention[part.start]
        again = run_packed(part, packing, middle, resume=True)
        resumed = _worst(_difference(again.states, stock.output), ties)
        _refuse(part, part.start, "started after its first attention", resumed, tolerance)
    with read_routing(part.model, part.routers, torch.tensor(leaves, device=part.device)[None]) as tape:
        few = run_packed(part, packing, middle, resume=True, keep=leaves).states
    trimmed = _worst(_difference(few, stock.output[leaves]), ties)
    _refuse(part, part.stop - 1, "run at few tokens alone", trimmed, tolerance)
    routing = gradient = None
    if stock.routing_TLE is not None:
        rows_NLE = tape.routing_BPLE[0]
        routing = _worst((rows_NLE - stock.routing_TLE[leaves]).detach().abs().flatten(1).amax(1), ties)
        _refuse(part, part.routers[0].layer, "read for its routing", routing, tolerance)
        own = [torch.zeros_like(gate, dtype=torch.float32) for gate in gates]
        _add_gradients(own, _random_sum(few, rows_NLE, range(len(leaves)), len(leaves)), gates)
        gradient = _worst_gradient(own, stock.gradients)
        _refuse(part, part.routers[0].layer, "differentiated by its gates", gradient, _GRADIENTS[part.dtype])
    most = max(_worst(difference, ties) for difference in packed)
    return SelfCheck(part.start, part.stop, most, resumed, trimmed, routing or 0.0, gradient, stock.reach)


def _refuse(part: Slice, layer: int, how: str, difference: float, tolerance: float) -> None:
    if not difference <= tolerance:
        raise ModelError(
            f"{part.path} ({part.model_type}) cannot be tuned with this version of transformers: {how}, layer "
            f"{layer} differs from transformers' own forward pass by {difference:.2g}, more than rounding ({tolerance:g}). Its "
            "code mixes tokens, or adds to the residual stream, in a way that is not known here."
        )


# -- the stock forward --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stock:
    """What transformers' own forward gives, each leaf's sequence alone, put where the packing has the tokens."""

    layers: list[Tensor]
    """States [T, D] after each layer."""
    output: Tensor
    """What leaves the slice, [T, D] or logits [T, V]."""
    routing_TLE: Tensor | None
    reach: float | None
    """The least of its routers, on the first sequence."""
    gradients: list[Tensor]
    """Each gate's gradient of `_random_sum` at the kept tokens, fp32."""


def _tree(part: Slice, generator: torch.Generator) -> Packing:
    vocabulary = part.model.config.vocab_size
    segments = []
    for length, parent in _TREE:
        ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
        segments.append(Segment(tuple(ids), parent))
    return pack(segments)


def _leaves(packing: Packing) -> list[int]:
    parents = {segment.parent for segment in packing.segments}
    return [n for n in range(len(packing.segments)) if n not in parents]


def _tail(packing: Packing, leaf: int) -> list[int]:
    """The last token of a leaf and of the prompt that it follows."""
    return [packing.span(part)[-1] for part in packing.path(leaf)[1:]]


def _tokens(packing: Packing, leaf: int) -> list[int]:
    return [token for part in packing.path(leaf) for token in packing.span(part)]


def _stock(
    part: Slice, packing: Packing, states_TD: Tensor | None, leaves: Sequence[int], gates: Sequence[Tensor]
) -> _Stock:
    layers: list[Tensor | None] = [None] * (part.stop - part.start)
    output = routing = reach = None
    gradients = [torch.zeros_like(gate, dtype=torch.float32) for gate in gates]
    counted: set[int] = set()
    for leaf in _leaves(packing):
        tokens = _tokens(packing, leaf)
        with _layer_outputs(part) as seen, _entering(part) as entered, read_weights(part.routers) as weights:
            out, rows_SLE = _sequence(part, packing, states_TD, tokens)
        if states_TD is not None:
            _check_entry(part, entered[0], states_TD[tokens])
        for n, states_SD in enumerate(seen):
            layers[n] = _put(layers[n], len(packing), tokens, states_SD)
        output = _put(output, len(packing), tokens, out.detach())
        if rows_SLE is None:
            continue
        routing = _put(routing, len(packing), tokens, rows_SLE.detach())
        if reach is None:
            reach = _least_reach(part, weights, rows_SLE)
        # A token that sequences share counts once.
        here = [n for n, token in enumerate(tokens) if token in leaves and token not in counted]
        counted |= set(tokens)
        total = _random_sum(out[here], rows_SLE[here], [leaves.index(tokens[n]) for n in here], len(leaves))
        _add_gradients(gradients, total, gates)
    assert output is not None
    return _Stock([found for found in layers if found is not None], output, routing, reach, gradients)


def _sequence(
    part: Slice, packing: Packing, states_TD: Tensor | None, tokens: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """One sequence through the stock forward: what leaves the slice [S, ...], and its routing rows [S, L, E]."""
    places = torch.arange(len(tokens), device=part.device)[None]
    inputs: dict[str, Any] = {"attention_mask": torch.ones_like(places), "position_ids": places, "use_cache": False}
    if states_TD is None:
        inputs["input_ids"] = packing.ids_T[tokens][None]
    else:
        inputs["inputs_embeds"] = states_TD[tokens][None]
    with read_routing(part.model, part.routers, places) as tape:
        out = part.model(**inputs)
    states = out.logits if part.has_lm_head else out.last_hidden_state
    return states[0], tape.routing_BPLE[0] if part.routers else None


def _check_entry(part: Slice, entered_SD: Tensor, given_SD: Tensor) -> None:
    """The first layer of a slice that is fed hidden states must get just those: no scale, no norm, no second embedding."""
    if not torch.equal(entered_SD, given_SD):
        raise ModelError(
            f"{part.path} ({part.model_type}) changes the hidden states before its first layer: it cannot be cut "
            f"at layer {part.start}"
        )


def _least_reach(part: Slice, weights: dict[int, Tensor], rows_SLE: Tensor) -> float:
    return min(
        reach_of(weights[r.layer].flatten(0, -2), rows_SLE[:, column], list(router_parameters(r).values()))
        for column, r in enumerate(part.routers)
    )


def _put(table: Tensor | None, rows: int, tokens: Sequence[int], values: Tensor) -> Tensor:
    whole = values.new_zeros(rows, *values.shape[1:]) if table is None else table
    whole[list(tokens)] = values
    return whole


@contextmanager
def _layer_outputs(part: Slice) -> Iterator[list[Tensor]]:
    """The states [S, D] that leave each layer of one forward pass inside the block."""
    seen: list[Tensor] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0].detach())

    handles = [layer.register_forward_hook(note) for layer in part.model.base_model.layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _entering(part: Slice) -> Iterator[list[Tensor]]:
    """The states [S, D] that enter the first layer in one forward pass inside the block."""
    seen: list[Tensor] = []
    first = part.model.base_model.layers[0]
    handle = first.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0][0].detach()))
    try:
        yield seen
    finally:
        handle.remove()


# -- the passes on packings ---------------------------------------------------------------------------------------------


def _packed_layers(part: Slice, packing: Packing, states_TD: Tensor | None) -> list[Tensor]:
    with _layer_outputs(part) as seen:
        run_packed(part, packing, states_TD)
    return seen


def _random_sum(out: Tensor, rows_NLE: Tensor, places: Sequence[int], kept: int) -> Tensor:
    """A sum with random weights of what leaves the slice at some tokens, by their places among all that are kept.

    With the routing rows beside the output: some routers' gradients come from those alone.
    """
    generator = torch.Generator().manual_seed(_SEED)
    at = list(places)
    weights = torch.randn(kept, *out.shape[1:], generator=generator)[at].to(out.device)
    signs = torch.randn(kept, *rows_NLE.shape[1:], generator=generator)[at].to(out.device)
    return (out.float() * weights).sum() + (rows_NLE * signs).sum()


def _add_gradients(sums: Sequence[Tensor], total: Tensor, gates: Sequence[Tensor]) -> None:
    for sum_, grad in zip(sums, torch.autograd.grad(total, gates, allow_unused=True), strict=True):
        if grad is not None:
            sum_ += grad.float()


def _worst_gradient(own: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest difference of a gate's gradient, relative to its norm."""
    scale = max(b.norm() for b in theirs)
    # A router that no gradient reaches has rounding noise alone, which is measured against the largest gate's gradient.
    return max(
        float((a - b).norm() / b.norm().clamp_min(1e-3 * scale).clamp_min(1e-12))
        for a, b in zip(own, theirs, strict=True)
    )


@contextmanager
def _requiring(gates: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block these parameters carry a gradient."""
    before = [gate.requires_grad for gate in gates]
    try:
        for gate in gates:
            gate.requires_grad_(True)
        yield
    finally:
        for gate, wanted in zip(gates, before, strict=True):
            gate.requires_grad_(wanted)


# -- differences --------------------------------------------------------------------------------------------------------


def _differences(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[Tensor]:
    return [_difference(a, b) for a, b in zip(found, wanted, strict=True)]


def _difference(found_ND: Tensor, wanted_ND: Tensor) -> Tensor:
    """Relative difference of each token's row, [N] fp32; infinite where a number is not finite."""
    found, wanted = found_ND.detach().float(), wanted_ND.detach().float()
    return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-12)).nan_to_num(float("inf"))


def _worst(difference_N: Tensor, ties: float) -> float:
    """The largest difference, without the part of the tokens that ties may explain."""
    kept = max(1, round(len(difference_N) * (1 - ties)))
    return float(difference_N.sort().values[kept - 1])
