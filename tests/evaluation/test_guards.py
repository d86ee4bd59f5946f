"""Guards against results that are none."""

from __future__ import annotations

import math
import random

import pytest

from roma_ray.errors import GuardError
from roma_ray.evaluation.guards import (
    beside_chance,
    by_chance,
    chance_notes,
    check_not_identical,
    normalise,
    occurring,
    overlap,
)


def test_equal_scores_are_an_error_and_one_different_score_is_none() -> None:
    base = [[-1.0, -2.0], [-0.5, -3.0, -4.0]]
    with pytest.raises(GuardError, match="equal the base model's on every question"):
        check_not_identical(base, [list(row) for row in base])
    check_not_identical(base, [[-1.0, -2.0], [-0.5, -3.0, -4.0 + 1e-6]])
    check_not_identical(base, [[-1.0 + 1e-6, -2.0], [-0.5, -3.0, -4.0]])


def test_scores_of_other_questions_are_not_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        check_not_identical([[1.0]], [[1.0], [2.0]])


def literal_limits(choices: list[int]) -> tuple[float, float]:
    """The numbers of right answers two standard errors around guessing: mean and variance of a sum of coin throws."""
    mean = variance = 0.0
    for count in choices:
        mean += 1 / count
        variance += (1 / count) * (1 - 1 / count)
    return mean - 2 * math.sqrt(variance), mean + 2 * math.sqrt(variance)


@pytest.mark.parametrize("choices", [[4] * 100, [2] * 100, [4] * 20 + [2] * 30 + [5] * 50, [26] * 40])
def test_chance_is_two_standard_errors_around_guessing(choices: list[int]) -> None:
    low, high = literal_limits(choices)
    for correct in range(len(choices) + 1):
        expected = "below_chance" if correct < low else "at_chance" if correct <= high else None
        assert beside_chance(correct, choices) == expected, correct


def test_a_model_that_prefers_wrong_answers_does_not_guess_and_is_told_so() -> None:
    # 15 % of two-choice questions: no one guesses so badly.
    assert beside_chance(150, [2] * 1000) == "below_chance"
    guards = by_chance([("base/all", "at_chance"), ("base/boolq", "below_chance"), ("tuned/all", None)])
    assert guards == {"at_chance": ["base/all"], "below_chance": ["base/boolq"]}
    at, below = chance_notes(guards)
    assert at.endswith(": base/all")
    assert "prompt" not in at
    assert below.endswith(": base/boolq")
    assert "points at the prompt" in below
    assert chance_notes(by_chance([("base/all", None)])) == []


def test_the_public_references_accuracy_is_chance() -> None:
    # 263 of 1150 four-choice questions, for base and tuned alike: the evaluator read its own prompt.
    assert beside_chance(263, [4] * 1150) == "at_chance"
    assert beside_chance(550, [4] * 1150) is None


def test_no_questions_are_not_at_chance() -> None:
    assert beside_chance(0, []) is None


def test_guessing_is_seldom_taken_for_knowledge() -> None:
    throw = random.Random(0)
    choices = [throw.choice([2, 3, 4, 5]) for _ in range(300)]
    knowing = sum(beside_chance(sum(throw.random() < 1 / c for c in choices), choices) is None for _ in range(500))
    # One-sided, two standard errors: 2.3 % of guessers.
    assert knowing <= 25


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("What boils water?", "what  boils WATER"),
        ("A-B_C", "a b c"),
        ("ﬁne", "fine"),
        ("Straße", "STRASSE"),
        ("ｆｕｌｌ　ｗｉｄｔｈ", "full width"),
        ("  (tea)  ", "tea"),
    ],
)
def test_trivial_rewording_is_seen_through(text: str, same: str) -> None:
    assert normalise(text) == normalise(same)


@pytest.mark.parametrize(("text", "other"), [("3 + 4", "3 + 5"), ("水は何度で沸く", "水は何度で凍る"), ("a b", "ab")])
def test_other_questions_stay_other(text: str, other: str) -> None:
    assert normalise(text) != normalise(other)


def test_overlap_counts_test_questions_that_occur_in_training() -> None:
    train = [
        ("What boils water?", ["heat", "salt"]),
        ("What boils water?", ["ice", "sand"]),
        ("Is it so?", ["yes", "no"]),
    ]
    test = [
        ("What boils water?", ["salt", "heat"]),  # the same, its choices in another order
        ("what boils WATER", ["Heat", "salt."]),  # reworded
        ("What boils water?", ["heat", "wood"]),  # other choices: another question
        ("What boils milk?", ["heat", "salt"]),
        ("Is it so?", ["yes", "no"]),
        ("Is it so?", ["yes", "no"]),  # each test row counts
    ]
    assert overlap(train, test) == {"exact": 3, "normalised": 4}
    assert overlap(train, []) == {"exact": 0, "normalised": 0}
    assert overlap([], test) == {"exact": 0, "normalised": 0}


def test_overlap_is_what_all_questions_side_by_side_say() -> None:
    """Of questions that are gone through once, with separators and lone surrogates among their texts."""
    rng = random.Random(0)
    texts = ["a b", "A b!", "ab", '","', "[", "\udc80", "ß", "ss"]

    def some(count: int) -> list[tuple[str, list[str]]]:
        return [(rng.choice(texts), rng.choices(texts, k=rng.randint(0, 3))) for _ in range(count)]

    train, test = some(80), some(120)
    found = occurring(train, enumerate(test), lambda text, choices, others: choices == others)
    expected = {name: len(keys) for name, keys in found.items()}
    assert 0 < expected["exact"] < expected["normalised"] < 120
    assert overlap(iter(train), iter(test)) == expected
