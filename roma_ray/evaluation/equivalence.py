"""Better, worse, equal within a margin, or not known: what paired answers to the same questions say of a difference.

A difference that is not significant is no equality. Equality within a margin m is shown by two one-sided tests (Schuirmann 1987):
both D <= -m and D >= m must be rejected. Verdicts are tested by Tango's score test (Tango 1998, Statistics in Medicine 17), whose
variance is that under the hypothesis, so that it holds where few questions change; other values by t-tests.

Many statements on one page are corrected together. Of each difference two hypotheses are tested, "D = 0" and "|D| >= m", and at
most one of them is true: so of 2 M hypotheses at most M are, and Holm's factors go no higher than that (Shaffer 1986).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from roma_ray.evaluation.statistics import SIGNIFICANCE, Name, Paired, Values, holm, pair, significant

Kind = Literal["better", "worse", "equivalent", "unresolved"]
POWER = 0.8
"""With which the questions of `needed` would resolve a difference that is as large as it was found."""


@dataclass(frozen=True)
class Finding:
    """What is known of one paired difference (tuned - base), held against a margin in the measure's own units."""

    paired: Paired
    margin: float
    difference_p: float
    """Two-sided, of D = 0, corrected for all statements that were made together."""
    equivalence_p: float
    """Of |D| >= margin, corrected likewise."""
    level: float
    tests: int
    """Statements that were made together."""

    @property
    def within(self) -> bool:
        """Whether the difference is shown to be smaller than the margin, be it zero or not."""
        return significant(self.equivalence_p, self.level)

    @property
    def kind(self) -> Kind:
        """A significant difference goes by its sign, also one within the margin: `within` says that beside it."""
        if significant(self.difference_p, self.level):
            return "better" if self.paired.difference > 0 else "worse"
        return "equivalent" if self.within else "unresolved"

    @property
    def needed(self) -> int | None:
        """Questions that would resolve it with power POWER, were the difference what it seems; None where no error is known.

        The first of the two that would be shown counts: a difference, or equality within the margin.
        """
        from scipy.stats import norm

        error, found = self.paired.difference_stderr, abs(self.paired.difference)
        if not error:
            return None
        level = self.level / self.tests
        reach = norm.isf(level / 2) + norm.isf(1 - POWER)
        # Where the difference is nearly zero, either of the two one-sided tests may fail: each gets half of the misses.
        inside = norm.isf(level) + norm.isf((1 - POWER) / 2)
        steps = [reach * error / found] if found else []
        steps += [inside * error / (self.margin - found)] if found < self.margin else []
        # To two digits: more are not known.
        return int(float(f"{self.paired.n * min(steps) ** 2:.1e}"))


def findings(differences: Mapping[Name, Paired], margin: float, level: float = SIGNIFICANCE) -> dict[Name, Finding]:
    """What is known of each difference, all tests of all of them corrected together. Each must have been tested (no macro average)."""
    raw: dict[tuple[Name, str], float] = {}
    for name, paired in differences.items():
        assert paired.p is not None, "of a macro average no test was made"
        raw[name, "difference"] = paired.p
        raw[name, "equivalence"] = equivalence(paired, margin)
    corrected = holm(raw, most_true=len(differences))
    return {
        name: Finding(
            paired, margin, corrected[name, "difference"], corrected[name, "equivalence"], level, len(raw) // 2
        )
        for name, paired in differences.items()
    }


def equivalence(paired: Paired, margin: float) -> float:
    """p of |D| >= margin: the larger of the two one-sided tests'."""
    from scipy.stats import norm, t

    assert margin > 0, "an equivalence needs a margin"
    if paired.lost is not None and paired.won is not None:
        below = tango(paired.lost, paired.won, paired.n, -margin)
        above = tango(paired.lost, paired.won, paired.n, margin)
        return float(max(norm.sf(below), norm.cdf(above)))
    if not paired.difference_stderr:
        return 1.0
    slack = (margin - abs(paired.difference)) / paired.difference_stderr
    return float(t.sf(slack, paired.n - 1))


def tango(lost: int, won: int, n: int, difference: float) -> float:
    """Tango's score of H0: P(won) - P(lost) = difference, which is standard normal under it.

    Its variance is that of the likeliest P(lost), P(won) under the hypothesis.
    """
    a, c = 2 * n, -lost * difference * (1 - difference)
    b = -lost - won + (2 * n - won + lost) * difference
    likeliest_lost = (math.sqrt(b * b - 4 * a * c) - b) / (2 * a)
    variance = n * (2 * likeliest_lost + difference * (1 - difference))
    return (won - lost - n * difference) / math.sqrt(variance)


def pooled(parts: Iterable[tuple[Values, Values]]) -> Paired:
    """(base, tuned) values of several worlds, question by question as one: what holds on average of the questions of these worlds.

    Of several seeds of training, give each question's mean over them: seeds of the same questions are no further questions.
    """
    bases, tuned = zip(*((np.asarray(b, dtype=float), np.asarray(t, dtype=float)) for b, t in parts), strict=True)
    return pair(np.concatenate(bases), np.concatenate(tuned))
