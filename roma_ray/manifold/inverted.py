"""Approximate candidate search for large S: inverted lists, a shard of S at a time, with the recall measured each time.

The exact scan costs N x M x C; from some hundred thousand successes on that is hours. Here each shard of S is divided into
lists around means, and a question is compared with the vectors of the few lists nearest to it. How many lists is not guessed:
on a sample of the questions the answer is compared with the exact one, and the lists are doubled until enough is found.
In torch alone, so that every device, ROCm included, runs it; on a CPU the same table gives the same bits.

Shapes: N questions, M candidates (S), C width, Q queried rows, B a block of them, F candidates proposed a row, L lists,
P lists probed, T a sample of the queried rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from roma_ray.manifold.search import TorchSearch
from roma_ray.manifold.similarity import UnitRows

# Candidates whose vectors are held at once: at 384 numbers 1.6 GB, twice while they are sorted into lists.
SHARD_ROWS = 2**20
# Queried rows searched at once.
_BLOCK = 8192
_SAMPLE = 512
# The recall asked of each shard on the sample; the least that is promised of the whole is RECALL.
_AIM = 0.98
RECALL = 0.95
_ROUNDS = 5
_TRAINING_ROWS = 32


class Proposals(Protocol):
    """Candidates of each queried row and how good they are."""

    @property
    def recall(self) -> float:
        """Share of the sample's true nearest k that are among the proposed."""

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Of the queried rows start..stop - 1: scores [B, F], fp32, falling, -inf where there is no candidate; numbers, int64."""


@dataclass(frozen=True)
class Lookup:
    """What is looked for: `count` likely nearest candidates of each queried row, which hold the nearest k as a rule."""

    candidates_M: Tensor
    rows_Q: Tensor
    k: int
    count: int
    """At most M, at least k."""

    @property
    def shards(self) -> int:
        """How many parts S is searched in."""
        return -(-len(self.candidates_M) // SHARD_ROWS)

    @property
    def sample_T(self) -> Tensor:
        """The queried rows that the recall is measured on."""
        at_T = torch.linspace(0, len(self.rows_Q) - 1, min(_SAMPLE, len(self.rows_Q))).round().long().unique()
        return self.rows_Q[at_T]

    def recall(self, samples: Sequence[Sample]) -> float:
        """The share of the sample's nearest k that were found, from what each shard says of it, in their order."""
        true_TF = found_TF = torch.empty(len(self.sample_T), 0)
        true_picks_TF = picks_TF = torch.empty(len(self.sample_T), 0, dtype=torch.int64)
        for one in samples:
            true_TF, true_picks_TF = merged(true_TF, true_picks_TF, one.true_TK, one.true_picks_TK, self.k)
            found_TF, picks_TF = merged(found_TF, picks_TF, one.found_TF, one.picks_TF, self.count)
        return share_found(true_picks_TF, picks_TF, self.others(true_picks_TF))

    def others(self, picks_TK: Tensor) -> Tensor:
        """Which of the sample's candidates are not the question itself: it always finds itself, which must not count as found."""
        return self.candidates_M[picks_TK] != self.sample_T[:, None]


@dataclass(frozen=True)
class Sample:
    """What one shard holds for the sample and what its lists find of it."""

    true_TK: Tensor
    true_picks_TK: Tensor
    found_TF: Tensor
    picks_TF: Tensor


