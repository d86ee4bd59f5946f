"""What tuning did to the routing, as numbers: entropy, load, divergence and overlap with the base, and clusters.

Distributions are routing rows r over ALL experts; logarithms are natural (nats). Where a family's selection is not the
top-k of r (sigmoid scores with a bias, grouped routing), pass the selection that the model made.

Shapes: N questions, L layers, E experts, K selected experts, C a feature width, P pairs of questions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from roma_ray.errors import ConfigError
from roma_ray.manifold.neighbors import Neighborhoods

_TINY = torch.finfo(torch.float64).tiny
_BLOCK_DISTANCES = 2**24


def top_k_selection(routing_NLE: Tensor, top_k: int) -> Tensor:
    """The k most probable experts of each row: [N, L, K] int64, ties to the lower expert number."""
    return routing_NLE.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]


def routing_entropy(routing_NLE: Tensor) -> Tensor:
    """Mean entropy of the routing rows of each layer: [L] fp64, nats, between 0 and log E."""
    return torch.special.entr(routing_NLE.double()).sum(-1).mean(0)


def expert_load(selected_NLK: Tensor, num_experts: int) -> Tensor:
    """Fraction of each layer's selections that each expert gets: [L, E] fp64, rows sum to 1."""
    one_hot_LE = torch.stack(
        [torch.bincount(layer.reshape(-1), minlength=num_experts) for layer in selected_NLK.unbind(1)]
    )
    return one_hot_LE.double() / (selected_NLK.shape[0] * selected_NLK.shape[2])


def load_percentiles(load_LE: Tensor, percents: Sequence[float]) -> Tensor:
    """Percentiles of each layer's loads over its experts, interpolated linearly: [P, L] fp64."""
    return torch.quantile(load_LE, torch.tensor(percents, dtype=torch.float64) / 100, dim=-1)


def routing_kl(tuned_NLE: Tensor, base_NLE: Tensor) -> Tensor:
    """Mean KL(tuned || base) of each layer: [L] fp64, nats, at least 0 up to rounding.

    A base probability that underflowed to zero counts as the smallest fp64 number, so that the mean stays finite.
    """
    tuned_NLE, base_NLE = tuned_NLE.double(), base_NLE.double()
    log_ratio = tuned_NLE.clamp_min(_TINY).log() - base_NLE.clamp_min(_TINY).log()
    return (tuned_NLE * log_ratio).sum(-1).mean(0)


def selection_overlap(tuned_NLK: Tensor, base_NLK: Tensor) -> Tensor:
    """Mean fraction of selected experts that tuned and base routing share, of each layer: [L] fp64, in [0, 1]."""
    return (tuned_NLK.unsqueeze(-1) == base_NLK.unsqueeze(-2)).any(-1).double().mean((0, 2))


@dataclass(frozen=True)
class NeighborOverlap:
    """Agreement of the k-nearest sets of two spaces over the same questions; `chance` is the recall of random sets."""

    jaccard: float
    recall: float
    chance: float


def neighbor_overlap(a_NC: Tensor, b_NC: Tensor, k: int, groups: Sequence[str] | None = None) -> NeighborOverlap:
    """How far two feature spaces (embeddings and flat routing rows, say) agree on the k nearest questions.

    Euclidean distance in both spaces; scale embeddings to length 1 first. A question is not its own neighbor, nor is
    one of the same group (equal text). Questions with fewer than k others are left out; ConfigError if all are.
    """
    assert len(a_NC) == len(b_NC), "both spaces must hold the same questions"
    seen: dict[str, int] = {}
    names = [str(row) for row in range(len(a_NC))] if groups is None else groups
    group_N = torch.tensor([seen.setdefault(name, len(seen)) for name in names])
    others_N = len(group_N) - torch.bincount(group_N)[group_N]
    usable_N = others_N >= k
    if k < 1 or not usable_N.any():
        raise ConfigError(f"neighbor overlap needs k >= 1 and more than {k} questions of different text")
    near_a, near_b = (_nearest(space.flatten(1), k, group_N)[usable_N] for space in (a_NC, b_NC))
    shared_N = (near_a.unsqueeze(2) == near_b.unsqueeze(1)).any(2).sum(1).double()
    return NeighborOverlap(
        jaccard=float((shared_N / (2 * k - shared_N)).mean()),
        recall=float((shared_N / k).mean()),
        chance=float((k / others_N[usable_N].double()).mean()),
    )


def _nearest(features_NC: Tensor, k: int, group_N: Tensor) -> Tensor:
    """Row numbers of the k nearest rows of another group: [N, k], ties to the lower row number."""
    features_NC = features_NC.double()
    found = []
    for rows_B in torch.arange(len(features_NC)).split(max(1, _BLOCK_DISTANCES // len(features_NC))):
        distance_BN = torch.cdist(features_NC[rows_B], features_NC, compute_mode="donot_use_mm_for_euclid_dist")
        distance_BN[group_N[rows_B, None] == group_N] = float("inf")
        found.append(distance_BN.sort(dim=1, stable=True).indices[:, :k])
    return torch.cat(found)


def silhouette(
    features_NC: Tensor, tasks: Sequence[str], generator: torch.Generator, max_rows: int = 2000
) -> float | None:
    """Mean silhouette of the tasks' clusters, Euclidean, in [-1, 1], on at most `max_rows` rows drawn by `generator`.

    None where it is not defined: fewer than two tasks, or no task with two rows, among the rows drawn.
    """
    from sklearn.metrics import silhouette_score

    drawn = torch.randperm(len(features_NC), generator=generator)[:max_rows].sort().values
    labels = [tasks[row] for row in drawn.tolist()]
    if not 2 <= len(set(labels)) < len(labels):
        return None
    return float(silhouette_score(features_NC[drawn].flatten(1).double().cpu().numpy(), labels, metric="euclidean"))


def neighbor_distances(
    live_BLE: Tensor, rows_B: Sequence[int], stored_NLE: Tensor, neighborhoods: Neighborhoods
) -> Tensor:
    """Eq. 7 of each question of `rows_B`, literally: sum_j W_ij ||r_i - r_j||^2 of live r_i and stored r_j, [B] fp64."""
    found = torch.zeros(len(rows_B), dtype=torch.float64)
    for n, row in enumerate(rows_B):
        others, _, weights = neighborhoods.of(row)
        found[n] = (live_BLE[n].double() - stored_NLE[others].double()).square().sum((1, 2)) @ weights.double()
    return found


def with_random_members(neighborhoods: Neighborhoods, successful_N: Tensor, generator: Generator) -> Neighborhoods:
    """The control: each neighbor replaced by a member of S drawn at random, never the question itself; weights stay."""
    members_M = successful_N.nonzero()[:, 0]
    drawn_P = torch.randint(len(members_M), (len(neighborhoods.indices),), generator=generator)
    itself_P = members_M[drawn_P] == neighborhoods.rows
    return replace(neighborhoods, indices=members_M[(drawn_P + itself_P) % len(members_M)])
