"""Whether the task loss can reach a router: d(weights)/d(gate), measured against d(r)/d(gate).

A router that takes one expert and scales its weight to 1 gives every token the weight 1, whatever its logits are: no loss
behind it has a gradient. What is left is rounding, some 1e-8, which Adam would blow up to full steps. Some routers choose
through thresholds, to the same effect.

Shapes: T flat tokens, K chosen experts, E experts, P positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from roma_ray.moe.routers import Router, seen_choices

# Reached gates have ratios near 1, unreached ones below 1e-6 in fp32 and 1e-3 in bf16.
UNREACHED = 1e-2
_SEED = 20_252

WeightsReader = Callable[[Sequence[Router]], AbstractContextManager[Mapping[int, Tensor]]]
"""Shaped as `read_weights`: what a router's experts are weighed by in the passes inside the block."""


def is_unreached(probe: Mapping[str, float]) -> bool:
    """Whether a training's probe says that its task loss reached no router, so that the term was left out."""
    return probe.get("reach", 1.0) < UNREACHED


@contextmanager
def read_weights(routers: Sequence[Router]) -> Iterator[dict[int, Tensor]]:
    """Inside the block a forward pass leaves the chosen experts' weights [T, K] of each router here, by layer, with graph."""
    found: dict[int, Tensor] = {}

    def see(layer: int, output: tuple[Tensor, ...]) -> None:
        found[layer] = output[1]

    with seen_choices(routers, see):
        yield found


def reach_of(weights_TK: Tensor, rows_PE: Tensor, gates: Sequence[Tensor]) -> float:
    """Gradient norm of the experts' weights on a router's gates over that of its r, each summed with random signs.

    Near 1 where the task loss reaches the router, near 0 where it does not. Both values carry their graph, which is kept.
    """
    norms = []
    for values in (weights_TK.float(), rows_PE):
        signs = torch.randn(values.shape, generator=torch.Generator().manual_seed(_SEED)).to(values.device)
        square = 0.0
        if values.requires_grad:
            found = torch.autograd.grad((values * signs).sum(), gates, retain_graph=True, allow_unused=True)
            square = sum(float(g.float().square().sum()) for g in found if g is not None)
        # There may be more tokens behind the weights than positions behind r, or fewer.
        norms.append((square / len(values)) ** 0.5)
    return norms[0] / max(norms[1], 1e-30)
