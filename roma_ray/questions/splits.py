"""Training, validation and test parts, and nested fractions, as functions of ids and seed alone.

Questions are ordered by a keyed hash of their id, so a part does not depend on the order of files or lines, and a few
questions more or less move few others.

What rows declare:

* `test` rows are the test part. Only when no source declares any is a test part split off the training rows.
* `validation` rows are validation rows. A task that declares some has no more split off; from every other task's
  training rows `validation_fraction` is split off. So a suite whose sources declare validation rows for one task of ten
  still validates on all ten. A file whose "validation" rows are to be trained on says so: `split: train` on its source.

`questions.splits` divides each task by itself instead (`split_by_task`): there, test rows too are declared task by task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress, islice

import numpy as np

from roma_ray.errors import ConfigError, QuestionError
from roma_ray.questions.labels import Labels
from roma_ray.questions.records import Question, seeded_key

PARTS = ("train", "validation", "test")
_TRAIN, _VALIDATION, _TEST = range(3)
_KEYS_AT_ONCE = 65_536


@dataclass(frozen=True)
class Declared:
    """What decides the questions' parts, some bytes a question [N]: what their rows declare, and how to go through their ids."""

    tasks: Labels
    parts: np.ndarray
    """The part that each row declares, as its place in `PARTS`."""
    ids: Callable[[], Iterable[str]]

    @classmethod
    def of(cls, questions: Sequence[Question]) -> Declared:
        """Of questions that are held."""
        tasks = Labels()
        tasks.add(question.task for question in questions)
        parts = np.array([PARTS.index(question.split) for question in questions], dtype=np.int8)
        return cls(tasks, parts, lambda: (question.id for question in questions))

    @cached_property
    def free(self) -> np.ndarray:
        """The rows that declare nothing but to be training rows."""
        return np.flatnonzero(self.parts == _TRAIN)

    def keys(self, seed: int, purpose: str) -> np.ndarray:
        """The seeded keys of the free rows, [free, 2]."""
        return seeded_keys(compress(self.ids(), self.parts == _TRAIN), seed, purpose)


def seeded_keys(ids: Iterable[str], seed: int, purpose: str) -> np.ndarray:
    """The keys of many ids as two numbers each, [N, 2] uint64: they compare as the keys' bytes do."""
    stream = iter(ids)
    found = [np.empty((0, 2), dtype=np.uint64)]
    while some := list(islice(stream, _KEYS_AT_ONCE)):
        joined = b"".join(seeded_key(seed, purpose, id) for id in some)
        found.append(np.frombuffer(joined, dtype=">u8").reshape(-1, 2).astype(np.uint64))
    return np.concatenate(found)


def drawn_splits(asked: Declared, *, validation_fraction: float, test_fraction: float, seed: int) -> np.ndarray:
    """Each question's part as its place in `PARTS`, [N] int8, where the sources may declare parts.

    Both fractions are of the training questions that the sources declare, in the same proportion for each task. Each is
    rounded over the whole, and to at least one question.

    Raises:
        ConfigError: the fractions leave nothing to train on, or are not in [0, 1).
        QuestionError: no question is left for training.
    """
    for name, fraction in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise ConfigError(f"questions.{name} is {fraction}: give a number from 0 to below 1")
    declares_test = bool((asked.parts == _TEST).any())
    if not declares_test and validation_fraction + test_fraction >= 1:
        raise ConfigError(
            f"questions.validation_fraction ({validation_fraction}) and questions.test_fraction ({test_fraction}) "
            "together leave nothing to train on: lower one"
        )
    parts, codes = asked.parts.copy(), asked.tasks.codes
    sizes = {asked.tasks.names[task]: size for task, size in _sizes(codes[asked.free]).items()}
    if not declares_test:
        quotas = apportion(sizes, test_fraction)
        parts[_first_of_each(asked, parts, {asked.tasks.code(t): n for t, n in quotas.items()}, seed, "test")] = _TEST
    validated = {asked.tasks.names[task] for task in np.unique(codes[asked.parts == _VALIDATION]).tolist()}
    quotas = apportion({task: n for task, n in sizes.items() if task not in validated}, validation_fraction)
    chosen = _first_of_each(asked, parts, {asked.tasks.code(t): n for t, n in quotas.items()}, seed, "validation")
    parts[chosen] = _VALIDATION
    return _trained(parts)


def divided_splits(asked: Declared, shares: Mapping[str, float], *, seed: int) -> np.ndarray:
    """Each question's part as its place in `PARTS`, [N] int8: each task divided by the three `shares`.

    What a task's rows declare as validation or test stays so; its other rows are divided among the parts left, in the
    proportion of their shares (`divide`).

    Raises:
        QuestionError: no question is left for training.
    """
    parts, codes = asked.parts.copy(), asked.tasks.codes
    given = {part: set(np.unique(codes[asked.parts == PARTS.index(part)]).tolist()) for part in ("test", "validation")}
    sizes = {
        task: divide(size, {part: share for part, share in shares.items() if task not in given.get(part, ())})
        for task, size in _sizes(codes[asked.free]).items()
    }
    for part in ("test", "validation"):
        quotas = {task: own.get(part, 0) for task, own in sizes.items()}
        parts[_first_of_each(asked, parts, quotas, seed, part)] = PARTS.index(part)
    return _trained(parts)


