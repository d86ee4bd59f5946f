"""Which ids were used already, and where first: by digests, in some thirty bytes an id."""

from __future__ import annotations

import hashlib

import numpy as np

_RECENT = 2**16
"""So many of the last ids are kept as texts, or a sixteenth of all where that is more: each time they are sorted in among the others."""


class SeenIds:
    """The ids so far, each with the file and line that used it first.

    Older ids are known by 128 bits of BLAKE2b: of ten million ids no two share them but with a chance of 1e-25.
    """

    def __init__(self) -> None:
        self._recent: dict[str, tuple[str, int]] = {}
        self._files: dict[str, int] = {}
        self._names: list[str] = []
        self._keys = np.empty((0, 2), dtype=np.uint64)
        """Digests, ascending by their first half."""
        self._places = np.empty((0, 2), dtype=np.int64)
        """The file's number and the line, of each."""

    def first_use(self, id: str) -> tuple[str, int] | None:
        """The file and line that used an id first; None where none did."""
        if id in self._recent or not len(self._keys):
            return self._recent.get(id)
        high, low = np.frombuffer(_digest(id), dtype=np.uint64)
        at = int(np.searchsorted(self._keys[:, 0], high))
        while at < len(self._keys) and self._keys[at, 0] == high:
            if self._keys[at, 1] == low:
                file, line = self._places[at].tolist()
                return self._names[file], line
            at += 1
        return None

    def add(self, id: str, file: str, line: int) -> None:
        """Remember an id that was not used before."""
        self._recent[id] = (file, line)
        if len(self._recent) >= max(_RECENT, len(self._keys) // 16):
            self._sort_in()

    def _sort_in(self) -> None:
        keys = np.frombuffer(b"".join(map(_digest, self._recent)), dtype=np.uint64).reshape(-1, 2)
        places = [(self._number(file), line) for file, line in self._recent.values()]
        keys, placed = np.concatenate([self._keys, keys]), np.concatenate([self._places, np.array(places)])
        order = np.argsort(keys[:, 0], kind="stable")
        self._keys, self._places = keys[order], placed[order]
        self._recent.clear()

    def _number(self, file: str) -> int:
        if file not in self._files:
            self._files[file] = len(self._names)
            self._names.append(file)
        return self._files[file]


def _digest(id: str) -> bytes:
    return hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
