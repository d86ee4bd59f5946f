"""What every run prints of its neighborhoods: quantiles of size and similarity, and how many are empty."""

from __future__ import annotations

from dataclasses import dataclass

from roma_ray.manifold.neighbors import Neighborhoods
from roma_ray.manifold.quantiles import QUANTILES, quantiles


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
