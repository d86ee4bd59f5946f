"""Successful neighborhoods N(x_i) (eq. 2-4, 6): k-nearest, epsilon-ball, and the controls.

Controls: `random` draws from S, `task` from the same task's S, `shuffled` gives each question another one's neighborhood, `self`
the question's own stored routing. Rules for all others: neighbors come from S, the training questions that the base model
answers rightly; a question is never its own neighbor, nor is one whose embedded text is equal; neighbors are listed by falling
similarity, ties by id.
The answer is the same to the bit for every backend and block size (see `ranking.py`).

Shapes: N questions, M successful ones, C embedding width, P (question, neighbor) pairs, B a block of questions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from roma_ray.config.schema import check_epsilon
from roma_ray.errors import ConfigError, NeighborError
from roma_ray.manifold import inverted
from roma_ray.manifold.quantiles import QUANTILES, quantiles
from roma_ray.manifold.ranking import QuestionTable, row_key
from roma_ray.manifold.search import BackendName
from roma_ray.manifold.similarity import (
    SimilarityName,
    adjacency_weights,
    check_similarity,
    similarity_of_cosines,
)

# What a question draws is a function of its id.
DRAWN = ("random", "task", "shuffled")
Method = Literal["knn", "epsilon", "random", "task", "shuffled", "self"]
# Questions whose scores against all successes are held at once.
BLOCK_ROWS = 2048
EXACT_UP_TO = 200_000
# Above this fraction of empty neighborhoods the manifold term trains on next to nothing: an error, not a result.
EMPTY_LIMIT = 0.9


@dataclass(frozen=True)
class Neighborhoods:
    """Ragged neighborhoods of N questions: those of question i are the slice offsets[i]:offsets[i + 1] of the rest."""

    offsets: Tensor
    """[N + 1] int64."""
    indices: Tensor
    """[P] int64, row numbers into the question table."""
    similarities: Tensor
    """[P] fp64, falling within a neighborhood (but for `shuffled`, where they follow another question's order)."""
    weights: Tensor
    """[P] fp64, eq. 6: they sum to 1 over each non-empty neighborhood."""
    queried: Tensor
    """[N] bool, the questions that neighbors were looked for; the others have none."""
    recall: float = 1.0
    """Share of the true neighbors that the search found, on a sample; 1 where it was exact."""

    def __post_init__(self) -> None:
        assert len(self.offsets) == len(self.queried) + 1
        assert int(self.offsets[-1]) == len(self.indices)
        assert len(self.indices) == len(self.similarities) == len(self.weights)

    @property
    def sizes(self) -> Tensor:
        """Neighbors of each question: [N] int64."""
        return self.offsets.diff()

    @property
    def rows(self) -> Tensor:
        """The question that each pair belongs to: [P] int64; with `indices` it lists all pairs (i, j)."""
        return torch.arange(len(self.queried)).repeat_interleave(self.sizes)

    def of(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row numbers, similarities and weights of one question's neighbors."""
        part = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return self.indices[part], self.similarities[part], self.weights[part]


def successful_set(correct_N: Tensor, training_N: Tensor) -> Tensor:
    """S of eq. 2 as a mask [N]: training questions that the base model answers rightly; NeighborError if none."""
    successful_N = correct_N & training_N
    if not successful_N.any():
        raise NeighborError(
            f"the base model answers none of the {int(training_N.sum())} training questions rightly, so there is no "
            "successful neighbor to imitate: check the prompt format, or use more or easier questions"
        )
    return successful_N


def find_neighbors(
    embeddings_NC: Tensor,
    successful_N: Tensor,
    *,
    training_N: Tensor,
    ids: Sequence[str] | Tensor,
    text_keys: Sequence[str] | Tensor,
    tasks: Sequence[str] | None = None,
    queried_N: Tensor | None = None,
    method: Method = "knn",
    k: int = 3,
    epsilon: float = 0.5,
    similarity: SimilarityName,
    sigma: float,
    seed: int = 0,
    backend: BackendName = "auto",
    device: str | torch.device | None = None,
    batch_rows: int = BLOCK_ROWS,
    exact_up_to: int = EXACT_UP_TO,
    propose: inverted.Propose = inverted.propose,
) -> Neighborhoods:
    """N(x_i) and W_ij (eq. 3, 4, 6) of the queried questions (all training questions unless given).

    Embeddings are scaled to length 1. `successful_N`, `training_N`, `queried_N` are masks; successful questions must be training
    questions. `text_keys` are the embedded texts (or numbers [N] that are equal where the texts are), `ids` are unique (or each
    id's place [N] among all, sorted, which the methods that draw do not take). `epsilon` is a similarity. `random` draws
    k of S uniformly by (seed, id) alone, whatever the order of the table, and weighs them by similarity like the others (the paper
    says nothing else); `task` does so among the successes of the question's own task (`tasks`, a name a question). `shuffled`
    deals knn's neighborhoods out anew: a derangement by (seed, ids). `self`: no search.
    `knn` is exact up to `exact_up_to` successes; with more, inverted lists find at least 95 % of the neighbors, measured, where
    `propose` searches them (in this process, unless given). Memory beyond the answer is bounded by `batch_rows`, never N x N. Raises
    ConfigError for settings out of range, EmbeddingError for embeddings without a direction, NeighborError when S is empty, holds a
    question outside the training part, over 90 % of neighborhoods are empty, they hold over 200 million pairs, or cannot be shuffled.
    """
    _check_settings(method, k, epsilon, similarity, sigma, batch_rows)
    queried_N = training_N if queried_N is None else queried_N
    _check_table(embeddings_NC, successful_N, training_N, queried_N, ids, text_keys)
    if method == "task" and (tasks is None or len(tasks) != len(ids)):
        raise ConfigError("neighbor method `task` needs `tasks`: the name of each question's task")
    if method == "self":
        return own_neighborhoods(queried_N)
    table = QuestionTable(embeddings_NC, successful_N, ids, text_keys, backend, device, propose)
    rows_Q, recall = queried_N.nonzero()[:, 0], 1.0
    if method == "epsilon":
        found = table.within(rows_Q, epsilon, similarity, sigma, batch_rows)
    elif method in ("random", "task"):
        found = table.drawn(rows_Q, k, seed, _names(ids), tasks if method == "task" else None)
    else:
        found, recall = table.near(rows_Q, k, batch_rows, exact_up_to)
    sizes_N, others_P, cosines_P = torch.bincount(found.rows, minlength=len(training_N)), found.others, found.cosines
    del found
    if (empty := int((sizes_N[rows_Q] == 0).sum())) > EMPTY_LIMIT * len(rows_Q):
        nearest = table.nearest(rows_Q[:: max(1, len(rows_Q) // 1000)], 1, batch_rows).cosines
        raise NeighborError(_mostly_empty(method, epsilon, similarity, sigma, empty, len(rows_Q), nearest))
    near = Neighborhoods(
        offsets=torch.cat([sizes_N.new_zeros(1), sizes_N.cumsum(0)]),
        indices=others_P,
        similarities=similarity_of_cosines(cosines_P, similarity, sigma),
        weights=adjacency_weights(cosines_P, sizes_N, similarity, sigma),
        queried=queried_N.clone(),
        recall=recall,
    )
    if method == "shuffled":
        near = _dealt(near, table.group_N, [row_key(seed, key) for key in _names(ids)])
        return replace(near, similarities=_own_similarities(near, table, similarity, sigma))
    return near


def own_neighborhoods(queried_N: Tensor) -> Neighborhoods:
    """Every queried question as its own single neighbor: eq. 7 then is the distance to what is stored of the question itself."""
    count = int(queried_N.sum())
    return Neighborhoods(
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), queried_N.long().cumsum(0)]),
        indices=queried_N.nonzero()[:, 0],
        similarities=torch.ones(count, dtype=torch.float64),
        weights=torch.ones(count, dtype=torch.float64),
        queried=queried_N.clone(),
    )


def _names(ids: Sequence[str] | Tensor) -> Sequence[str]:
    assert not isinstance(ids, Tensor), f"the methods {', '.join(DRAWN)} draw by the ids themselves"
    return ids


def _own_similarities(near: Neighborhoods, table: QuestionTable, similarity: SimilarityName, sigma: float) -> Tensor:
    return similarity_of_cosines(table.unit.cosines(near.rows, near.indices), similarity, sigma)


def _dealt(near: Neighborhoods, group_N: Tensor, keys: Sequence[int]) -> Neighborhoods:
    """Each queried question with the neighborhood of another text, which holds no question of its own text. NeighborError."""
    rows = near.queried.nonzero()[:, 0].tolist()
    group = group_N.tolist()
    inside = {row: set(group_N[near.of(row)[0]].tolist()) for row in rows}
    source = derangement(
        sorted(rows, key=keys.__getitem__), lambda row, other: group[row] not in {group[other], *inside[other]}
    )
    if source is None:
        raise NeighborError(
            f"the neighborhoods of {len(rows)} question(s) cannot be shuffled: nearly all of them hold the question itself "
            "or its text. Use more questions, or a smaller neighbors.k"
        )
    bounds, sizes_N = near.offsets.tolist(), torch.zeros_like(near.sizes)
    picks: list[int] = []
    for row in rows:
        own = range(bounds[source[row]], bounds[source[row] + 1])
        sizes_N[row] = len(own)
        picks += own
    pairs_P = torch.tensor(picks, dtype=torch.int64)
    return replace(
        near,
        offsets=torch.cat([sizes_N.new_zeros(1), sizes_N.cumsum(0)]),
        indices=near.indices[pairs_P],
        similarities=near.similarities[pairs_P],
        weights=near.weights[pairs_P],
    )


def derangement(order: Sequence[int], fits: Callable[[int, int], bool]) -> dict[int, int] | None:
    """Each item's image in a permutation where `fits(item, image)` holds throughout; None where it found none.

    The next item in the given order; where that does not fit, images are swapped with the first item after it that both suits.
    """
    images = [*order[1:], *order[:1]]
    for at, item in enumerate(order):
        if fits(item, images[at]):
            continue
        for step in range(1, len(order)):
            other = (at + step) % len(order)
            if fits(item, images[other]) and fits(order[other], images[at]):
                images[at], images[other] = images[other], images[at]
                break
        else:
            return None
    return dict(zip(order, images, strict=True))


def _check_settings(method: str, k: int, epsilon: float, similarity: str, sigma: float, batch_rows: int) -> None:
    if method not in get_args(Method):
        raise ConfigError(f"neighbor method {method!r} is not one of: {', '.join(get_args(Method))}")
    check_similarity(similarity, sigma)
    if k < 1 and method != "epsilon":
        raise ConfigError(f"k must be at least 1, not {k}")
    if method == "epsilon":
        check_epsilon(epsilon)
    if batch_rows < 1:
        raise ConfigError(f"batch_rows must be at least 1, not {batch_rows}")


def _check_table(
    embeddings_NC: Tensor,
    successful_N: Tensor,
    training_N: Tensor,
    queried_N: Tensor,
    ids: Sequence[str] | Tensor,
    text_keys: Sequence[str] | Tensor,
) -> None:
    lengths = {len(embeddings_NC), len(successful_N), len(training_N), len(queried_N), len(ids), len(text_keys)}
    assert len(lengths) == 1, f"columns of the question table differ in length: {sorted(lengths)}"
    assert successful_N.dtype == training_N.dtype == queried_N.dtype == torch.bool, "masks must be bool"
    distinct = len(ids.unique()) if isinstance(ids, Tensor) else len(set(ids))
    assert distinct == len(ids), "question ids must be unique"
    if not successful_N.any():
        raise NeighborError("no question is successful (eq. 2), so there is no neighbor to choose from")
    leaked_N = successful_N & ~training_N
    if leaked_N.any():
        row = int(leaked_N.nonzero()[0, 0])
        first = f"row {row}" if isinstance(ids, Tensor) else repr(ids[row])
        raise NeighborError(
            f"{int(leaked_N.sum())} successful questions are not of the training part ({first} among them): "
            "neighbors may only be training questions"
        )


def _mostly_empty(
    method: str, epsilon: float, similarity: SimilarityName, sigma: float, empty: int, queried: int, cosines_P: Tensor
) -> str:
    text = f"{empty} of {queried} neighborhoods ({empty / queried:.0%}) are empty"
    if method == "task":
        return f"{text}: their tasks have no successful question of another text; use more questions, or method `knn`"
    if method != "epsilon":
        return (
            f"{text}: nearly all successful questions have the same text as the question; use more, or other, questions"
        )
    nearest_P = similarity_of_cosines(cosines_P, similarity, sigma)
    marks = ", ".join(f"{name} {value:.3f}" for name, value in quantiles(nearest_P, QUANTILES).items())
    width = f" with sigma {sigma:g}" if similarity == "gaussian" else ""
    advice = "set epsilon below the median, or use method `knn`"
    if similarity == "gaussian":
        advice = f"set `similarity: cosine` (which the usual epsilons of .3 to .7 suit), {advice}, or widen sigma"
    return (
        f"{text}: epsilon {epsilon:g} is too high for the {similarity} similarity{width}. Quantiles of the similarity "
        f"to the nearest successful question: {marks or 'none exists'}. To repair: {advice}"
    )
