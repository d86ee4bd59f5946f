"""What every run prints of its neighborhoods: quantiles of size and similarity, and how many are empty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from roma_ray.manifold.neighbors import Neighborhoods

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
# Above this fraction of empty neighborhoods the manifold term trains on next to nothing: an error, not a result.
EMPTY_LIMIT = 0.9


@dataclass(frozen=True)
class NeighborSummary:
    """Quantiles are keyed "q0", "q5", ..., "q100"; empty where there is nothing to measure."""

    queried: int
    empty: int
    pairs: int
    sizes: dict[str, float]
    similarities: dict[str, float]
    negative_fraction: float
    """Pairs of negative similarity (cosine only), which eq. 6 weighs 0."""

    @property
    def empty_fraction(self) -> float:
        """Empty neighborhoods over queried ones."""
        return self.empty / self.queried if self.queried else 0.0


def summarise(neighborhoods: Neighborhoods) -> NeighborSummary:
    """Sizes over the queried questions (empty ones count as 0) and similarities over all pairs."""
    sizes_Q = neighborhoods.sizes[neighborhoods.queried]
    pairs = len(neighborhoods.indices)
    return NeighborSummary(
        queried=len(sizes_Q),
        empty=int((sizes_Q == 0).sum()),
        pairs=pairs,
        sizes=quantiles(sizes_Q, QUANTILES),
        similarities=quantiles(neighborhoods.similarities, QUANTILES),
        negative_fraction=float((neighborhoods.similarities < 0).double().mean()) if pairs else 0.0,
    )


def quantiles(values_P: Tensor, at: Sequence[float] = QUANTILES) -> dict[str, float]:
    """Linearly interpolated quantiles in fp64, keyed "q5" for 0.05; {} for no values.

    `torch.quantile` refuses more than 2^24 values, which an epsilon-ball easily holds.
    """
    if not len(values_P):
        return {}
    sorted_P = values_P.double().sort().values
    place = torch.tensor(at, dtype=torch.float64) * (len(sorted_P) - 1)
    low, high = sorted_P[place.floor().long()], sorted_P[place.ceil().long()]
    marks = low + (high - low) * (place - place.floor())
    return {f"q{round(100 * q)}": float(mark) for q, mark in zip(at, marks, strict=True)}
