"""The statistics of a sweep's tables."""

from __future__ import annotations

import math

import numpy as np
import pytest

from roma_ray.ablations.results import holm, paired
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


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == {0.01: pytest.approx(0.03), 0.03: pytest.approx(0.06), 0.04: pytest.approx(0.06)}
    assert holm([0.02, 0.02]) == {0.02: pytest.approx(0.04)}
    assert holm([0.9, 0.8]) == {0.8: 1.0, 0.9: 1.0}
    assert holm([]) == {}
