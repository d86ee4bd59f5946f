"""The statistics of a sweep's tables."""

from __future__ import annotations

import math

import numpy as np
import pytest

from roma_ray.ablations.report import headline
from roma_ray.ablations.results import Findings, Paired, Result, paired
from roma_ray.evaluation.statistics import compare


def test_one_seed_is_the_paired_comparison() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.random(200) < 0.5, rng.random(200) < 0.6
    found, expected = paired([before], [after]), compare(before, after)
    assert found.difference == expected["difference"]
    assert found.stderr == pytest.approx(expected["difference_stderr"])
    assert found.p == expected["mcnemar_p"]


def test_several_seeds_average_each_question_first() -> None:
    """The questions are drawn once: seeds of the same question are no further questions."""
    rng = np.random.default_rng(1)
    before, after = rng.random((3, 50)) < 0.5, rng.random((3, 50)) < 0.7
    found = paired(list(before), list(after))
    means = [sum(int(a[q]) - int(b[q]) for a, b in zip(after, before, strict=True)) / 3 for q in range(50)]
    mean = sum(means) / 50
    error = math.sqrt(sum((m - mean) ** 2 for m in means) / 49 / 50)
    assert found.difference == pytest.approx(mean)
    assert found.stderr == pytest.approx(error)
    from scipy.stats import ttest_1samp

    assert found.p == pytest.approx(ttest_1samp(means, 0).pvalue)
    assert paired([before[0]] * 2, [before[0]] * 2).p == 1.0


def result(name: str, validation: float, gain: float, to_centre: Paired | None = None) -> Result:
    found = Paired(gain, 0.01, 0.5)
    return Result(name, (), name == "centre", (0,), validation, 0.5, 0.01, found, to_centre, None, ())


def test_the_headline_says_no_more_than_was_found() -> None:
    """Equals of the centre are not called worse, and a centre that is not finished is not called the best."""

    def told(*results: Result) -> str:
        return headline(Findings(results, 0.5, 0.01, 0.5, 836))

    centre, equal = result("centre", 0.57, -0.001), result("k = 1", 0.57, 0.002, Paired(0.003, 0.01, 0.5, 0.5))
    assert told(centre, equal) == (
        "No setting is better on validation questions than the centre (57.00 %). On 836 test questions it gains "
        "-0.10 ± 1.00 points on the base model."
    )
    assert told(result("k = 1", 0.58, 0.002)) == (
        "Best on validation questions: k = 1 (58.00 %); the centre is not finished. On 836 test questions it gains "
        "+0.20 ± 1.00 points on the base model."
    )
    near = Paired(0.1, 0.01, 0.001, 0.02)
    better = result("k = 5", 0.6, 0.1, near)
    assert "the centre 57.00 %). On 836 test questions it differs from the centre by +10.00" in told(better, centre)
    assert "p = 0.02 after correction" in told(better, centre)
    assert "no clear difference" in told(result("k = 1", 0.58, 0.0, equal.to_centre), centre)
    assert "k = 5 (60.00 %, as 1 other, the centre 57.00 %)" in told(better, result("k = 9", 0.6, 0.1, near), centre)
