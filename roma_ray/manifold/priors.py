"""Pulls to a fixed routing: the base model's own at that question, every expert alike, or a task's mean.

The guide's L_align is KL(p(z | task) || q(z)) of a task's mean routing p; here it is the mean over questions of KL(r_i || q), which
is at least as large (KL is convex) and needs no sum over a task that a batch does not hold.

Shapes: N questions, B a batch or block of them, S successes, T tasks, L tuned layers, E experts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from roma_ray.manifold.losses import NeighborTargets

_BLOCK_ROWS = 16_384
"""Questions whose rows are copied at once."""


def routing_kl(routing_BLE: Tensor, targets: NeighborTargets) -> Tensor:
    """KL(r_i || q_i), natural logarithm, summed over tuned layers and the batch (a scalar): the live r_i with gradient.

    q_i is the targets' mean. The other direction than `manifold_kl`: it costs to use experts that q leaves out.
    """
    assert routing_BLE.shape == targets.mean.shape, f"{tuple(routing_BLE.shape)} != {tuple(targets.mean.shape)}"
    # The floor stands for a probability that underflowed to 0, where the logarithm and its gradient are infinite.
    floor = torch.finfo(routing_BLE.dtype).tiny
    log_BLE = routing_BLE.clamp_min(floor).log() - targets.mean.clamp_min(floor).log()
    return torch.where(targets.present, (routing_BLE * log_BLE).sum((1, 2)), 0).sum()


def base_targets(routing_NLE: Tensor) -> NeighborTargets:
    """Each question's own stored routing."""
    return _fixed(routing_NLE, torch.ones(len(routing_NLE), dtype=torch.bool))


def uniform_targets(routing_NLE: Tensor) -> NeighborTargets:
    """Every expert alike, for as many questions; KL to it is log E - H(r)."""
    even_111 = torch.full((1, 1, 1), 1 / routing_NLE.shape[2], dtype=routing_NLE.dtype)
    return _fixed(even_111.expand(routing_NLE.shape), torch.ones(len(routing_NLE), dtype=torch.bool))


def task_targets(
    routing_NLE: Tensor, tasks: Sequence[str], successful_N: Tensor, zeros: Callable[..., Tensor] | None = None
) -> NeighborTargets:
    """The mean stored routing of the successes of each question's task, its own among them; summed in fp64.

    No pull (`present` false, zeros) in a task without successes. `zeros` makes what is returned, as `torch.zeros` does.
    """
    numbers: dict[str, int] = {}
    task_N = torch.tensor([numbers.setdefault(task, len(numbers)) for task in tasks])
    rows_S = successful_N.nonzero()[:, 0]
    counts_T = torch.bincount(task_N[rows_S], minlength=len(numbers))
    sums_TLE = torch.zeros(len(numbers), *routing_NLE.shape[1:], dtype=torch.float64)
    for rows_B in rows_S.split(_BLOCK_ROWS):
        sums_TLE.index_add_(0, task_N[rows_B], routing_NLE[rows_B].double())
    means_TLE = (sums_TLE / counts_T.clamp_min(1)[:, None, None]).to(routing_NLE.dtype)
    mean_NLE = (zeros or torch.zeros)(*routing_NLE.shape, dtype=routing_NLE.dtype)
    for mean_BLE, task_B in zip(mean_NLE.split(_BLOCK_ROWS), task_N.split(_BLOCK_ROWS), strict=True):
        mean_BLE.copy_(means_TLE[task_B])
    return _fixed(mean_NLE, (counts_T > 0)[task_N])


def _fixed(mean_NLE: Tensor, present_N: Tensor) -> NeighborTargets:
    return NeighborTargets(mean_NLE, mean_NLE.new_zeros(len(mean_NLE)), present_N)
