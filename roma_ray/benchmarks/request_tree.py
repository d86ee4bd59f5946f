"""Requests as paths of one token tree: what any of them share with another is computed once.

A loglikelihood request scores the tokens of a continuation after a context. Its *path* is every token that the model
reads for it: context and continuation without the last token. Paths that begin alike (a few-shot prefix, a question's
context with its choices, single-token choices with equal paths) share those tokens' states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Path = tuple[int, ...]


@dataclass(frozen=True)
class Branch:
    """A run of tokens after an earlier segment (`parent`, -1 for none); `start` is its first token's place in the path."""

    ids: Path
    parent: int
    start: int


@dataclass(frozen=True)
class Tree:
    """The radix tree of some paths; parents come before their children."""

    segments: tuple[Branch, ...]
    leaf: dict[Path, int]
    """The segment in which a path ends."""

    @property
    def tokens(self) -> int:
        """Tokens that the model reads."""
        return sum(len(s.ids) for s in self.segments)

    def places(self, path: Path, count: int) -> list[tuple[int, int]]:
        """(segment, offset) of a path's last `count` tokens, in order."""
        found: list[tuple[int, int]] = []
        at = self.leaf[path]
        for position in range(len(path) - 1, len(path) - 1 - count, -1):
            while position < self.segments[at].start:
                at = self.segments[at].parent
            found.append((at, position - self.segments[at].start))
        return found[::-1]


LEAST_SHARED = 8
"""Fewer common tokens are computed for each path: a root segment without ancestors has the faster attention."""


def grow(paths: Sequence[Path], least: int = LEAST_SHARED) -> Tree:
    """The tree of these paths, none of them empty; the same for any order of them.

    What only `least - 1` tokens or fewer of a segment would share is not shared.
    """
    ordered = sorted(set(paths))
    segments: list[Branch] = []
    leaf: dict[Path, int] = {}
    # Ranges of sorted paths that agree up to `depth`; what they have from `begin` on is in no segment yet.
    waiting = [(0, len(ordered), 0, 0, -1)]
    while waiting:
        low, high, depth, begin, parent = waiting.pop()
        starts = [n for n in range(low, high) if n == low or ordered[n][depth] != ordered[n - 1][depth]]
        for first, stop in zip(starts, [*starts[1:], high], strict=True):
            shared = common_prefix(ordered[first], ordered[stop - 1])
            # Sorted, so of these only the first can end where they part.
            ended = len(ordered[first]) == shared
            alone = stop - first == 1
            split = alone or shared - begin >= least
            if split or ended:
                leaf_or_inner = len(segments)
                segments.append(Branch(ordered[first][begin:shared], parent, begin))
                if ended:
                    leaf[ordered[first]] = leaf_or_inner
            if first + ended < stop:
                rest = (first + ended, stop, shared)
                waiting.append((*rest, shared, len(segments) - 1) if split else (*rest, begin, parent))
    return Tree(tuple(segments), leaf)


def common_prefix(one: Path, other: Path) -> int:
    """How many tokens two paths begin with in common."""
    if one[: len(other)] == other[: len(one)]:
        return min(len(one), len(other))
    low, high = 0, min(len(one), len(other))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle)
    return low


def plan_paths(paths: Sequence[Path], batch_tokens: int) -> list[list[int]]:
    """Batches of path numbers whose trees have about `batch_tokens` tokens (a longer path is alone).

    Neighbors in dictionary order share most, so they go into one batch: a tree's size is then about the sum of what each path
    adds to the one before it.
    """
    order = sorted(range(len(paths)), key=lambda n: (paths[n], n))
    batches: list[list[int]] = []
    size = 0
    previous: Path = ()
    for number in order:
        path = paths[number]
        added = _added(previous, path)
        if batches and size + added <= batch_tokens:
            batches[-1].append(number)
            size += added
        else:
            batches.append([number])
            size = len(path)
        previous = path
    return batches


def _added(previous: Path, path: Path) -> int:
    """What a path adds to a tree that ends with the one before it in dictionary order."""
    shared = common_prefix(previous, path)
    return len(path) - (shared if shared >= LEAST_SHARED else 0)


def tree_tokens(paths: Sequence[Path]) -> int:
    """About how many tokens the tree of some paths has, as batches are planned."""
    ordered = sorted(paths)
    return sum(_added(previous, path) for previous, path in zip([(), *ordered], ordered, strict=False))
