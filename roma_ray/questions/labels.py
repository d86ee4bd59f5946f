"""Texts that many questions share, as numbers: the task of each of millions of questions takes four bytes.

N questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa


class Labels:
    """A text a question, of few different ones."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}
        self._codes: list[np.ndarray] = []

    def add(self, texts: Iterable[str]) -> None:
        """Add some questions' texts."""
        self._codes.append(np.fromiter(map(self.code, texts), dtype=np.int32))

    def extend(self, column: pa.ChunkedArray) -> None:
        """Add the texts of a column."""
        coded = column.combine_chunks().dictionary_encode()
        known = [self.code(name) for name in coded.dictionary.to_pylist()]
        self._codes.append(np.asarray(known, dtype=np.int32)[coded.indices.to_numpy(zero_copy_only=False)])

    def code(self, name: str) -> int:
        """The number of a text, a new one's the next."""
        return self._known.setdefault(name, len(self._known))

    @cached_property
    def names(self) -> list[str]:
        """The different texts, in the order of their codes."""
        return list(self._known)

    @cached_property
    def codes(self) -> np.ndarray:
        """Place of each question's text among the names, [N] int32."""
        whole = np.concatenate([np.empty(0, dtype=np.int32), *self._codes])
        self._codes.clear()
        return whole

    def mask(self, names: Iterable[str]) -> np.ndarray:
        """Whether each question has one of these texts, [N] bool."""
        return np.isin(self.codes, [self._known[name] for name in names if name in self._known])

    def present(self, mask: np.ndarray) -> set[str]:
        """The different texts of the questions of a mask."""
        return {self.names[code] for code in np.unique(self.codes[mask]).tolist()}

    def put(self, mask: np.ndarray, name: str) -> None:
        """Give the questions of a mask another text."""
        self.codes[mask] = self.code(name)
        self.__dict__.pop("names", None)

    def __getitem__(self, row: int) -> str:
        return self.names[self.codes[row]]

    def __len__(self) -> int:
        return len(self.codes)

    def __iter__(self) -> Iterator[str]:
        return map(self.names.__getitem__, self.codes.tolist())