def _sizes(codes: np.ndarray) -> dict[int, int]:
    """How many questions each task has, by its number."""
    found, counts = np.unique(codes, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _first_of_each(
    asked: Declared, parts: np.ndarray, quotas: Mapping[int, int], seed: int, purpose: str
) -> np.ndarray:
    """Of each task's free rows that are in no part yet, so many as its quota: the first in the seeded order."""
    if not any(quotas.values()):
        return np.empty(0, dtype=np.int64)
    left = parts[asked.free] == _TRAIN
    rows, keys = asked.free[left], asked.keys(seed, purpose)[left]
    codes = asked.tasks.codes[rows]
    order = np.lexsort((keys[:, 1], keys[:, 0], codes))
    tasks, starts = np.unique(codes[order], return_index=True)
    chosen = [order[start : start + quotas.get(task, 0)] for task, start in zip(tasks.tolist(), starts, strict=True)]
    return rows[np.concatenate([np.empty(0, dtype=np.int64), *chosen])]


def _trained(parts: np.ndarray) -> np.ndarray:
    """The parts. Raises QuestionError where none is left for training."""
    if not (parts == _TRAIN).any():
        counts = {name: int((parts == PARTS.index(name)).sum()) for name in sorted(PARTS)}
        found = ", ".join(f"{n} {part}" for part, n in counts.items() if n) or "none at all"
        raise QuestionError(f"no training question is left ({found}): add rows, or set `split: train` on a source")
    return parts


def assign_splits(
    questions: Sequence[Question], *, validation_fraction: float, test_fraction: float, seed: int
) -> list[Question]:
    """The questions, in their order, with `split` one of train, validation and test. As `drawn_splits`."""
    asked = Declared.of(questions)
    parts = drawn_splits(asked, validation_fraction=validation_fraction, test_fraction=test_fraction, seed=seed)
    return _assigned(questions, parts)


def split_by_task(questions: Sequence[Question], shares: Mapping[str, float], *, seed: int) -> list[Question]:
    """The questions, in their order, with `split` one of train, validation and test. As `divided_splits`."""
    return _assigned(questions, divided_splits(Declared.of(questions), shares, seed=seed))


def _assigned(questions: Sequence[Question], parts: np.ndarray) -> list[Question]:
    given = zip(questions, (PARTS[part] for part in parts.tolist()), strict=True)
    return [question if question.split == part else replace(question, split=part) for question, part in given]


def divide(count: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers in the proportion of the positive `shares` that sum to `count` (largest remainders, ties in their order).

    Each part has at least 1 where there are as many as parts.
    """
    total = sum(shares.values())
    # Rounded: neither a whole number nor a tie may depend on last bits.
    exact = {part: round(count * share / total, 9) for part, share in shares.items()}
    sizes = {part: math.floor(value) for part, value in exact.items()}
    by_remainder = sorted(shares, key=lambda part: round(sizes[part] - exact[part], 9))
    for part in by_remainder[: count - sum(sizes.values())]:
        sizes[part] += 1
    for part in shares if count >= len(shares) else ():
        largest = max(sizes, key=lambda name: sizes[name])
        if sizes[part] == 0:
            sizes[part], sizes[largest] = 1, sizes[largest] - 1
    return sizes


@dataclass(frozen=True)
class Drawn:
    """Which parts are drawn by seed from the training rows, because the sources do not declare them."""

    test: bool
    validation: bool


def drawn_parts(rows: Iterable[tuple[str, str]]) -> Drawn:
    """Which parts `assign_splits` draws, from the (task, declared split) of every question."""
    tasks: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for task, split in rows:
        tasks[split].add(task)
    return Drawn(test=not tasks["test"], validation=bool(tasks["train"] - tasks["validation"]))


def nested_fraction(ids: Iterable[str], fraction: float, seed: int) -> list[str]:
    """`fraction` of the ids, in their order: for one seed, a smaller fraction is always part of a larger one.

    Raises:
        ConfigError: the fraction is not in (0, 1].
    """
    listed = list(ids)
    return [listed[place] for place in nested_places(listed, len(listed), fraction, seed).tolist()]


def nested_places(ids: Iterable[str], count: int, fraction: float, seed: int) -> np.ndarray:
    """The places of those ids among all `count`, ascending; ids are unique. Raises ConfigError as `nested_fraction`."""
    if not 0 < fraction <= 1:
        raise ConfigError(f"questions.fraction is {fraction}: give a number above 0 and at most 1")
    if fraction == 1:
        return np.arange(count)
    keys = seeded_keys(ids, seed, "fraction")
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    assert not (ordered[1:] == ordered[:-1]).all(1).any(), "ids must be unique"
    return np.sort(order[: max(1, _rounded(fraction * count))])


def apportion(sizes: Mapping[str, int], fraction: float) -> dict[str, int]:
    """Whole numbers proportional to `sizes` that add up to `fraction` of their sum (largest remainders), at least 1."""
    total = sum(sizes.values())
    if total < 2 or fraction == 0:
        return dict.fromkeys(sizes, 0)
    wanted = max(1, _rounded(fraction * total))
    quotas = {name: math.floor(fraction * size) for name, size in sizes.items()}
    # Ties go by name, so that the result depends on nothing but the sizes.
    by_remainder = sorted(sizes, key=lambda name: (quotas[name] - fraction * sizes[name], name))
    spare = wanted - sum(quotas.values())
    for name in by_remainder:
        if spare > 0 and quotas[name] < sizes[name]:
            quotas[name] += 1
            spare -= 1
    return quotas


def _rounded(value: float) -> int:
    # Halves go up, not to the even number as with round(): the rule of equal cases must not depend on the count.
    return math.floor(value + 0.5)
