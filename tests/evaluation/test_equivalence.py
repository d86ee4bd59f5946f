"""What is said of a difference: against literal likelihoods, and on simulated answers of known truth."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm, ttest_1samp

from roma_ray.evaluation.equivalence import POWER, Finding, equivalence, findings, pooled, tango
from roma_ray.evaluation.statistics import Paired, holm, mcnemar, pair

MARGIN = 0.015


def verdicts(generator: np.random.Generator, n: int, lost: float, won: float) -> Paired:
    """Answers of two models of which the shares `lost` and `won` differ by chance."""
    kind = generator.choice(3, n, p=[lost, won, 1 - lost - won])
    return pair(kind == 0, kind == 1)


def counts(generator: np.random.Generator, n: int, lost: float, won: float) -> Paired:
    """The same, of the counts alone, which is quicker."""
    few, many, _ = generator.multinomial(n, [lost, won, 1 - lost - won])
    return counted(int(few), int(many), n)


def counted(lost: int, won: int, n: int) -> Paired:
    """So many questions that changed."""
    difference = (won - lost) / n
    error = math.sqrt(((won + lost) / n - difference**2) / (n - 1))
    p = mcnemar([True] * lost + [False] * won, [False] * lost + [True] * won)
    return Paired(n, lost / n, 0, won / n, 0, difference, error, lost, won, p)


def test_counts_say_what_answers_say() -> None:
    paired = verdicts(np.random.default_rng(4), 500, 0.1, 0.2)
    found = counted(paired.lost or 0, paired.won or 0, 500)
    assert (found.difference, found.difference_stderr) == pytest.approx((paired.difference, paired.difference_stderr))
    assert found.p == paired.p


@pytest.mark.parametrize(("lost", "won", "n"), [(30, 12, 900), (0, 0, 500), (0, 7, 300), (5, 0, 300), (90, 110, 2700)])
@pytest.mark.parametrize("difference", [-0.03, -0.005, 0.005, 0.03])
def test_tango_s_variance_is_that_of_the_likeliest_shares(lost: int, won: int, n: int, difference: float) -> None:
    """Its maximum, looked for share by share."""
    shares = np.linspace(max(0.0, -difference), (1 - difference) / 2, 200_001)[1:-1]
    with np.errstate(divide="ignore"):
        likelihood = lost * np.log(shares) + won * np.log(shares + difference)
        likelihood = likelihood + (n - lost - won) * np.log(1 - 2 * shares - difference)
    likeliest = shares[likelihood.argmax()]
    variance = n * (2 * likeliest + difference - difference**2)
    assert tango(lost, won, n, difference) == pytest.approx(
        (won - lost - n * difference) / math.sqrt(variance), rel=1e-3
    )


@pytest.mark.parametrize(("lost", "won", "n"), [(30, 12, 900), (3, 9, 400), (0, 0, 500)])
def test_an_equivalence_is_two_one_sided_tests(lost: int, won: int, n: int) -> None:
    paired = counted(lost, won, n)
    too_low, too_high = norm.sf(tango(lost, won, n, -MARGIN)), norm.cdf(tango(lost, won, n, MARGIN))
    assert equivalence(paired, MARGIN) == pytest.approx(max(too_low, too_high))


def test_the_equivalence_of_other_values_is_by_t_tests() -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(size=400)
    after = before + generator.normal(0.01, 0.2, size=400)
    paired = pair(before, after)
    one = ttest_1samp(after - before, -0.05, alternative="greater").pvalue
    other = ttest_1samp(after - before, 0.05, alternative="less").pvalue
    assert equivalence(paired, 0.05) == pytest.approx(max(one, other))
    assert equivalence(pair([0.5, 0.25], [0.5, 0.25]), 0.05) == 1.0, "no error is known"


@pytest.mark.parametrize(("changed", "n"), [(0.02, 900), (0.1, 900), (0.1, 2700), (0.3, 2700)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_at_the_margin_s_edge_it_errs_no_more_often_than_it_says(changed: float, n: int, sign: int) -> None:
    generator = np.random.default_rng(n + sign)
    draws = 4000
    won, lost = (changed + sign * MARGIN) / 2, (changed - sign * MARGIN) / 2
    nobody = Paired(n, 0, 0, 0, 0, 0, 0)
    seen = generator.multinomial(n, [lost, won, 1 - changed], size=draws).tolist()
    errors = np.mean([equivalence(replace(nobody, lost=a, won=b), MARGIN) < 0.05 for a, b, _ in seen])
    assert errors <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)


def test_its_power_where_nothing_differs() -> None:
    """2,700 questions of which 4 % change by chance: D = 0 is shown to lie within 1.5 points in nearly all draws, of 10 % in most."""
    generator = np.random.default_rng(3)
    shown = {}
    for changed in (0.04, 0.1):
        drawn = [equivalence(counts(generator, 2700, changed / 2, changed / 2), MARGIN) for _ in range(1000)]
        shown[changed] = np.mean([p < 0.05 for p in drawn])
    # Of a normal difference: 2 Phi(margin / error - 1.645) - 1.
    for changed, share in shown.items():
        error = math.sqrt(changed / 2700)
        assert share == pytest.approx(2 * norm.cdf(MARGIN / error - norm.isf(0.05)) - 1, abs=0.05)
    assert shown[0.04] > 0.95
    assert 0.55 < shown[0.1] < 0.8


TRUTHS = {"better": (0.03, 0.07), "worse": (0.07, 0.03), "equivalent": (0.02, 0.02)}


@pytest.mark.parametrize("kind", TRUTHS)
def test_the_kinds_of_known_truths(kind: str) -> None:
    found = findings({kind: verdicts(np.random.default_rng(1), 3000, *TRUTHS[kind])}, MARGIN)[kind]
    assert (found.kind, found.within) == (kind, kind == "equivalent")


def test_few_questions_resolve_nothing() -> None:
    found = findings({"few": verdicts(np.random.default_rng(1), 60, 0.05, 0.05)}, MARGIN)["few"]
    assert found.kind == "unresolved"
    assert found.needed is not None
    assert found.needed > 60


def test_a_difference_can_be_significant_and_within_the_margin() -> None:
    found = findings({"small": verdicts(np.random.default_rng(1), 40_000, 0.01, 0.015)}, MARGIN)["small"]
    assert (found.kind, found.within) == ("better", True)


@pytest.mark.parametrize(("lost", "won"), [(0.04, 0.05), (0.05, 0.05), (0.03, 0.05)])
def test_so_many_questions_resolve_it(lost: float, won: float) -> None:
    """Were the difference what it seems, so many questions show one of the two with the power that is promised, or more."""
    needed = findings({"seen": counted(round(lost * 200), round(won * 200), 200)}, MARGIN)["seen"].needed
    assert needed is not None
    generator = np.random.default_rng(5)
    drawn = [findings({0: counts(generator, needed, lost, won)}, MARGIN)[0].kind for _ in range(400)]
    assert np.mean([kind != "unresolved" for kind in drawn]) > POWER - 3 * math.sqrt(POWER * (1 - POWER) / 400)


def test_statements_on_one_page_are_corrected_together() -> None:
    """A few true differences among nothings: no more than a twentieth of the pages say anything wrong."""
    generator = np.random.default_rng(7)
    truths = dict.fromkeys(range(6), (0.03, 0.03)) | {6 + n: (0.03, 0.03 + MARGIN) for n in range(6)}
    wrong, pages = 0, 300
    for _ in range(pages):
        found = findings({name: counts(generator, 1500, *shares) for name, shares in truths.items()}, MARGIN)
        false = [n for n in range(6) if found[n].kind in ("better", "worse")] + [
            n for n in range(6, 12) if found[n].within
        ]
        wrong += bool(false)
    assert wrong / pages <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / pages)
    alone = counts(generator, 1500, 0.03, 0.05)
    one = findings({0: alone}, MARGIN)[0]
    many = findings(dict.fromkeys(range(10), alone), MARGIN)[0]
    assert many.difference_p == pytest.approx(min(1, 10 * one.difference_p)), (
        "ten statements, twenty tests, at most ten true"
    )


def test_holm_with_fewer_true_hypotheses_is_shaffer_s() -> None:
    p = {"a": 0.001, "b": 0.01, "c": 0.02, "d": 0.5}
    assert holm(p, most_true=2) == pytest.approx({"a": 0.002, "b": 0.02, "c": 0.04, "d": 0.5})
    assert holm(p, most_true=4) == holm(p)


def test_worlds_are_pooled_question_by_question() -> None:
    worlds = [([True, False, False], [True, True, False]), ([False, True], [True, False])]
    assert pooled(worlds) == pair([1, 0, 0, 0, 1], [1, 1, 0, 1, 0])
    assert pooled([([0.0, 1.0], [0.5, 1.0])]).t_p is not None, "means over seeds are no verdicts"


def test_no_error_resolves_nothing() -> None:
    same = Finding(pair([0.5, 0.5], [0.5, 0.5]), MARGIN, 1.0, 1.0, 0.05, 1)
    assert (same.kind, same.needed) == ("unresolved", None)
