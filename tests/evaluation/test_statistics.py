"""Paired statistics against their definitions written out as loops."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roma_ray.evaluation.statistics import accuracy, changes, compare, mcnemar, standard_error

pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def literal_standard_error(values: list[float]) -> float:
    mean = 0.0
    for value in values:
        mean += value / len(values)
    squares = 0.0
    for value in values:
        squares += (value - mean) ** 2
    return math.sqrt(squares / (len(values) - 1)) / math.sqrt(len(values))


def literal_mcnemar(lost: int, won: int) -> float:
    """Sum of the probabilities, under a fair coin, of all outcomes that are no likelier than the one seen; exact."""
    n = lost + won
    seen = math.comb(n, won)
    tail = sum(math.comb(n, k) for k in range(n + 1) if math.comb(n, k) <= seen)
    return float(Fraction(tail, 2**n))


@given(pairs)
def test_mcnemar_is_the_literal_binomial_sum(verdicts: list[tuple[bool, bool]]) -> None:
    base, tuned = map(list, zip(*verdicts, strict=True))
    lost = sum(b and not t for b, t in verdicts)
    won = sum(t and not b for b, t in verdicts)
    assert mcnemar(base, tuned) == pytest.approx(literal_mcnemar(lost, won), rel=1e-12)


@pytest.mark.parametrize(
    ("lost", "won", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (0, 5, 0.0625), (0, 6, 0.03125), (3, 3, 1.0), (1, 9, 22 / 1024), (5, 15, 0.0413894653)],
)
def test_mcnemar_of_known_counts(lost: int, won: int, p: float) -> None:
    base = [True] * lost + [False] * won + [True, False]
    tuned = [False] * lost + [True] * won + [True, False]
    assert mcnemar(base, tuned) == pytest.approx(p, rel=1e-9)
    assert mcnemar(tuned, base) == pytest.approx(p, rel=1e-9), "two-sided: the same either way"


def test_mcnemar_counts_only_the_questions_that_changed() -> None:
    base, tuned = [True, False, False, False, False, False], [True, True, True, True, True, True]
    agreeing = [True] * 10_000
    assert mcnemar(base + agreeing, tuned + agreeing) == mcnemar(base, tuned)


@given(st.lists(st.booleans(), min_size=2, max_size=200))
def test_the_standard_error_is_the_literal_one(correct: list[bool]) -> None:
    assert standard_error(correct) == pytest.approx(literal_standard_error([float(c) for c in correct]), abs=1e-15)


def test_a_standard_error_needs_two_questions() -> None:
    assert standard_error([True]) == 0.0
    assert standard_error([True, True, True]) == 0.0


def test_the_standard_error_of_an_accuracy_is_lm_evals() -> None:
    # lm-evaluation-harness: sample standard deviation over sqrt(n), i.e. sqrt(p (1 - p) / (n - 1)).
    correct = np.arange(1172) < 560
    assert standard_error(correct) == pytest.approx(math.sqrt(560 / 1172 * 612 / 1172 / 1171))
    assert accuracy(correct) == pytest.approx(560 / 1172)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_a_comparison_is_paired(verdicts: list[tuple[bool, bool]]) -> None:
    base, tuned = map(list, zip(*verdicts, strict=True))
    found = compare(base, tuned)
    differences = [float(t) - float(b) for b, t in verdicts]
    assert found["n"] == len(verdicts)
    assert found["difference"] == pytest.approx(sum(differences) / len(differences), abs=1e-15)
    assert found["difference"] == pytest.approx(found["tuned_accuracy"] - found["base_accuracy"], abs=1e-15)
    # Of the differences, question by question: not the two accuracies' errors added up.
    assert found["difference_stderr"] == pytest.approx(literal_standard_error(differences), abs=1e-15)
    assert found["base_stderr"] == standard_error(base)
    assert found["tuned_stderr"] == standard_error(tuned)
    assert (found["won"] - found["lost"]) / found["n"] == pytest.approx(found["difference"], abs=1e-15)
    assert found["mcnemar_p"] == mcnemar(base, tuned)


def test_two_equal_models_do_not_differ() -> None:
    found = compare([True, False, True], [True, False, True])
    assert (found["difference"], found["difference_stderr"], found["lost"], found["won"]) == (0, 0, 0, 0)
    assert found["mcnemar_p"] == 1.0


def test_arrays_and_lists_are_the_same() -> None:
    base, tuned = [True, False, False], [False, True, True]
    assert compare(np.array(base), np.array(tuned)) == compare(base, tuned)
    assert changes(base, tuned) == (1, 2)


def test_different_questions_cannot_be_paired() -> None:
    with pytest.raises(AssertionError, match="same questions"):
        changes([True, False], [True])
