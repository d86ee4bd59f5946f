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

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from roma_ray.errors import ConfigError, QuestionError
from roma_ray.questions.records import Question


def seeded_key(seed: int, purpose: str, text: str) -> bytes:
    """16 bytes that order texts at random but the same on every machine; `purpose` keeps two orders independent."""
    data = f"{seed}\0{purpose}\0{text}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=16).digest()


def assign_splits(
    questions: Sequence[Question], *, validation_fraction: float, test_fraction: float, seed: int
) -> list[Question]:
    """The questions, in their order, with `split` one of train, validation and test.

    Both fractions are of the training questions that the sources declare, in the same proportion for each task. Each is
    rounded over the whole, and to at least one question.

    Raises:
        ConfigError: the fractions leave nothing to train on, or are not in [0, 1).
        QuestionError: no question is left for training.
    """
    for name, fraction in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise ConfigError(f"questions.{name} is {fraction}: give a number from 0 to below 1")
    declares_test = any(question.split == "test" for question in questions)
    if not declares_test and validation_fraction + test_fraction >= 1:
        raise ConfigError(
            f"questions.validation_fraction ({validation_fraction}) and questions.test_fraction ({test_fraction}) "
            "together leave nothing to train on: lower one"
        )
    validated = {question.task for question in questions if question.split == "validation"}
    by_task: dict[str, list[str]] = defaultdict(list)
    for question in questions:
        if question.split == "train":
            by_task[question.task].append(question.id)

    test = set() if declares_test else _draw(by_task, test_fraction, seed, "test")
    open_tasks = {task: ids for task, ids in by_task.items() if task not in validated}
    validation = _draw(open_tasks, validation_fraction, seed, "validation", without=test)
    return _assigned(questions, dict.fromkeys(test, "test") | dict.fromkeys(validation, "validation"))


def split_by_task(questions: Sequence[Question], shares: Mapping[str, float], *, seed: int) -> list[Question]:
    """The questions, in their order, with `split` one of train, validation and test: each task divided by the three `shares`.

    What a task's rows declare as validation or test stays so; its other rows are divided among the parts left, in the
    proportion of their shares (`divide`).

    Raises:
        QuestionError: no question is left for training.
    """
    free: dict[str, list[str]] = defaultdict(list)
    declared: dict[str, set[str]] = defaultdict(set)
    for question in questions:
        if question.split == "train":
            free[question.task].append(question.id)
        else:
            declared[question.task].add(question.split)
    parts: dict[str, str] = {}
    for task, ids in free.items():
        sizes = divide(len(ids), {part: share for part, share in shares.items() if part not in declared[task]})
        for part in ("test", "validation"):
            open_ids = [id for id in ids if id not in parts]
            parts |= dict.fromkeys(_permuted(open_ids, seed, part)[: sizes.get(part, 0)], part)
    return _assigned(questions, parts)


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


def _assigned(questions: Sequence[Question], parts: Mapping[str, str]) -> list[Question]:
    """The questions with the drawn parts, by id. Raises QuestionError where none is left for training."""
    result = [replace(q, split=parts[q.id]) if q.split == "train" and q.id in parts else q for q in questions]
    if not any(question.split == "train" for question in result):
        counts = Counter(question.split for question in result)
        found = ", ".join(f"{n} {split}" for split, n in sorted(counts.items())) or "none at all"
        raise QuestionError(f"no training question is left ({found}): add rows, or set `split: train` on a source")
    return result


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
    if not 0 < fraction <= 1:
        raise ConfigError(f"questions.fraction is {fraction}: give a number above 0 and at most 1")
    listed = list(ids)
    assert len(set(listed)) == len(listed), "ids must be unique"
    count = max(1, _rounded(fraction * len(listed))) if listed else 0
    kept = set(_permuted(listed, seed, "fraction")[:count])
    return [id for id in listed if id in kept]


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


def _draw(
    by_task: Mapping[str, Sequence[str]], fraction: float, seed: int, purpose: str, without: set[str] | None = None
) -> set[str]:
    quotas = apportion({task: len(ids) for task, ids in by_task.items()}, fraction)
    drawn: set[str] = set()
    for task, ids in by_task.items():
        free = [id for id in ids if not without or id not in without]
        drawn.update(_permuted(free, seed, purpose)[: quotas[task]])
    return drawn


def _permuted(ids: Iterable[str], seed: int, purpose: str) -> list[str]:
    return sorted(ids, key=lambda id: (seeded_key(seed, purpose, id), id))


def _rounded(value: float) -> int:
    # Halves go up, not to the even number as with round(): the rule of equal cases must not depend on the count.
    return math.floor(value + 0.5)
