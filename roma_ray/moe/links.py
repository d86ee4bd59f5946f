"""One slice of a head's chain, as whoever holds it runs it: forward with its graph, and backward from the slice above.

Only its gates have gradients, besides the states that enter it. A chain's slices, one after another, give what the head as a
whole gives, to the bit on a CPU: the boundary cuts autograd's graph where a layer hands its states to the next, and the
gradient of those states is carried across.

Shapes: T flat tokens, D width, P positions, L layers, E experts, N kept tokens, V vocabulary rows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from roma_ray.moe.finite import watching
from roma_ray.moe.masters import RouterMasters, frozen_digest
from roma_ray.moe.packing import Packing
from roma_ray.moe.passes import run_packed
from roma_ray.moe.reach import WeightsReader, reach_of, read_weights
from roma_ray.moe.reading import read_routing
from roma_ray.moe.routers import Router
from roma_ray.moe.scaling import scaled_logits
from roma_ray.moe.sending import sent
from roma_ray.moe.slices import Slice


@dataclass(frozen=True)
class PassPlan:
    """What a pass over a head is to do, for all its slices alike. Picklable."""

    packing: Packing
    positions_1P: Tensor
    """Where routing is read, -1 pads."""
    layers: tuple[int, ...]
    """Whose routing is read, whole-model indices, ascending."""
    factors_TLE: Tensor | None = None
    """What the logits of those layers' routers are multiplied by."""

    def routers(self, part: Slice) -> list[Router]:
        """Those of a slice that are read."""
        return [router for router in part.routers if router.layer in self.layers]


