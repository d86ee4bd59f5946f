"""Parts are functions of ids and seed alone, proportional by task, disjoint; fractions are nested."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roma_ray.errors import ConfigError, QuestionError
from roma_ray.questions.records import Question
from roma_ray.questions.splits import (
    PARTS,
    apportion,
    assign_splits,
    divide,
    nested_fraction,
    seeded_key,
    split_by_task,
)


def suite(**sizes: int) -> list[Question]:
    return [Question(f"{task}-{i}", task, "Q?", ("x", "y"), 0) for task, n in sizes.items() for i in range(n)]


def parts(questions: list[Question]) -> dict[str, str]:
    return {question.id: question.split for question in questions}


def split(questions: list[Question], seed: int = 0, validation: float = 0.1, test: float = 0.2) -> list[Question]:
    return assign_splits(questions, validation_fraction=validation, test_fraction=test, seed=seed)


def test_parts_are_proportional_by_task_and_keep_the_order() -> None:
    questions = suite(a=100, b=50, c=10)
    result = split(questions)
    assert [q.id for q in result] == [q.id for q in questions]
    assert Counter((q.task, q.split) for q in result) == {
        ("a", "train"): 70, ("a", "validation"): 10, ("a", "test"): 20,
        ("b", "train"): 35, ("b", "validation"): 5, ("b", "test"): 10,
        ("c", "train"): 7, ("c", "validation"): 1, ("c", "test"): 2,
    }  # fmt: skip


def test_parts_do_not_depend_on_the_order_but_on_the_seed() -> None:
    questions = suite(a=60, b=25)
    mixed = questions.copy()
    random.Random(3).shuffle(mixed)
    assert parts(split(questions)) == parts(split(mixed))
    assert parts(split(questions)) != parts(split(questions, seed=1))


def test_the_assignment_is_pinned() -> None:
    # A change here changes the parts of every run that was ever made.
    held = {id: part for id, part in parts(split(suite(a=10), seed=7)).items() if part != "train"}
    assert held == PINNED


PINNED = {"a-1": "test", "a-3": "test", "a-5": "validation"}


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(PARTS)), min_size=1, max_size=40),
    st.sampled_from((0.0, 0.1, 0.4)),
    st.sampled_from((0.0, 0.1, 0.4)),
    st.integers(0, 2),
)
def test_parts_are_those_of_a_loop_over_sorted_ids(
    rows: list[tuple[str, str]], validation: float, test: float, seed: int
) -> None:
    questions = [Question(f"q{n}", task, "Q?", ("x", "y"), 0, split=part) for n, (task, part) in enumerate(rows)]
    free: dict[str, list[str]] = {}
    for question in questions:
        if question.split == "train":
            free.setdefault(question.task, []).append(question.id)
    expected = {question.id: question.split for question in questions}
    validated = {question.task for question in questions if question.split == "validation"}
    for part, fraction in (("test", test), ("validation", validation)):
        of = {task: len(ids) for task, ids in free.items() if part == "test" or task not in validated}
        if part == "test" and any(declared == "test" for _, declared in rows):
            continue
        for task, count in apportion(of, fraction).items():
            left = [id for id in free[task] if expected[id] == "train"]
            chosen = sorted(left, key=lambda id: (seeded_key(seed, part, id), id))[:count]
            expected |= dict.fromkeys(chosen, part)
    if "train" in expected.values():
        assert parts(split(questions, seed, validation, test)) == expected
    else:
        with pytest.raises(QuestionError, match="no training question is left"):
            split(questions, seed, validation, test)


def test_small_tasks_take_their_turn() -> None:
    """Forty tasks of 4 with 10 %: rounding each by itself would hold out nothing."""
    result = split(suite(**{f"t{i:02}": 4 for i in range(40)}), test=0.0)
    assert Counter(q.split for q in result) == {"train": 144, "validation": 16}


def test_declared_test_rows_are_the_test_part() -> None:
    declared = [replace(q, split="test") for q in suite(bench=5)]
    result = split([*suite(a=100), *declared])
    assert {q.id for q in result if q.split == "test"} == {q.id for q in declared}
    assert Counter(q.split for q in result) == {"train": 90, "validation": 10, "test": 5}


def test_a_task_with_declared_validation_rows_has_no_more_split_off() -> None:
    declared = [replace(q, id=f"v-{q.id}", split="validation") for q in suite(a=8)]
    result = split([*suite(a=100, b=100), *declared], test=0.0)
    counts = Counter((q.task, q.split) for q in result)
    assert counts == {("a", "train"): 100, ("a", "validation"): 8, ("b", "train"): 90, ("b", "validation"): 10}


def test_one_question_more_moves_few_others() -> None:
    before = parts(split(suite(a=200)))
    after = parts(split(suite(a=201)))
    assert sum(after[id] != part for id, part in before.items()) <= 2


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(QuestionError, match=r"no training question is left \(3 test\)"):
        split([replace(q, split="test") for q in suite(a=3)])
    with pytest.raises(QuestionError, match="none at all"):
        split([])
    with pytest.raises(ConfigError, match="together leave nothing"):
        split(suite(a=10), validation=0.4, test=0.6)
    with pytest.raises(ConfigError, match="validation_fraction is 1"):
        split(suite(a=10), validation=1.0)


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 60), min_size=1), st.floats(0.01, 0.9))
def test_apportioned_numbers_add_up_and_are_proportional(sizes: dict[str, int], fraction: float) -> None:
    quotas = apportion(sizes, fraction)
    total = sum(sizes.values())
    if total >= 2:
        assert abs(sum(quotas.values()) - fraction * total) <= 1
        assert sum(quotas.values()) >= 1
    for name, size in sizes.items():
        assert 0 <= quotas[name] <= size
        assert abs(quotas[name] - fraction * size) < 1 + 1e-9


SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}


def counted(questions: list[Question]) -> dict[str, tuple[int, ...]]:
    """How many questions of each task are train, validation and test."""
    found = Counter((q.task, q.split) for q in questions)
    return {task: tuple(found[task, part] for part in SHARES) for task in sorted({q.task for q in questions})}


def test_each_task_is_divided_by_itself_in_the_same_proportion() -> None:
    questions = suite(a=100, b=20, c=7, d=3, e=2, f=1)
    result = split_by_task(questions, SHARES, seed=0)
    assert [q.id for q in result] == [q.id for q in questions]
    assert counted(result) == {
        "a": (70, 15, 15), "b": (14, 3, 3), "c": (5, 1, 1), "d": (1, 1, 1), "e": (2, 0, 0), "f": (1, 0, 0),
    }  # fmt: skip
    # A task's parts do not depend on which other tasks there are, nor on the order; they do on the seed.
    assert parts(split_by_task(suite(b=20), SHARES, seed=0)).items() <= parts(result).items()
    assert parts(split_by_task(questions[::-1], SHARES, seed=0)) == parts(result)
    assert parts(split_by_task(questions, SHARES, seed=1)) != parts(result)


def test_the_division_of_a_task_is_pinned() -> None:
    # A change here changes the parts of every run that was ever made with `questions.splits`.
    held = {id: part for id, part in parts(split_by_task(suite(a=10), SHARES, seed=7)).items() if part != "train"}
    assert held == PINNED_BY_TASK


PINNED_BY_TASK = {"a-3": "test", "a-5": "validation", "a-9": "validation"}


def test_what_a_task_declares_stays_and_its_other_rows_are_divided_among_the_parts_left() -> None:
    test = [replace(q, id=f"t-{q.id}", split="test") for q in suite(a=50, d=4)]
    validation = [replace(q, id=f"v-{q.id}", split="validation") for q in suite(b=9, d=5)]
    result = split_by_task([*suite(a=85, b=85, c=100, d=10), *test, *validation], SHARES, seed=0)
    # .70 : .15 of 85 rows are 70 and 15; c declares nothing, d everything.
    assert counted(result) == {"a": (70, 15, 50), "b": (70, 9, 15), "c": (70, 15, 15), "d": (10, 5, 4)}
    held = parts(result)
    assert all(held[q.id] == q.split for q in (*test, *validation))


def test_a_divided_suite_without_training_rows_is_an_error() -> None:
    with pytest.raises(QuestionError, match=r"no training question is left \(3 test\)"):
        split_by_task([replace(q, split="test") for q in suite(a=3)], SHARES, seed=0)


def test_one_question_more_moves_few_others_of_its_task() -> None:
    before = parts(split_by_task(suite(a=200), SHARES, seed=0))
    after = parts(split_by_task(suite(a=201), SHARES, seed=0))
    assert sum(after[id] != part for id, part in before.items()) <= 4


@given(st.integers(0, 300), st.lists(st.floats(0.01, 1), min_size=1, max_size=3))
def test_divided_numbers_add_up_and_are_proportional(count: int, weights: list[float]) -> None:
    shares = dict(zip("xyz", weights, strict=False))
    sizes = divide(count, shares)
    assert sum(sizes.values()) == count
    assert all(size >= 0 for size in sizes.values())
    if count >= len(shares):
        assert all(size >= 1 for size in sizes.values())
    for part, size in sizes.items():
        exact = count * shares[part] / sum(shares.values())
        # A part that had none takes one from the largest: never more than one for each other part.
        assert exact - len(shares) < size <= max(1, exact + 1)


@given(st.sets(st.text(max_size=5), max_size=40), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 5))
def test_fractions_are_nested(ids: set[str], one: float, other: float, seed: int) -> None:
    listed = sorted(ids)
    small, large = (nested_fraction(listed, f, seed) for f in sorted((one, other)))
    assert set(small) <= set(large) <= ids
    assert nested_fraction(listed, 1.0, seed) == listed
    assert small == [id for id in listed if id in set(small)]
    assert nested_fraction(listed[::-1], one, seed) == nested_fraction(listed, one, seed)[::-1]


def test_fractions_have_the_stated_size() -> None:
    ids = [f"{i}" for i in range(200)]
    assert [len(nested_fraction(ids, f, 0)) for f in (0.001, 0.25, 0.5, 1.0)] == [1, 50, 100, 200]
    with pytest.raises(ConfigError, match=r"questions\.fraction is 0"):
        nested_fraction(ids, 0, 0)


def test_keys_of_different_purposes_are_independent() -> None:
    assert seeded_key(0, "test", "x") == seeded_key(0, "test", "x")
    assert len({seeded_key(s, p, t) for s in (0, 1) for p in ("test", "validation") for t in ("x", "\ud800")}) == 8
