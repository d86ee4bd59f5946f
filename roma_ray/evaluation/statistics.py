"""Paired statistics of two models' answers to the same questions. Pure functions over boolean verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def accuracy(correct: Sequence[bool] | np.ndarray) -> float:
    """Fraction of right answers."""
    return float(np.mean(correct))


def standard_error(correct: Sequence[bool] | np.ndarray) -> float:
    """Standard error of an accuracy: sample standard deviation (n - 1) over sqrt(n), as lm-evaluation-harness; 0 for n < 2."""
    values = np.asarray(correct, dtype=float)
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def mcnemar(base: Sequence[bool] | np.ndarray, tuned: Sequence[bool] | np.ndarray) -> float:
    """Exact two-sided McNemar p: binomial test of the questions on which exactly one model is right; 1 where there is none."""
    from scipy.stats import binomtest

    lost, won = changes(base, tuned)
    return float(binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def changes(base: Sequence[bool] | np.ndarray, tuned: Sequence[bool] | np.ndarray) -> tuple[int, int]:
    """(lost, won): questions that only the base, and that only the tuned model, answers rightly."""
    before, after = np.asarray(base, dtype=bool), np.asarray(tuned, dtype=bool)
    assert before.shape == after.shape, "paired statistics need the same questions"
    return int((before & ~after).sum()), int((~before & after).sum())


def compare(base: Sequence[bool] | np.ndarray, tuned: Sequence[bool] | np.ndarray) -> dict[str, Any]:
    """Everything that a table says of two models on the same questions."""
    lost, won = changes(base, tuned)
    difference = np.asarray(tuned, dtype=float) - np.asarray(base, dtype=float)
    return {
        "n": len(difference),
        "base_accuracy": accuracy(base),
        "base_stderr": standard_error(base),
        "tuned_accuracy": accuracy(tuned),
        "tuned_stderr": standard_error(tuned),
        "difference": float(difference.mean()),
        "difference_stderr": float(difference.std(ddof=1) / math.sqrt(len(difference))) if len(difference) > 1 else 0.0,
        "lost": lost,
        "won": won,
        "mcnemar_p": mcnemar(base, tuned),
    }


def summarise_values(values: Sequence[float]) -> dict[str, Any]:
    """One model's figures of one metric: {n, base, base_stderr}."""
    return {"n": len(values), "base": accuracy(np.asarray(values)), "base_stderr": standard_error(np.asarray(values))}


def compare_values(base: Sequence[float], tuned: Sequence[float]) -> dict[str, Any]:
    """Paired figures of one metric; lost, won and McNemar's p where every value is 0 or 1 (a verdict), else None."""
    before, after = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
    difference = after - before
    verdicts = bool(np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all())
    lost, won = changes(before == 1, after == 1) if verdicts else (None, None)
    return {
        "n": len(before),
        "base": accuracy(before),
        "base_stderr": standard_error(before),
        "tuned": accuracy(after),
        "tuned_stderr": standard_error(after),
        "difference": float(difference.mean()),
        "difference_stderr": standard_error(difference),
        "lost": lost,
        "won": won,
        "mcnemar_p": mcnemar(before == 1, after == 1) if verdicts else None,
    }


def bootstrap_interval(
    differences: Sequence[np.ndarray], *, seed: int, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean paired difference; of several arrays: of the mean of their means (macro average).

    Questions are drawn with replacement, within each array. Equal differences are drawn together: their counts are
    multinomial, which is the same draw.
    """
    generator = np.random.default_rng(seed)
    total = np.zeros(resamples)
    for values in differences:
        kinds, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
        if len(kinds) <= 16:
            drawn = generator.multinomial(len(values), counts / counts.sum(), size=resamples)
            total += drawn @ kinds / len(values)
        else:
            for n in range(resamples):
                total[n] += generator.choice(values, len(values)).mean()
    total /= len(differences)
    low, high = np.quantile(total, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
