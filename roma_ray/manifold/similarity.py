"""Similarity of task embeddings (eq. 5) and the normalised adjacency made from it (eq. 6).

Embeddings are compared after scaling to length 1, where ||a - b||^2 = 2 - 2 cos(a, b): the Gaussian of eq. 5 and the
cosine then order neighbors alike and differ only in the epsilon-ball and in the weights.

Shapes: N rows, C embedding width, P (row, neighbor) pairs, B a batch of rows, N1 = N + 1 offsets.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from roma_ray.errors import ConfigError, EmbeddingError

SimilarityName = Literal["gaussian", "cosine"]

# Their vectors in fp64, 3 MB at 384 numbers, stay in a core's cache: four times faster than 100 MB.
_PAIRS_AT_ONCE = 2**10
# Of what is done for each pair or question in several steps.
_BLOCK = 2**20


def check_similarity(similarity: str, sigma: float) -> None:
    """Raise ConfigError for an unknown similarity, or a Gaussian whose width is not positive and finite."""
    if similarity not in get_args(SimilarityName):
        raise ConfigError(f"similarity {similarity!r} is not one of: {', '.join(get_args(SimilarityName))}")
    if similarity == "gaussian" and not 0 < sigma < float("inf"):
        raise ConfigError(f"sigma must be a positive number for the gaussian similarity (eq. 5), not {sigma}")


def gaussian_similarity(squared_distances: Tensor, sigma: float) -> Tensor:
    """Eq. 5, exp(-||a - b||^2 / (2 sigma^2)), elementwise: fp64 in [0, 1]; ConfigError unless sigma > 0."""
    check_similarity("gaussian", sigma)
    return torch.exp(squared_distances.double() / (-2 * sigma**2))


def similarity_of_cosines(cosines: Tensor, similarity: SimilarityName, sigma: float) -> Tensor:
    """The named similarity of unit vectors from their cosines, elementwise, fp64 (eq. 5 for `gaussian`)."""
    check_similarity(similarity, sigma)
    return gaussian_similarity(2 - 2 * cosines.double(), sigma) if similarity == "gaussian" else cosines.double()


def cosine_at(epsilon: float, similarity: SimilarityName, sigma: float) -> float:
    """The cosine at which the named similarity of unit vectors equals epsilon (the inverse of eq. 5)."""
    check_similarity(similarity, sigma)
    return (
        1 + sigma**2 * float(torch.tensor(epsilon, dtype=torch.float64).log()) if similarity == "gaussian" else epsilon
    )


def adjacency_weights(cosines_P: Tensor, sizes_N: Tensor, similarity: SimilarityName, sigma: float) -> Tensor:
    """Eq. 6: weights [P], fp64, that sum to 1 over each non-empty neighborhood; neighborhood i owns sizes_N[i] pairs.

    Eq. 6 presumes similarities that are not negative. The cosine of far neighbors (the random control) can be: it then
    weighs 0, and a neighborhood without any positive similarity gets equal weights. The Gaussian is taken relative to
    the nearest neighbor of each neighborhood, which cancels in eq. 6 and keeps a narrow sigma from dividing 0 by 0.
    """
    weights_P = torch.empty(len(cosines_P), dtype=torch.float64)
    # Block by block: the steps between would be the largest things in memory.
    start = 0
    for sizes_B in sizes_N.split(_BLOCK):
        stop = start + int(sizes_B.sum())
        weights_P[start:stop] = _weights(cosines_P[start:stop], sizes_B, similarity, sigma)
        start = stop
    return weights_P


def _weights(cosines_P: Tensor, sizes_N: Tensor, similarity: SimilarityName, sigma: float) -> Tensor:
    owner_P = torch.arange(len(sizes_N)).repeat_interleave(sizes_N)
    if similarity == "gaussian":
        nearest_N = cosines_P.new_full((len(sizes_N),), float("-inf"))
        nearest_N.scatter_reduce_(0, owner_P, cosines_P, "amax")
        similarity_P = gaussian_similarity(2 * (nearest_N[owner_P] - cosines_P), sigma)
    else:
        similarity_P = similarity_of_cosines(cosines_P, similarity, sigma).clamp_min(0)
    total_P = similarity_P.new_zeros(len(sizes_N)).index_add_(0, owner_P, similarity_P)[owner_P]
    return torch.where(total_P > 0, similarity_P / total_P, 1 / sizes_N.double()[owner_P])


class UnitRows:
    """Embedding rows scaled to length 1 on demand in fp64, so that no fp64 copy of the whole table is held.

    Raises EmbeddingError for rows that have no direction (zero, infinite or NaN).
    """

    def __init__(self, embeddings_NC: Tensor, norm_N: Tensor | None = None) -> None:
        """`norm_N`: the rows' lengths, fp64, where another has found them already."""
        assert embeddings_NC.ndim == 2, f"embeddings must be [N, C], not {tuple(embeddings_NC.shape)}"
        self.table_NC = embeddings_NC.detach().cpu()
        if norm_N is not None:
            self.norm_N = norm_N
            return
        # Put in place, here and below: results that lie between what is freed again would keep the heap growing.
        self.norm_N = torch.empty(len(self.table_NC), dtype=torch.float64)
        for part_BC, norm_B in zip(self.table_NC.split(_PAIRS_AT_ONCE), self.norm_N.split(_PAIRS_AT_ONCE), strict=True):
            norm_B.copy_(part_BC.double().norm(dim=1))
        bad_N = ~(torch.isfinite(self.norm_N) & (self.norm_N > 0))
        if bad_N.any():
            rows = bad_N.nonzero()[:5, 0].tolist()
            raise EmbeddingError(
                f"{int(bad_N.sum())} of {len(bad_N)} embeddings are zero or not finite (rows {rows} among them): "
                "check the embedding model and the texts, then embed again"
            )

    def take(self, rows_B: Tensor) -> Tensor:
        """Unit rows [B, C], fp64."""
        return self.table_NC[rows_B].double().div_(self.norm_N[rows_B, None])

    def cosines(self, rows_P: Tensor, others_P: Tensor) -> Tensor:
        """Cosine of each pair of rows [P], fp64, at most 1; its bits do not depend on the other pairs of the call."""
        cosine_P = torch.empty(len(rows_P), dtype=torch.float64)
        for start in range(0, len(rows_P), _PAIRS_AT_ONCE):
            part = slice(start, start + _PAIRS_AT_ONCE)
            cosine_P[part] = torch.linalg.vecdot(self.take(rows_P[part]), self.take(others_P[part]))
        return cosine_P.clamp_max_(1)
