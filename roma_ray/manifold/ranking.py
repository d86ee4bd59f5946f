"""Exact ranking of neighbor candidates: an fp32 index proposes, fp64 decides.

More candidates are fetched until no question left out can belong inside, given the error that fp32 can make. So the
answer does not depend on the backend, the block size or the order of the table. All pairs are re-scored on the CPU,
where the bits of a pair do not depend on the other pairs scored with it.

Shapes: N questions, M candidates (S), C embedding width, P (question, candidate) pairs, Q queried rows, B a block of
them, F candidates fetched a row, G groups of equal text.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from roma_ray.errors import NeighborError
from roma_ray.manifold import inverted
from roma_ray.manifold.search import BackendName, CandidateSearch, open_search, resolve_backend
from roma_ray.manifold.similarity import SimilarityName, UnitRows, cosine_at, similarity_of_cosines

# Candidates fetched beyond k at first: covers the question itself and a few equal texts without a second search.
_SLACK = 8
# Pairs re-ranked at once; bounds memory where a search must be widened far.
_PAIRS_AT_ONCE = 2**21
_BALL_PAIRS = 2**25
# 24 bytes each: 4.8 GB. An epsilon-ball that holds more is no neighborhood any more.
MAX_PAIRS = 200_000_000


@dataclass
class Pairs:
    """Pairs (question, candidate) with the fp64 cosine of each."""

    rows: Tensor
    others: Tensor
    cosines: Tensor

    def __getitem__(self, chosen: Tensor) -> "Pairs":
        return Pairs(self.rows[chosen], self.others[chosen], self.cosines[chosen])

    @staticmethod
    def joined(parts: "Sequence[Pairs]") -> "Pairs":
        none = torch.zeros(0, dtype=torch.int64)
        return Pairs(
            torch.cat([none, *(part.rows for part in parts)]),
            torch.cat([none, *(part.others for part in parts)]),
            torch.cat([none.double(), *(part.cosines for part in parts)]),
        )


class GatheredPairs:
    """Pairs put one after another into room for at most so many: a list of pieces would be held beside what is made of them."""

    def __init__(self, most: int) -> None:
        self._room = Pairs(*(torch.empty(most, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.float64)))
        self._count = 0

    def put(self, pairs: Pairs) -> None:
        """Put pairs behind the others."""
        stop = self._count + len(pairs.rows)
        for room_P, part_P in zip(vars(self._room).values(), vars(pairs).values(), strict=True):
            room_P[self._count : stop] = part_P
        self._count = stop

    def all(self) -> Pairs:
        """All that were put."""
        return Pairs(*(room_P[: self._count] for room_P in vars(self._room).values()))


class QuestionTable:
    """The question table with an index over S; candidates are numbered in the order of their ids."""

    def __init__(
        self,
        embeddings_NC: Tensor,
        successful_N: Tensor,
        ids: Sequence[str] | Tensor,
        text_keys: Sequence[str] | Tensor,
        backend: BackendName,
        device: str | torch.device | None,
        propose: inverted.Propose = inverted.propose,
    ) -> None:
        self.unit = UnitRows(embeddings_NC)
        self.propose = propose
        by_id_N = (
            ids.argsort() if isinstance(ids, Tensor) else torch.tensor(sorted(range(len(ids)), key=ids.__getitem__))
        )
        self.id_rank_N = torch.empty_like(by_id_N).scatter_(0, by_id_N, torch.arange(len(ids)))
        self.candidates_M = by_id_N[successful_N[by_id_N]]
        self.group_N = text_keys if isinstance(text_keys, Tensor) else _numbered(text_keys)
        # How many candidates may be neighbors of a question: all but those with its own text.
        equal_G = torch.bincount(self.group_N[self.candidates_M], minlength=int(self.group_N.max()) + 1)
        self.eligible_N = len(self.candidates_M) - equal_G[self.group_N]
        self.place = (backend, device)
        # Bound of the error of an fp32 inner product of two unit vectors of C numbers, input rounding included.
        self.margin = (embeddings_NC.shape[1] + 8) * 2.0**-23

    @cached_property
    def search(self) -> CandidateSearch:
        """The index over S, made when first asked: neighbors that are drawn need none."""
        if len(self.candidates_M) > inverted.SHARD_ROWS:
            return inverted.ShardedSearch(self.unit, self.candidates_M, resolve_backend(*self.place)[1])
        unit_MC = torch.cat([self.unit.take(part).float() for part in self.candidates_M.split(8192)])
        return open_search(unit_MC, *self.place)

    def ranked(self, pairs: Pairs) -> Pairs:
        """Pairs by row, then falling cosine, then id."""
        order = self.id_rank_N[pairs.others].argsort(stable=True)
        order = order[pairs.cosines[order].argsort(descending=True, stable=True)]
        return pairs[order[pairs.rows[order].argsort(stable=True)]]

    def checked(self, rows_P: Tensor, picks_P: Tensor, scores_P: Tensor) -> Pairs:
        """Re-score pairs in fp64 and drop equal texts (the question itself among them); widens the error margin."""
        pairs = Pairs(rows_P, self.candidates_M[picks_P], self.unit.cosines(rows_P, self.candidates_M[picks_P]))
        if len(rows_P):
            # Reduced-precision products (TF32 on some GPUs) err by more than fp32's bound: believe what is seen.
            seen = float((pairs.cosines - scores_P.double()).abs().max())
            self.margin = max(self.margin, 4 * seen)
        return pairs[self.group_N[pairs.rows] != self.group_N[pairs.others]]

    def near(self, rows_Q: Tensor, k: int, batch_rows: int, exact_up_to: int) -> tuple[Pairs, float]:
        """Eq. 3, exact up to so many candidates, else by inverted lists; with the recall."""
        if len(self.candidates_M) > exact_up_to:
            return self.likely(rows_Q, k, batch_rows)
        return self.nearest(rows_Q, k, batch_rows), 1.0

    def likely(self, rows_Q: Tensor, k: int, batch_rows: int) -> tuple[Pairs, float]:
        """Eq. 3 by inverted lists: k candidates of each row, nearly always the most similar ones, and the measured recall.

        Rows whose proposals are used up by equal texts are searched exactly; so are all where the recall falls short.
        """
        device = resolve_backend(*self.place)[1]
        wanted = inverted.Lookup(self.candidates_M, rows_Q, k + 1, min(k + _SLACK, len(self.candidates_M)))
        found = self.propose(self.unit, wanted, device)
        if found.recall < inverted.RECALL:
            return self.nearest(rows_Q, k, batch_rows), 1.0
        done = GatheredPairs(len(rows_Q) * k)
        for start in range(0, len(rows_Q), batch_rows):
            rows_B = rows_Q[start : start + batch_rows]
            pairs, _, lacking_B = self._best(rows_B, k, *found.part(start, start + len(rows_B)))
            pairs = pairs[~lacking_B[torch.searchsorted(rows_B, pairs.rows)]]
            if lacking_B.any():
                pairs = self.ranked(Pairs.joined([pairs, self.nearest(rows_B[lacking_B], k, batch_rows)]))
            done.put(pairs)
        return done.all(), found.recall

    def nearest(self, rows_Q: Tensor, k: int, batch_rows: int) -> Pairs:
        """Eq. 3: the k most similar candidates of each row, fewer only where S has no more."""
        found: list[Pairs] = []
        for block_B in rows_Q.split(batch_rows):
            pending_B, count = block_B, k + _SLACK
            done: list[Pairs] = []
            while len(pending_B):
                count = min(count, len(self.candidates_M))
                left: list[Tensor] = []
                for part_B in pending_B.split(max(1, _PAIRS_AT_ONCE // count)):
                    pairs, unsure_B = self._top(part_B, k, count)
                    done.append(pairs)
                    left.append(part_B[unsure_B])
                pending_B, count = torch.cat(left), 4 * count
            found.append(self.ranked(Pairs.joined(done)))
        return Pairs.joined(found)

    def _top(self, rows_B: Tensor, k: int, count: int) -> tuple[Pairs, Tensor]:
        """Best k pairs of the rows that `count` candidates settle, and a mask [B] of the rows that need more."""
        scores_BF, picks_BF = self.search.top(self.unit.take(rows_B).float(), count)
        best, sizes_B, lacking_B = self._best(rows_B, k, scores_BF, picks_BF)
        # The worst of the best k must beat, beyond the error of fp32, every candidate that was not returned.
        worst_B = torch.full((len(rows_B),), float("inf"), dtype=torch.float64)
        worst_B.scatter_reduce_(0, torch.searchsorted(rows_B, best.rows), best.cosines, "amin")
        unsure_B = lacking_B | (worst_B <= scores_BF[:, -1].double() + self.margin)
        unsure_B &= (sizes_B < self.eligible_N[rows_B]) & (count < len(self.candidates_M))
        return best[~unsure_B[torch.searchsorted(rows_B, best.rows)]], unsure_B

    def _best(self, rows_B: Tensor, k: int, scores_BF: Tensor, picks_BF: Tensor) -> tuple[Pairs, Tensor, Tensor]:
        """Of the candidates found for each row the best k that may be neighbors; how many may be, and who has fewer than k."""
        real_P = scores_BF.reshape(-1) > float("-inf")
        rows_P = rows_B.repeat_interleave(scores_BF.shape[1])[real_P]
        pairs = self.ranked(self.checked(rows_P, picks_BF.reshape(-1)[real_P], scores_BF.reshape(-1)[real_P]))
        at_P = torch.searchsorted(rows_B, pairs.rows)
        sizes_B = torch.bincount(at_P, minlength=len(rows_B))
        place_P = torch.arange(len(at_P)) - (sizes_B.cumsum(0) - sizes_B)[at_P]
        return pairs[place_P < k], sizes_B, sizes_B < self.eligible_N[rows_B].clamp_max(k)

    def within(self, rows_Q: Tensor, epsilon: float, similarity: SimilarityName, sigma: float, rows: int) -> Pairs:
        """Eq. 4: all candidates whose similarity is at least epsilon."""
        found: list[Pairs] = []
        total = 0
        threshold = cosine_at(epsilon, similarity, sigma)
        # Few enough rows at a time that even a ball of all candidates fits.
        rows = max(1, min(rows, _BALL_PAIRS // len(self.candidates_M)))
        for block_B in rows_Q.split(rows):
            queries_BC = self.unit.take(block_B).float()
            margin = 0.0
            while margin < self.margin:
                # A margin found too small by what came back is searched again with the larger one.
                margin = self.margin
                at_P, picks_P, scores_P = self.search.above(queries_BC, threshold - margin)
                pairs = self.checked(block_B[at_P], picks_P, scores_P)
            pairs = pairs[similarity_of_cosines(pairs.cosines, similarity, sigma) >= epsilon]
            total += len(pairs.rows)
            if total > MAX_PAIRS:
                raise NeighborError(_too_many(epsilon))
            found.append(self.ranked(pairs))
        return Pairs.joined(found)

    def drawn(self, rows_Q: Tensor, k: int, seed: int, ids: Sequence[str], tasks: Sequence[str] | None = None) -> Pairs:
        """The controls: k candidates of each row, uniform without replacement, a function of (seed, id) and S alone.

        With `tasks` (a name a question) only of the row's own task.
        """
        names = ["" for _ in ids] if tasks is None else tasks
        members: dict[str, list[int]] = {}
        for pick, row in enumerate(self.candidates_M.tolist()):
            members.setdefault(names[row], []).append(pick)
        pools = {
            name: _Pool(own, self.group_N[self.candidates_M[torch.tensor(own)]].tolist())
            for name, own in members.items()
        }
        nobody = _Pool([], [])
        picks = [
            pools.get(names[row], nobody).draw(
                k, int(self.group_N[row]), torch.Generator().manual_seed(row_key(seed, ids[row]))
            )
            for row in rows_Q.tolist()
        ]
        rows_P = rows_Q.repeat_interleave(torch.tensor([len(own) for own in picks], dtype=torch.int64))
        others_P = self.candidates_M[torch.tensor([pick for own in picks for pick in own], dtype=torch.int64)]
        return self.ranked(Pairs(rows_P, others_P, self.unit.cosines(rows_P, others_P)))


def _numbered(keys: Sequence[str]) -> Tensor:
    """A number for each key, equal where the keys are."""
    seen: dict[str, int] = {}
    return torch.tensor([seen.setdefault(key, len(seen)) for key in keys])


def row_key(seed: int, row_id: str) -> int:
    """A number below 2^63 of a question and a seed: what it draws with, or its place in a random order."""
    digest = hashlib.blake2b(f"{seed}\0{row_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class _Pool:
    """Candidates to draw from: their numbers, and the group of equal texts that each belongs to."""

    def __init__(self, picks: list[int], groups: list[int]) -> None:
        self.picks, self.groups, self.sizes = picks, groups, Counter(groups)

    def draw(self, k: int, own: int, generator: torch.Generator) -> list[int]:
        """Up to k distinct candidate numbers, uniform among those of another text than group `own`."""
        groups, eligible = self.groups, len(self.groups) - self.sizes[own]
        if eligible <= 4 * k or eligible < len(groups) // 4:
            allowed = [place for place, group in enumerate(groups) if group != own]
            chosen = [allowed[at] for at in torch.randperm(len(allowed), generator=generator)[:k].tolist()]
        else:
            chosen = []
            while len(chosen) < k:
                # Skipping refused draws leaves the rest uniform; here about a fifth of all draws or more is accepted.
                for place in torch.randint(len(groups), (2 * k,), generator=generator).tolist():
                    if groups[place] != own and place not in chosen and len(chosen) < k:
                        chosen.append(place)
        return [self.picks[place] for place in chosen]


def _too_many(epsilon: float) -> str:
    return f"the epsilon-balls hold more than {MAX_PAIRS:,} pairs: raise epsilon above {epsilon:g}, or use method `knn`"