class Shard:
    """One part of S in lists, of which as many are looked into as the sample needs. Memory: its vectors, twice while they are sorted."""

    def __init__(self, unit: UnitRows, wanted: Lookup, number: int, device: torch.device) -> None:
        self.unit, self.wanted, self.first = unit, wanted, number * SHARD_ROWS
        vectors_MC = _taken(unit, wanted.candidates_M[self.first : self.first + SHARD_ROWS]).to(device)
        sample_TC = unit.take(wanted.sample_T).float()
        near_TK, near_picks_TK = TorchSearch(vectors_MC, device).top(sample_TC, min(wanted.k, len(vectors_MC)))
        self.lists = InvertedLists(vectors_MC)
        counted_TK = wanted.others(near_picks_TK + self.first)
        self.probes, found_TF, picks_TF = self.lists.tuned(sample_TC, near_picks_TK, wanted.count, counted_TK)
        self.sample = Sample(near_TK, near_picks_TK + self.first, found_TF, picks_TF + self.first)

    def top(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Scores and numbers [B, F] of this shard's candidates for the queried rows start..stop - 1."""
        parts = [
            self.lists.top(self.unit.take(rows_B).float(), self.wanted.count, self.probes)
            for rows_B in self.wanted.rows_Q[start:stop].split(_BLOCK)
        ]
        return torch.cat([scores for scores, _ in parts]), torch.cat([picks for _, picks in parts]) + self.first


@dataclass(frozen=True)
class ProposalsInMemory:
    """Proposals in memory."""

    scores_QF: Tensor
    picks_QF: Tensor
    recall: float

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self.scores_QF[start:stop], self.picks_QF[start:stop]


Propose = Callable[[UnitRows, Lookup, torch.device], Proposals]
"""Looks for what is wanted somewhere."""


def propose(unit: UnitRows, wanted: Lookup, device: torch.device) -> Proposals:
    """Search one shard after another. Memory: one shard's vectors, twice while they are sorted, and Q x count x 12 bytes."""
    scores_QF = torch.full((len(wanted.rows_Q), wanted.count), float("-inf"))
    picks_QF = torch.zeros(len(wanted.rows_Q), wanted.count, dtype=torch.int64)
    samples = []
    for number in range(wanted.shards):
        shard = Shard(unit, wanted, number, device)
        samples.append(shard.sample)
        for start in range(0, len(wanted.rows_Q), _BLOCK):
            part = slice(start, min(start + _BLOCK, len(wanted.rows_Q)))
            found = shard.top(part.start, part.stop)
            scores_QF[part], picks_QF[part] = merged(scores_QF[part], picks_QF[part], *found, wanted.count)
        # Before the next shard is read: one shard's vectors at a time.
        del shard
    return ProposalsInMemory(scores_QF, picks_QF, wanted.recall(samples))


def _taken(unit: UnitRows, rows_M: Tensor) -> Tensor:
    """Unit vectors of some rows [M, C] in fp32, block by block."""
    vectors_MC = torch.empty(len(rows_M), unit.table_NC.shape[1])
    for at_B in torch.arange(len(rows_M)).split(_BLOCK):
        vectors_MC[at_B] = unit.take(rows_M[at_B]).float()
    return vectors_MC


def share_found(wanted_TK: Tensor, picks_TF: Tensor, counted_TK: Tensor) -> float:
    """The part of the wanted candidates that count which are among the picks, row by row."""
    found_TK = (wanted_TK[:, :, None] == picks_TF[:, None, :]).any(2)
    return float(found_TK[counted_TK].double().mean()) if bool(counted_TK.any()) else 1.0


def merged(a_BF: Tensor, a_picks_BF: Tensor, b_BF: Tensor, b_picks_BF: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best `count` of two answers."""
    scores, picks = torch.cat([a_BF, b_BF], 1), torch.cat([a_picks_BF, b_picks_BF], 1)
    best, order = scores.topk(min(count, scores.shape[1]), dim=1)
    return best, picks.gather(1, order)


class InvertedLists:
    """One shard's vectors in lists around means."""

    def __init__(self, vectors_MC: Tensor) -> None:
        rows = len(vectors_MC)
        self.means_LC = _means(vectors_MC, max(1, round(2 * rows**0.5)))
        list_M = torch.cat([(part @ self.means_LC.T).argmax(1) for part in vectors_MC.split(_BLOCK)])
        self.order_M = list_M.argsort(stable=True)
        sizes_L = torch.bincount(list_M, minlength=len(self.means_LC))
        self.starts = [0, *sizes_L.cumsum(0).tolist()]
        self.vectors_MC = vectors_MC[self.order_M]
        self.order_M = self.order_M.cpu()

    def tuned(
        self, queries_TC: Tensor, wanted_TK: Tensor, count: int, counted_TK: Tensor
    ) -> tuple[int, Tensor, Tensor]:
        """The least power of two of lists that finds the wanted candidates that count often enough, and what it finds (as `top`).

        All lists find all.
        """
        probes = 1
        while True:
            scores_TF, picks_TF = self.top(queries_TC, count, probes)
            if probes >= len(self.means_LC) or share_found(wanted_TK, picks_TF, counted_TK) >= _AIM:
                return min(probes, len(self.means_LC)), scores_TF, picks_TF
            probes *= 2

    def top(self, queries_BC: Tensor, count: int, probes: int) -> tuple[Tensor, Tensor]:
        """Scores [B, F], falling, and numbers within the shard of the best candidates in the `probes` nearest lists."""
        queries_BC = queries_BC.to(self.vectors_MC)
        probes = min(probes, len(self.means_LC))
        near_BP = (queries_BC @ self.means_LC.T).topk(probes, dim=1).indices
        # By list, so that each list's vectors meet all its questions in one product.
        flat = near_BP.reshape(-1)
        by_list = flat.argsort(stable=True)
        bounds = [0, *torch.bincount(flat, minlength=len(self.means_LC)).cumsum(0).tolist()]
        scores = queries_BC.new_full((len(flat), count), float("-inf"))
        picks = torch.zeros(len(flat), count, dtype=torch.int64, device=scores.device)
        for number, (low, high) in enumerate(pairwise(bounds)):
            start, stop = self.starts[number], self.starts[number + 1]
            if low == high or start == stop:
                continue
            here = by_list[low:high]
            products = queries_BC[here // probes] @ self.vectors_MC[start:stop].T
            best, at = products.topk(min(count, stop - start), dim=1)
            scores[here, : best.shape[1]] = best
            picks[here, : best.shape[1]] = at + start
        best_BF, order_BF = scores.view(len(queries_BC), -1).topk(count, dim=1)
        found_BF = picks.view(len(queries_BC), -1).gather(1, order_BF)
        return best_BF.cpu(), self.order_M[found_BF.cpu()]


def _means(vectors_MC: Tensor, lists: int) -> Tensor:
    """Unit means of `lists` clusters by a few rounds of spherical k-means over evenly spaced rows [L, C]."""
    rows = min(len(vectors_MC), _TRAINING_ROWS * lists)
    at = torch.linspace(0, len(vectors_MC) - 1, rows, dtype=torch.float64).round().long().to(vectors_MC.device)
    sample_RC = vectors_MC[at]
    means_LC = sample_RC[:: max(1, rows // lists)][:lists].clone()
    for _ in range(_ROUNDS):
        nearest_R = torch.cat([(part @ means_LC.T).argmax(1) for part in sample_RC.split(_BLOCK)])
        sums_LC = torch.zeros_like(means_LC).index_add_(0, nearest_R, sample_RC)
        norms_L = sums_LC.norm(dim=1)
        # A mean that no row is nearest to stays where it is.
        kept = norms_L > 0
        means_LC[kept] = sums_LC[kept] / norms_L[kept, None]
    return means_LC


class ShardedSearch:
    """The exact scan without a copy of all candidates: a shard's vectors at a time. As `search.CandidateSearch`."""

    def __init__(self, unit: UnitRows, candidates_M: Tensor, device: torch.device) -> None:
        self.unit, self.candidates_M, self.device = unit, candidates_M, device

    def _shards(self) -> list[tuple[int, Tensor]]:
        return [(n, self.candidates_M[n : n + SHARD_ROWS]) for n in range(0, len(self.candidates_M), SHARD_ROWS)]

    def _open(self, rows_M: Tensor) -> TorchSearch:
        return TorchSearch(_taken(self.unit, rows_M), self.device)

    def top(self, queries_BC: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` best candidates of each query."""
        best_BF, picks_BF = torch.empty(len(queries_BC), 0), torch.empty(len(queries_BC), 0, dtype=torch.int64)
        for first, rows_M in self._shards():
            near_BF, near_picks_BF = self._open(rows_M).top(queries_BC, min(count, len(rows_M)))
            best_BF, picks_BF = merged(best_BF, picks_BF, near_BF, near_picks_BF + first, count)
        return best_BF, picks_BF

    def above(self, queries_BC: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """All pairs that score at least the threshold."""
        parts = []
        for first, rows_M in self._shards():
            rows_P, picks_P, scores_P = self._open(rows_M).above(queries_BC, threshold)
            parts.append((rows_P, picks_P + first, scores_P))
        rows, picks, scores = (torch.cat(column) for column in zip(*parts, strict=True))
        return rows, picks, scores
