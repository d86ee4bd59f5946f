"""Paired statistics of two models' answers to the same questions: pure functions over verdicts and other values."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from roma_ray.borders.text import with_error as with_error

SIGNIFICANCE = 0.05
_DRAWN_AT_ONCE = 2**22
Name = TypeVar("Name", bound=Hashable)
Values = Sequence[bool] | Sequence[float] | np.ndarray


def accuracy(correct: Values) -> float:
    """Fraction of right answers; of other values their mean."""
    return float(np.mean(correct))


def standard_error(correct: Values) -> float:
    """Standard error of an accuracy: sample standard deviation (n - 1) over sqrt(n), as lm-evaluation-harness; 0 for n < 2."""
    values = np.asarray(correct, dtype=float)
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def relative_change(base: np.ndarray, tuned: np.ndarray) -> tuple[float, np.ndarray]:
    """(mean of tuned / mean of base - 1, each question's part in it): the standard error of the first is that of the second.

    Linearised, as of any ratio of means; 0 where the base's mean is.
    """
    mean = float(base.mean())
    if not mean:
        return 0.0, np.zeros(len(base))
    ratio = float(tuned.mean()) / mean
    return ratio - 1, (tuned - ratio * base) / mean


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


@dataclass(frozen=True)
class Paired:
    """Two models on the same questions by one measure, whatever it is: means, standard errors over questions, their difference.

    Of a macro average, the mean of the tasks' means: `n` counts its questions, and neither test is made.
    """

    n: int
    base: float
    base_stderr: float
    tuned: float
    tuned_stderr: float
    difference: float
    difference_stderr: float
    """Of the differences, question by question."""
    lost: int | None = None
    """Questions that only the base answers rightly; this, `won` and McNemar's p where every value is 0 or 1, else None."""
    won: int | None = None
    mcnemar_p: float | None = None
    t_p: float | None = None
    """Paired t-test over questions, where the values are no verdicts."""

    @property
    def p(self) -> float | None:
        """That of the test that was made."""
        return self.t_p if self.mcnemar_p is None else self.mcnemar_p

    def plain(self) -> dict[str, Any]:
        """As data: the fields by name."""
        return asdict(self)


def pair(base: Values, tuned: Values) -> Paired:
    """Every paired figure of two models' values (verdicts, log-likelihoods, means over seeds) on the same questions."""
    before, after = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
    assert before.shape == after.shape, "paired statistics need the same questions"
    means = (accuracy(before), standard_error(before), accuracy(after), standard_error(after))
    difference, error = float((after - before).mean()), standard_error(after - before)
    if np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all():
        lost, won = changes(before == 1, after == 1)
        return Paired(len(before), *means, difference, error, lost, won, mcnemar(before == 1, after == 1))
    return Paired(len(before), *means, difference, error, t_p=_t_test(difference, error, len(before)))


def _t_test(difference: float, error: float, n: int) -> float:
    """Two-sided p of a mean difference with this standard error over n questions; 1 where no error is known."""
    from scipy.stats import t

    return float(2 * t.sf(abs(difference) / error, n - 1)) if error else 1.0


def macro(parts: Iterable[Paired]) -> Paired | None:
    """The unweighted mean over tasks; None for fewer than two. Tasks are independent, so their variances add up."""
    tasks = list(parts)
    if len(tasks) < 2:
        return None

    def mean(name: str) -> float:
        return sum(getattr(part, name) for part in tasks) / len(tasks)

    def error(name: str) -> float:
        return math.sqrt(sum(getattr(part, name) ** 2 for part in tasks)) / len(tasks)

    return Paired(
        sum(part.n for part in tasks),
        mean("base"),
        error("base_stderr"),
        mean("tuned"),
        error("tuned_stderr"),
        mean("difference"),
        error("difference_stderr"),
    )


def compare(base: Values, tuned: Values) -> dict[str, Any]:
    """The paired figures of verdicts, as the summary's `splits` names them: `base_accuracy` for `base`, `tuned_accuracy`."""
    found = pair(base, tuned).plain()
    del found["t_p"]
    return {{"base": "base_accuracy", "tuned": "tuned_accuracy"}.get(key, key): value for key, value in found.items()}


def summarise_values(values: Sequence[float]) -> dict[str, Any]:
    """One model's figures of one metric: {n, base, base_stderr}."""
    return {"n": len(values), "base": accuracy(np.asarray(values)), "base_stderr": standard_error(np.asarray(values))}


def significant(p: float | None, level: float = SIGNIFICANCE) -> bool:
    """The one rule: a difference is significant when p is below the level; at the level exactly nothing is shown."""
    return p is not None and p < level


def holm(p_values: Mapping[Name, float], most_true: int | None = None) -> dict[Name, float]:
    """Holm's step-down correction: each name's corrected p, to be held against the level by `significant`.

    `most_true`: how many of the hypotheses can be true at once, where that is fewer than all (Shaffer 1986).
    """
    corrected: dict[Name, float] = {}
    highest = 0.0
    most = len(p_values) if most_true is None else most_true
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, min(most, len(p_values) - rank) * p_values[name]))
        corrected[name] = highest
    return corrected


def p_value(p: float) -> str:
    """The one form of a p-value: three digits; very small ones as a bound."""
    return "< 1e-6" if p < 1e-6 else f"{p:.3g}"


def bootstrap_interval(
    differences: Sequence[np.ndarray], *, seed: int, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean paired difference; of several arrays: of the mean of their means (macro average).

    Questions are drawn with replacement, within each array. Equal differences are drawn together: their counts are
    multinomial, which is the same draw.
    """
    total = bootstrap_means(differences, np.random.default_rng(seed), resamples)
    low, high = np.quantile(total, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_means(differences: Sequence[np.ndarray], generator: np.random.Generator, resamples: int) -> np.ndarray:
    """[resamples] means of the arrays' means, each of questions drawn with replacement within their array."""
    total = np.zeros(resamples)
    for values in differences:
        kinds, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
        if len(kinds) <= 16:
            drawn = generator.multinomial(len(values), counts / counts.sum(), size=resamples)
            total += drawn @ kinds / len(values)
        else:
            own = np.asarray(values, dtype=float)
            for part in np.array_split(np.arange(resamples), max(1, resamples * len(own) // _DRAWN_AT_ONCE)):
                total[part] += own[generator.integers(len(own), size=(len(part), len(own)))].mean(1)
    total /= len(differences)
    return total


def hierarchical_interval(
    differences_SN: np.ndarray, *, seed: int, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of a mean difference over seeds of training and questions, [seeds, N]: both are drawn with replacement.

    With one seed it is that over questions. A few seeds say little of all seeds: three have 27 draws.
    """
    generator = np.random.default_rng(seed)
    seeds, questions = differences_SN.shape
    totals = []
    for part in np.array_split(np.arange(resamples), max(1, resamples * questions // _DRAWN_AT_ONCE)):
        # How often each seed and each question is drawn stands for the draws themselves.
        of_seed = generator.multinomial(seeds, [1 / seeds] * seeds, size=len(part))
        of_question = generator.multinomial(questions, [1 / questions] * questions, size=len(part))
        totals.append(((of_seed @ differences_SN) * of_question).sum(1) / (seeds * questions))
    low, high = np.quantile(np.concatenate(totals), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
