"""Guards against results that are none."""

from __future__ import annotations

import math
import random

import pytest

from roma_ray.errors import GuardError
from roma_ray.evaluation.guards import at_chance, check_not_identical, normalise, overlap


def test_equal_scores_are_an_error_and_one_different_score_is_none() -> None:
    base = [[-1.0, -2.0], [-0.5, -3.0, -4.0]]
    with pytest.raises(GuardError, match="equal the base model's on every question"):
        check_not_identical(base, [list(row) for row in base])
    check_not_identical(base, [[-1.0, -2.0], [-0.5, -3.0, -4.0 + 1e-6]])
    check_not_identical(base, [[-1.0 + 1e-6, -2.0], [-0.5, -3.0, -4.0]])


def test_scores_of_other_questions_are_not_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        check_not_identical([[1.0]], [[1.0], [2.0]])


def literal_limit(choices: list[int]) -> float:
    """The number of right answers two standard errors above guessing: mean and variance of a sum of coin throws."""
    mean = variance = 0.0
    for count in choices:
        mean += 1 / count
        variance += (1 / count) * (1 - 1 / count)
    return mean + 2 * math.sqrt(variance)


@pytest.mark.parametrize("choices", [[4] * 100, [2] * 100, [4] * 20 + [2] * 30 + [5] * 50, [26] * 40])
def test_chance_ends_two_standard_errors_above_guessing(choices: list[int]) -> None:
    limit = literal_limit(choices)
    for correct in range(len(choices) + 1):
        assert at_chance(correct, choices) == (correct <= limit), correct


def test_below_chance_is_chance() -> None:
    assert at_chance(0, [4] * 1000)


def test_the_public_references_accuracy_is_chance() -> None:
    # 263 of 1150 four-choice questions, for base and tuned alike: the evaluator read its own prompt.
    assert at_chance(263, [4] * 1150)
    assert not at_chance(550, [4] * 1150)


def test_no_questions_are_not_at_chance() -> None:
    assert not at_chance(0, [])


def test_guessing_is_seldom_taken_for_knowledge() -> None:
    throw = random.Random(0)
    choices = [throw.choice([2, 3, 4, 5]) for _ in range(300)]
    knowing = sum(not at_chance(sum(throw.random() < 1 / c for c in choices), choices) for _ in range(500))
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