def run_slice(
    part: Slice,
    plan: PassPlan,
    states_TD: Tensor,
    *,
    resume: bool,
    keep: Sequence[int] | None = None,
    vocabulary_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What leaves a slice, and the routing rows [1, P, L, E] of those of its layers that are asked for, None without any.

    Arguments as of `run_packed`.
    """
    routers = plan.routers(part)
    with ExitStack() as stack:
        if plan.factors_TLE is not None and routers:
            columns = [plan.layers.index(router.layer) for router in routers]
            factors_TLE = sent(plan.factors_TLE[:, columns], part.device)
            stack.enter_context(scaled_logits(routers, factors_TLE))
        tape = stack.enter_context(read_routing(part.model, routers, plan.positions_1P))
        out = run_packed(part, plan.packing, states_TD, resume=resume, keep=keep, vocabulary_rows=vocabulary_rows)
    return out.states, tape.routing_BPLE if routers else None


def slice_reach(
    part: Slice,
    plan: PassPlan,
    states_TD: Tensor,
    masters: RouterMasters,
    *,
    resume: bool,
    keep: Sequence[int] | None = None,
    read: WeightsReader = read_weights,
) -> tuple[Tensor, float]:
    """What leaves a slice, and the least reach of its tuned routers (`moe/reach.py`); infinite where it has none."""
    routers = plan.routers(part)
    with read_routing(part.model, routers, plan.positions_1P) as tape, read(routers) as weights:
        out = run_packed(part, plan.packing, states_TD, resume=resume, keep=keep)
    gates = masters.parameters_by_layer
    found = [
        reach_of(weights[r.layer].flatten(0, -2), tape.routing_BPLE[0][:, n], list(gates[r.layer].values()))
        for n, r in enumerate(routers)
    ]
    return out.states.detach(), min(found, default=float("inf"))


@dataclass
class _Held:
    """A pass that waits for its backward."""

    plan: PassPlan
    entering_TD: Tensor
    outputs: tuple[Tensor, Tensor | None] | None
    """With their graph; None where they are computed again."""


class HeldSlice:
    """A slice below the last one of a head."""

    def __init__(self, part: Slice, *, first: bool, keep: bool) -> None:
        """The `first` slice of a head starts after the attention of its first layer.

        `keep`: from forward to backward the graph of a pass is kept; else the states that enter, and the slice runs once more.
        """
        self.part, self.resume, self.keep = part, first, keep
        self.routers = [_apart(router) for router in part.routers]
        self.masters = RouterMasters(part, [router.layer for router in part.routers])
        self._held: dict[int, _Held] = {}

    def copies(self) -> list[Router]:
        """Its routers with copies of their modules, on the CPU: what the process that trains puts masters on."""
        return self.routers

    def digest(self) -> str:
        """Of all that is frozen (`frozen_digest`)."""
        return frozen_digest(self.part.model)

    def infer(
        self, plan: PassPlan, gates: Mapping[str, Tensor] | None, states_TD: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """A pass without a graph. `gates` are the values of all gates, where one has changed."""
        self._put(gates)
        with torch.no_grad():
            return run_slice(self.part, plan, states_TD, resume=self.resume)

    def forward(
        self, plan: PassPlan, gates: Mapping[str, Tensor] | None, states_TD: Tensor, number: int
    ) -> tuple[Tensor, Tensor | None]:
        """A pass that `backward` of the same number follows; what it gives has no graph."""
        self._put(gates)
        entering_TD = sent(states_TD, self.part.device).detach()
        if not self.resume:
            entering_TD.requires_grad_()
        outputs = self._run(plan, entering_TD)
        self._held[number] = _Held(plan, entering_TD, outputs if self.keep else None)
        states_TD, rows = outputs
        return states_TD.detach(), None if rows is None else rows.detach()

    def backward(
        self, states_grad: Tensor | None, rows_grad: Tensor | None, number: int, retain: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients of the states that entered and of each gate of the layers asked for, from those of what left; None where
        there is none.

        With `retain` the pass is held for another call.
        """
        held = self._held[number] if retain else self._held.pop(number)
        gates = self._gates(held.plan)
        outputs = held.outputs or self._run(held.plan, held.entering_TD)
        if retain:
            held.outputs = outputs
        pairs = [
            (output, sent(grad, output.device))
            for output, grad in zip(outputs, (states_grad, rows_grad), strict=True)
            if output is not None and grad is not None and output.requires_grad
        ]
        inputs = [*gates, *([] if self.resume else [held.entering_TD])]
        if not pairs or not inputs:
            return None, [None] * len(gates)
        given, grads = zip(*pairs, strict=True)
        found = torch.autograd.grad(given, inputs, grads, allow_unused=True, retain_graph=retain)
        return (None if self.resume else found[-1]), list(found[: len(gates)])

    def drop(self, number: int) -> None:
        """Let go of a pass that was retained."""
        del self._held[number]

    def weigh(self, plan: PassPlan, gates: Mapping[str, Tensor] | None, states_TD: Tensor) -> tuple[Tensor, float]:
        """What leaves, and the least reach of its routers."""
        self._put(gates)
        with torch.inference_mode(False), torch.enable_grad():
            return slice_reach(self.part, plan, states_TD, self.masters, resume=self.resume)

    def watch(self, plan: PassPlan, gates: Mapping[str, Tensor] | None, states_TD: Tensor) -> tuple[Tensor, str | None]:
        """What leaves, and where values first stop being finite (`moe/finite.py`), if they do."""
        with watching(self.part.model, self.part.start) as seen:
            states_TD, _ = self.infer(plan, gates, states_TD)
        return states_TD, seen.origin

    def _run(self, plan: PassPlan, entering_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        for layer, named in self.masters.parameters_by_layer.items():
            for gate in named.values():
                gate.requires_grad_(layer in plan.layers)
        # With a graph also where it is let go at once: kernels may differ by whether there is one.
        with torch.inference_mode(False), torch.enable_grad():
            return run_slice(self.part, plan, entering_TD, resume=self.resume)

    def _gates(self, plan: PassPlan) -> list[Tensor]:
        """The gates that have gradients, in the order of the masters of a whole head."""
        named = self.masters.parameters_by_layer
        return [gate for layer in self.masters.layers if layer in plan.layers for gate in named[layer].values()]

    def _put(self, gates: Mapping[str, Tensor] | None) -> None:
        if gates is not None:
            self.masters.load(gates)


def _apart(router: Router) -> Router:
    """A router whose modules are copies, on the CPU."""
    path = next(name for name, module in router.module.named_modules() if module is router.gate)
    module = copy.deepcopy(router.module).cpu()
    return replace(router, module=module, gate=module.get_submodule(path))
