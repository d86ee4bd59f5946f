"""Sequences whose items are made when they are asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeVar, overload

Item = TypeVar("Item")


class Decoded(Sequence[Item]):
    """A sequence that holds columns in place of its items, and makes the item that is asked for."""

    @abstractmethod
    def item(self, at: int) -> Item:
        """The item at a place from 0 below the length."""

    @overload
    def __getitem__(self, at: int) -> Item: ...

    @overload
    def __getitem__(self, at: slice) -> list[Item]: ...

    def __getitem__(self, at: int | slice) -> Item | list[Item]:
        if isinstance(at, slice):
            return [self.item(n) for n in range(*at.indices(len(self)))]
        place = at + len(self) if at < 0 else at
        if not 0 <= place < len(self):
            raise IndexError(f"row {at} of {len(self)}")
        return self.item(place)

    def __iter__(self) -> Iterator[Item]:
        return map(self.item, range(len(self)))
