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
_GRADIENTS = {torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.3}
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
    generator = torch.Generator().manual_seed(_SEED)
    packing = _tree(part, generator).to(part.device)
    states_TD = None
    if part.start > 0:
        width = part.model.config.hidden_size
        states_TD = torch.randn(len(packing), width, generator=generator).to(part.device, part.dtype)
    tolerance, ties = _STATES[part.dtype], _TIES[part.dtype]
    _check_entry(part, packing, states_TD)
    stock = _stock(part, packing, states_TD)
    if not all(bool(torch.isfinite(states).all()) for states in (*stock.layers, stock.output)):
        return None
    leaves = sorted({token for leaf in _leaves(packing) for token in _tail(packing, leaf)})
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
        few = run_packed(part, packing, middle, resume=True, keep=leaves)
        trimmed = _worst(_difference(few.states, stock.output[leaves]), ties)
        _refuse(part, part.stop - 1, "run at few tokens alone", trimmed, tolerance)
    routing = gradient = reach = None
    if part.routers:
        reach = _reach(part, packing, states_TD)
        routing, gradient = _routers(part, packing, states_TD, middle, leaves, stock)
        _refuse(part, part.routers[0].layer, "read for its routing", routing, tolerance)
        _refuse(part, part.routers[0].layer, "differentiated by its gates", gradient, _GRADIENTS[part.dtype])
    most = max(_worst(difference, ties) for difference in packed)
    return SelfCheck(part.start, part.stop, most, resumed, trimmed, routing or 0.0, gradient, reach)


def _check_entry(part: Slice, packing: Packing, states_TD: Tensor | None) -> None:
    """The first layer of a slice that is fed hidden states must get just those: no scale, no norm, no second embedding."""
    if states_TD is None:
        return
    entered: list[Tensor] = []
    handle = part.model.base_model.layers[0].register_forward_pre_hook(
        lambda _module, inputs: entered.append(inputs[0])
    )
    try:
        with torch.no_grad():
            _sequence(part, packing, states_TD, _tokens(packing, _leaves(packing)[0]))
    finally:
        handle.remove()
    given = states_TD[_tokens(packing, _leaves(packing)[0])]
    if not torch.equal(entered[0][0], given):
        raise ModelError(
            f"{part.path} ({part.model_type}) changes the hidden states before its first layer: it cannot be cut "
            f"at layer {part.start}"
        )


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


def _stock(part: Slice, packing: Packing, states_TD: Tensor | None) -> _Stock:
    layers: list[Tensor | None] = [None] * (part.stop - part.start)
    output: Tensor | None = None
    routing: Tensor | None = None
    for leaf in _leaves(packing):
        tokens = _tokens(packing, leaf)
        with torch.no_grad(), _layer_outputs(part) as seen:
            out, rows_SLE = _sequence(part, packing, states_TD, tokens)
        for n, states_SD in enumerate(seen):
            layers[n] = _put(layers[n], len(packing), tokens, states_SD)
        output = _put(output, len(packing), tokens, out)
        if rows_SLE is not None:
            routing = _put(routing, len(packing), tokens, rows_SLE)
    assert output is not None
    return _Stock([found for found in layers if found is not None], output, routing)


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


# -- the passes on packings ---------------------------------------------------------------------------------------------


def _packed_layers(part: Slice, packing: Packing, states_TD: Tensor | None) -> list[Tensor]:
    with _layer_outputs(part) as seen:
        run_packed(part, packing, states_TD)
    return seen


def _routers(
    part: Slice,
    packing: Packing,
    states_TD: Tensor | None,
    middle_TD: Tensor,
    leaves: Sequence[int],
    stock: _Stock,
) -> tuple[float, float]:
    """Largest difference of routing rows at the kept tokens, and of the gates' gradients, relative to their norm."""
    gates = [p for router in part.routers for p in router_parameters(router).values()]
    generator = torch.Generator().manual_seed(_SEED)
    weights = torch.randn(stock.output[leaves].shape, generator=generator).to(part.device)
    with _requiring(gates):
        positions = torch.tensor(leaves, device=part.device)[None]
        with read_routing(part.model, part.routers, positions) as tape:
            out = run_packed(part, packing, middle_TD, resume=True, keep=leaves)
        assert stock.routing_TLE is not None
        rows = (tape.routing_BPLE[0] - stock.routing_TLE[leaves]).detach().abs().flatten(1).amax(1)
        # With the routing rows beside the output: some routers' gradients come from those alone.
        signs = torch.randn(tape.routing_BPLE[0].shape, generator=generator).to(part.device)
        total = (out.states.float() * weights).sum() + (tape.routing_BPLE[0] * signs).sum()
        own = torch.autograd.grad(total, gates, allow_unused=True)
        theirs = _stock_gradients(part, packing, states_TD, leaves, weights, signs, gates)
    pairs = [(torch.zeros_like(b) if a is None else a.float(), b) for a, b in zip(own, theirs, strict=True)]
    scale = max(b.norm() for _, b in pairs)
    # A router that no gradient reaches has rounding noise alone, which is measured against the largest gate's gradient.
    differences = [float((a - b).norm() / b.norm().clamp_min(1e-3 * scale).clamp_min(1e-12)) for a, b in pairs]
    return _worst(rows, _TIES[part.dtype]), max(differences)


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


def _reach(part: Slice, packing: Packing, states_TD: Tensor | None) -> float:
    """The least reach of the slice's routers, on one sequence through the stock forward."""
    gates = {router.layer: list(router_parameters(router).values()) for router in part.routers}
    with _requiring([gate for some in gates.values() for gate in some]), read_weights(part.routers) as weights:
        _, rows_SLE = _sequence(part, packing, states_TD, _tokens(packing, _leaves(packing)[0]))
        assert rows_SLE is not None
        return min(
            reach_of(weights[layer].flatten(0, -2), rows_SLE[:, column], gates[layer])
            for column, layer in enumerate(gates)
        )


def _stock_gradients(
    part: Slice,
    packing: Packing,
    states_TD: Tensor | None,
    leaves: Sequence[int],
    weights: Tensor,
    signs: Tensor,
    gates: Sequence[Tensor],
) -> list[Tensor]:
    """The same sum's gradients, one sequence at a time; a token that sequences share counts once."""
    place = {token: n for n, token in enumerate(leaves)}
    counted: set[int] = set()
    total = [torch.zeros_like(gate, dtype=torch.float32) for gate in gates]
    for leaf in _leaves(packing):
        tokens = _tokens(packing, leaf)
        mine = [(n, token) for n, token in enumerate(tokens) if token in place and token not in counted]
        counted.update(token for _, token in mine)
        out, rows_SLE = _sequence(part, packing, states_TD, tokens)
        assert rows_SLE is not None
        here, there = [n for n, _ in mine], [place[token] for _, token in mine]
        chosen = (out[here].float() * weights[there]).sum() + (rows_SLE[here] * signs[there]).sum()
        grads = torch.autograd.grad(chosen, gates, allow_unused=True)
        for sum_, grad in zip(total, grads, strict=True):
            if grad is not None:
                sum_ += grad.float()
    return total


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
