"""Paired statistics against their definitions written out as loops."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roma_ray.evaluation.statistics import (
    accuracy,
    changes,
    compare,
    holm,
    macro,
    mcnemar,
    pair,
    relative_change,
    significant,
    standard_error,
    with_error,
)

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


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=2, max_size=60))
def test_other_values_are_paired_by_a_t_test(values: list[tuple[float, float]]) -> None:
    from scipy.stats import ttest_rel

    base, tuned = (np.array(side) for side in zip(*values, strict=True))
    found = pair(base, tuned)
    assert found.difference == pytest.approx(float((tuned - base).mean()), abs=1e-12)
    assert found.difference_stderr == pytest.approx(literal_standard_error((tuned - base).tolist()), abs=1e-12)
    if not (np.isin(base, (0, 1)).all() and np.isin(tuned, (0, 1)).all()):
        assert (found.lost, found.won, found.mcnemar_p) == (None, None, None)
        if found.difference_stderr > 1e-9:
            assert found.p == pytest.approx(float(ttest_rel(tuned, base).pvalue), abs=1e-9)


def test_verdicts_and_other_values_have_one_record() -> None:
    verdicts = pair([True, False, True], [True, True, True])
    assert verdicts == pair([1.0, 0.0, 1.0], np.array([1, 1, 1]))
    assert (verdicts.lost, verdicts.won, verdicts.t_p) == (0, 1, None)
    assert verdicts.p == verdicts.mcnemar_p == 1.0
    assert set(pair([0.5], [0.25]).plain()) == set(verdicts.plain())


def test_a_macro_average_weighs_tasks_alike() -> None:
    one, two = pair([1.0] * 9 + [0.0], [1.0] * 10), pair([0.0, 1.0], [0.0, 0.0])
    found = macro([one, two])
    assert found is not None
    assert found.difference == pytest.approx((0.1 - 0.5) / 2)
    assert found.base == pytest.approx((0.9 + 0.5) / 2)
    assert found.difference_stderr == pytest.approx(math.hypot(one.difference_stderr, two.difference_stderr) / 2)
    assert (found.n, found.p) == (12, None)
    assert macro([one]) is None


def test_at_the_level_exactly_nothing_is_significant() -> None:
    assert not significant(0.05)
    assert significant(0.0499)
    assert not significant(None)
    # The same of several: .025 of two is .05 after correction.
    assert not significant(holm({"a": 0.025, "b": 0.9})["a"])


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({1: 0.02, 2: 0.02}) == pytest.approx({1: 0.04, 2: 0.04})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}
    assert holm({}) == {}


def test_a_figure_with_its_error_has_one_form() -> None:
    assert with_error(0.6196, 0.0168) == "61.96 ± 1.68"
    assert with_error(0.0203, 0.0091, signed=True) == "+2.03 ± 0.91"
    assert with_error(-1.23456, 0.00012, scale=1, digits=4) == "-1.2346 ± 0.0001"
    assert with_error(0.5, None) == "50.00"


def test_a_relative_change_has_the_standard_error_of_its_parts() -> None:
    """Against drawing the questions again, many times."""
    rng = np.random.default_rng(2)
    base = rng.gamma(4.0, size=400)
    tuned = base * rng.normal(0.9, 0.1, 400)
    change, parts = relative_change(base, tuned)
    assert change == pytest.approx(tuned.mean() / base.mean() - 1)
    drawn = [rng.integers(400, size=400) for _ in range(2000)]
    again = [tuned[d].mean() / base[d].mean() - 1 for d in drawn]
    assert standard_error(parts) == pytest.approx(np.std(again), rel=0.1)
    assert relative_change(np.zeros(3), np.ones(3))[0] == 0.0
