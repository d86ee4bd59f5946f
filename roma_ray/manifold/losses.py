"""The manifold term, eq. 7, computed without listing neighbors.

The weights of eq. 6 sum to 1 and the stored r_j carry no gradient, so with
the mean target m_i = sum_j W_ij r_j,

    sum_j W_ij ||r_i - r_j||^2  =  ||r_i - m_i||^2  +  sum_j W_ij ||r_j - m_i||^2

holds exactly. The second part, the spread, is a constant >= 0. So the training loop needs one target row and one number
a question, its cost does not depend on the number of neighbors, and the gradient is that of eq. 7. This is the only
form of the term in the package: there is no padded list of neighbors.

Seen from the logits z of r_i = softmax(z), the gradient of eq. 7 is 2 r_i * (d - r_i . d) with d = r_i - m_i: it vanishes
where r_i is near a corner of the simplex, however far m_i is. `manifold_kl` is the same pull by KL(m_i || r_i), whose gradient
there is r_i - m_i.

Shapes: N questions, B a batch or block of them, P positions, or (question, neighbor) pairs, U different neighbors of a block,
L tuned layers, E experts. Losses are SUMS
over the batch; the caller divides by the number of questions of the global batch, so that empty neighborhoods count in the
mean as zeros.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from roma_ray.errors import NeighborError
from roma_ray.manifold.neighbors import Neighborhoods

DistanceName = Literal["squared", "kl"]

_BLOCK_PAIRS = 2**17
"""Pairs whose neighbors' rows are held in fp64 at once: at most 64 MiB at 64 experts."""


class NeighborTargets(NamedTuple):
    """What eq. 7 needs of the neighbors, for all questions or for a batch of them; constants, without gradient."""

    mean: Tensor
    """m_i, [N, L, E]; zero where there is no neighbor."""
    spread: Tensor
    """sum_j W_ij ||r_j - m_i||^2, [N], at least 0."""
    present: Tensor
    """[N] bool: the neighborhood is not empty."""

    def take(self, rows_B: Tensor, device: torch.device | None = None) -> "NeighborTargets":
        """The targets of a batch, given its row numbers in the question table, moved to the device of the loss."""
        return NeighborTargets(*(column[rows_B.to(column.device)].to(device or column.device) for column in self))


def neighbor_targets(
    neighborhoods: Neighborhoods, routing_NLE: Tensor, zeros: Callable[..., Tensor] | None = None
) -> NeighborTargets:
    """Mean and spread of each question's neighbors from the stored routing rows r_j; summed in fp64, kept in fp32.

    Call it once with the base model's routing, or again after each refresh of r_j. `zeros` makes what is returned, as
    `torch.zeros` does (the default); beside it and the rows a block of questions is held. Raises NeighborError where a
    neighbor's routing row is not finite.
    """
    assert routing_NLE.ndim == 3, f"routing must be [N, L, E], not {tuple(routing_NLE.shape)}"
    routing_NLE = routing_NLE.detach().cpu()
    mean_NLE = (zeros or torch.zeros)(*routing_NLE.shape, dtype=_kept(routing_NLE))
    spread_N = _put_means(mean_NLE, neighborhoods, routing_NLE)
    return NeighborTargets(mean_NLE, spread_N, neighborhoods.sizes > 0)


def position_targets(
    neighborhoods: Neighborhoods,
    routing_NPLE: Tensor,
    present_NP: Tensor,
    zeros: Callable[..., Tensor] | None = None,
) -> NeighborTargets:
    """Targets of a pull at each of P positions: those of eq. 7 between the rows that all have at that place, summed.

    `present_NP` says which questions have a position; W is shared out among the neighbors that have it. The mean is [N, P * L, E],
    a row of zeros where a question or all its neighbors lack the position: `pulled` leaves such rows out. `zeros` and
    NeighborError as above.
    """
    questions, positions, layers, experts = routing_NPLE.shape
    routing_NPLE = routing_NPLE.detach().cpu()
    mean_NPLE = (zeros or torch.zeros)(questions, positions, layers, experts, dtype=_kept(routing_NPLE))
    spreads, has_N = [], torch.zeros(questions, dtype=torch.bool)
    for place, present_N in enumerate(present_NP.unbind(1)):
        having = _having(neighborhoods, present_N)
        spreads.append(_put_means(mean_NPLE[:, place], having, routing_NPLE[:, place]))
        has_N |= having.sizes > 0
    return NeighborTargets(mean_NPLE.flatten(1, 2), torch.stack(spreads).sum(0), has_N)


def _kept(routing_NLE: Tensor) -> torch.dtype:
    return torch.promote_types(routing_NLE.dtype, torch.float32)


