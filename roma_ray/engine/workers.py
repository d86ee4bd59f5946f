"""The workers of one training run, as its loop sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class World(Protocol):
    """The workers of one training run."""

    @property
    def rank(self) -> int:
        """This worker's number, from 0."""

    @property
    def size(self) -> int:
        """How many workers there are."""

    def gather(self, mine: list[Tensor], total: int) -> list[Tensor]:
        """All workers' micro-batch results in plan order; worker r holds the micro-batches r, r + size, ..."""


@dataclass(frozen=True)
class Alone:
    """A world of one worker."""

    rank: int = 0
    size: int = 1

    def gather(self, mine: list[Tensor], total: int) -> list[Tensor]:
        assert len(mine) == total
        return mine


ALONE = Alone()
