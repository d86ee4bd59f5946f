"""The second term of eq. 9 by name: the manifold term, and those that the paper compares it with (its Figure 10 and Table 7).

Another one is a function and a line of `REGULARIZERS`, and its name in `config/finetune_settings.py` (`RegularizerConfig.kind`).
Shapes: B questions of a batch, L tuned layers, E experts. Each is a SUM over the batch, a scalar.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from roma_ray.manifold.losses import DISTANCES, DistanceName, NeighborTargets
from roma_ray.manifold.priors import routing_kl

_SEED = 20_253


@dataclass(frozen=True)
class Regularized:
    """What a regularizer may read."""

    routing_BLE: Tensor
    """The live routing rows of the batch, with gradient."""
    targets: NeighborTargets | None = None
    """What the batch's questions are pulled to: eq. 7's neighbors, their own base routing (`base`) or the prior (`prior`)."""
    parameters: Sequence[Tensor] = ()
    """Those of the tuned routers, the fp32 masters."""
    distance: DistanceName = "squared"
    """Of the manifold term: a name of `DISTANCES`."""
    entropy_sign: Literal["raise", "lower"] = "raise"
    entropy_target: float | None = None
    """Of `entropy`: which way, and up to where, as a part of log E."""


def manifold(on: Regularized) -> Tensor:
    """Eq. 7, or the same pull by another distance."""
    assert on.targets is not None, "the manifold term needs neighbor targets"
    return DISTANCES[on.distance](on.routing_BLE, on.targets)


def fixed(on: Regularized) -> Tensor:
    """KL(r_i || q_i) to what does not move: the own base routing, or a prior. Uniform, it is `entropy`."""
    assert on.targets is not None, "a pull needs targets"
    return routing_kl(on.routing_BLE, on.targets)


def yardstick(kind: str, on: Regularized) -> Tensor | None:
    """A pull towards targets that lie as far from each r_i as r_i is long, with random signs; None of a term that pulls to none.

    Its gradient is the scale to which the real one's is held: a tiny part of it is rounding, whatever the gates are. Far is a
    factor e either way for KL(r_i || q_i), which is infinite where q_i is 0.
    """
    if kind not in ("manifold", "base", "prior"):
        return None
    assert on.targets is not None, "a pull needs targets"
    signs = torch.randn(on.routing_BLE.shape, generator=torch.Generator().manual_seed(_SEED)).sign().to(on.routing_BLE)
    factors = 1 + signs if kind == "manifold" else signs.exp()
    away = on.targets._replace(mean=on.routing_BLE.detach() * factors)
    return REGULARIZERS[kind](replace(on, targets=away))


def entropy(on: Regularized) -> Tensor:
    """KL(r || uniform) = log E - H(r), summed over tuned layers and the batch: a scalar >= 0, zero for equal routing.

    Its gradient is that of -H: minimising it RAISES the routing entropy, the usual meaning of entropy regularization
    (a confidence penalty). The paper names neither sign nor source. Sign `lower`: H(r). With a target t it is the way that each
    layer's row has left to t log E: max(0, t log E - H), or max(0, H - t log E).
    """
    routing_BLE = on.routing_BLE
    # The floor stands for an expert whose probability underflowed to 0, where log r and its gradient are infinite.
    log_BLE = routing_BLE.clamp_min(torch.finfo(routing_BLE.dtype).tiny).log()
    layers, experts = routing_BLE.shape[1:]
    log_experts = torch.tensor(float(experts), dtype=routing_BLE.dtype, device=routing_BLE.device).log()
    if on.entropy_target is not None:
        left_BL = on.entropy_target * log_experts + (routing_BLE * log_BLE).sum(-1)
        return (left_BL if on.entropy_sign == "raise" else -left_BL).clamp_min(0).sum()
    if on.entropy_sign == "lower":
        return -(routing_BLE * log_BLE).sum()
    return (routing_BLE * log_BLE).sum() + len(routing_BLE) * layers * log_experts


def l1(on: Regularized) -> Tensor:
    """Sum of |theta| over all tuned router parameters, once a question, so that the batch's mean is the plain penalty.

    The paper speaks of "standard" penalties "applied to the router" and of "generic sparsity" without a formula. The norm of the
    routing weights themselves cannot be meant: a softmax row sums to 1 whatever the router does. L1 and L2 pull towards zero, as
    the textbook's do, not towards the pretrained gates. They are sums over up to millions of parameters: their lambda is far
    smaller than eq. 7's.
    """
    return len(on.routing_BLE) * torch.stack([theta.abs().sum() for theta in on.parameters]).sum()


def l2(on: Regularized) -> Tensor:
    """The same of theta^2."""
    return len(on.routing_BLE) * torch.stack([theta.square().sum() for theta in on.parameters]).sum()


def none(on: Regularized) -> Tensor:
    """A zero without gradient."""
    return on.routing_BLE.new_zeros(())


REGULARIZERS: dict[str, Callable[[Regularized], Tensor]] = {
    "none": none,
    "l1": l1,
    "l2": l2,
    "entropy": entropy,
    "manifold": manifold,
    "base": fixed,
    "prior": fixed,
}