def _put_means(mean_NLE: Tensor, neighborhoods: Neighborhoods, routing_NLE: Tensor) -> Tensor:
    """Put each question's mean in a tensor of zeros; returns the spreads, [N]. Raises NeighborError."""
    assert len(routing_NLE) == len(neighborhoods.queried), "routing and neighborhoods are of different tables"
    spread_N = torch.zeros(len(routing_NLE), dtype=torch.float64)
    for start, stop in _blocks(neighborhoods.offsets):
        offsets_B = neighborhoods.offsets[start : stop + 1]
        pairs = slice(int(offsets_B[0]), int(offsets_B[-1]))
        used_U, places_P = neighborhoods.indices[pairs].unique(return_inverse=True)
        weighted = partial(_weighted_sum, offsets_B - offsets_B[0], places_P, neighborhoods.weights[pairs])
        # One layer at a time: fp64 rows of all layers would be the largest thing in memory.
        for layer in range(routing_NLE.shape[1]):
            rows_UE = routing_NLE[used_U, layer].double()
            mean_BE = weighted(rows_UE)
            square_B = weighted(rows_UE.square().sum(1, keepdim=True))[:, 0]
            mean_NLE[start:stop, layer] = mean_BE.to(mean_NLE.dtype)
            spread_N[start:stop] += (square_B - mean_BE.square().sum(1)).clamp_min(0)
    if not torch.isfinite(spread_N).all():
        row = int((~torch.isfinite(spread_N)).nonzero()[0, 0])
        raise NeighborError(f"a neighbor of question row {row} has a routing row that is not finite: extract it again")
    return spread_N.to(mean_NLE.dtype)


def _blocks(offsets: Tensor) -> Iterator[tuple[int, int]]:
    """First and last questions, the latter not included, of blocks of at most `_BLOCK_PAIRS` pairs, or one question of more."""
    start, last = 0, len(offsets) - 1
    while start < last:
        full = int(torch.searchsorted(offsets, offsets[start] + _BLOCK_PAIRS, right=True)) - 1
        # A question without neighbors costs its own row.
        stop = max(min(full, start + _BLOCK_PAIRS), start + 1)
        if offsets[start] < offsets[stop]:
            yield start, stop
        start = stop


def pulled(routing_BPLE: Tensor, targets: NeighborTargets) -> Tensor:
    """Live rows at each position as rows of the targets' batch, [B, P * L, E]; zero, without gradient, where nothing pulls."""
    aimed_BL1 = targets.mean.sum(-1, keepdim=True) > 0
    return routing_BPLE.flatten(1, 2).masked_fill(~aimed_BL1, 0.0)


def _having(neighborhoods: Neighborhoods, present_N: Tensor) -> Neighborhoods:
    """The neighborhoods without questions and neighbors that lack something; weights sum to 1 again."""
    rows_P = neighborhoods.rows
    kept_P = present_N[rows_P] & present_N[neighborhoods.indices]
    rows_P, weights_P = rows_P[kept_P], neighborhoods.weights[kept_P]
    sizes_N = torch.bincount(rows_P, minlength=len(present_N))
    total_N = weights_P.new_zeros(len(present_N)).index_add_(0, rows_P, weights_P)
    return replace(
        neighborhoods,
        offsets=torch.cat([sizes_N.new_zeros(1), sizes_N.cumsum(0)]),
        indices=neighborhoods.indices[kept_P],
        similarities=neighborhoods.similarities[kept_P],
        weights=torch.where(total_N[rows_P] > 0, weights_P / total_N[rows_P], 1 / sizes_N[rows_P].double()),
    )


def _weighted_sum(offsets: Tensor, indices_P: Tensor, weights_P: Tensor, rows_UX: Tensor) -> Tensor:
    # The bag sum is a product of the sparse W with the rows: no row is copied once a pair.
    return F.embedding_bag(
        indices_P, rows_UX, offsets, mode="sum", per_sample_weights=weights_P, include_last_offset=True
    )


def manifold_loss(routing_BLE: Tensor, targets: NeighborTargets) -> Tensor:
    """Eq. 7 summed over the batch (a scalar): the live r_i with gradient, squared norm over experts and tuned layers.

    `targets` are those of the batch. An empty neighborhood gives zero; count them with `(~targets.present).sum()`.
    """
    assert routing_BLE.shape == targets.mean.shape, f"{tuple(routing_BLE.shape)} != {tuple(targets.mean.shape)}"
    distance_B = (routing_BLE - targets.mean).square().sum((1, 2)) + targets.spread
    return torch.where(targets.present, distance_B, 0).sum()


def manifold_kl(routing_BLE: Tensor, targets: NeighborTargets) -> Tensor:
    """KL(m_i || r_i), natural logarithm, summed over tuned layers and the batch (a scalar): the live r_i with gradient.

    By the same identity as above sum_j W_ij KL(r_j || r_i) is this plus a constant. Empty neighborhoods give zero. Ours, not
    the paper's. An expert whose probability underflowed (logits 87 apart in fp32) has no gradient.
    """
    assert routing_BLE.shape == targets.mean.shape, f"{tuple(routing_BLE.shape)} != {tuple(targets.mean.shape)}"
    mean_BLE = targets.mean
    # The floor stands for a probability that underflowed to 0; where m is 0 the logarithm counts nothing.
    log_BLE = routing_BLE.clamp_min(torch.finfo(routing_BLE.dtype).tiny).log()
    kl_B = (torch.xlogy(mean_BLE, mean_BLE) - mean_BLE * log_BLE).sum((1, 2))
    return torch.where(targets.present, kl_B, 0).sum()


DISTANCES: Mapping[DistanceName, Callable[[Tensor, NeighborTargets], Tensor]] = {
    "squared": manifold_loss,
    "kl": manifold_kl,
}
