"""Guards against results that are none: each returns plain findings; only an identical model is an error."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

from roma_ray.errors import GuardError

TRUNCATED_LIMIT = 0.01


def check_not_identical(base: Sequence[Sequence[float]], tuned: Sequence[Sequence[float]]) -> None:
    """Raise GuardError when every score of the tuned model equals the base's: the tuning did not reach the evaluation."""
    if all(list(b) == list(t) for b, t in zip(base, tuned, strict=True)):
        raise GuardError(
            "the tuned model's scores equal the base model's on every question: the exported routers are not those that were "
            "trained, or nothing was. Inspect the adapter with `roma-ray inspect`."
        )


def at_chance(correct: int, choices: Sequence[int]) -> bool:
    """Whether an accuracy lies within two standard errors of guessing, or below; choices: options of each question."""
    if not choices:
        return False
    chance = sum(1 / c for c in choices) / len(choices)
    error = math.sqrt(sum(1 / c * (1 - 1 / c) for c in choices)) / len(choices)
    return correct / len(choices) <= chance + 2 * error


def normalise(text: str) -> str:
    """Lower case, NFKC, letters and digits only: what a trivially reworded copy of a question has in common with it."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\W_]+", " ", folded).strip()


def overlap(train: Sequence[tuple[str, Sequence[str]]], test: Sequence[tuple[str, Sequence[str]]]) -> dict[str, int]:
    """How many test questions (text, choices) also occur in training: same text and choices as a set, exact and normalised."""
    exact = {(text, frozenset(choices)) for text, choices in train}
    folded = {(normalise(text), frozenset(map(normalise, choices))) for text, choices in train}
    return {
        "exact": sum((text, frozenset(choices)) in exact for text, choices in test),
        "normalised": sum((normalise(text), frozenset(map(normalise, choices))) in folded for text, choices in test),
    }
