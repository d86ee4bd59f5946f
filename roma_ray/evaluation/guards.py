"""Guards against results that are none: each returns plain findings; only an identical model is an error."""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from roma_ray.errors import IdenticalError

TRUNCATED_LIMIT = 0.01
Text = tuple[str, Sequence[str]]
"""A question's text and its choices."""
Key = TypeVar("Key")


def check_not_identical(base: Sequence[Sequence[float]], tuned: Sequence[Sequence[float]]) -> None:
    """Raise IdenticalError when every score of the tuned model equals the base's: the tuning did not reach the evaluation."""
    if all(list(b) == list(t) for b, t in zip(base, tuned, strict=True)):
        raise IdenticalError(
            "the tuned model's scores equal the base model's on every question: the exported routers are not those that were "
            "trained, or nothing was. Inspect the adapter with `roma-ray inspect`."
        )


def beside_chance(correct: int, choices: Sequence[int]) -> str | None:
    """`at_chance` within two standard errors of guessing, `below_chance` under that, else None; choices: options of each question.

    Who guesses is at chance; who is below it prefers wrong answers, which only a prompt or an answer key can make a model do.
    """
    if not choices:
        return None
    chance = sum(1 / c for c in choices)
    error = math.sqrt(sum(1 / c * (1 - 1 / c) for c in choices))
    if correct < chance - 2 * error:
        return "below_chance"
    return "at_chance" if correct <= chance + 2 * error else None


def by_chance(found: Iterable[tuple[str, str | None]]) -> dict[str, list[str]]:
    """The names (`base/task`) that are at chance and those below it, from what `beside_chance` says of each."""
    listed: dict[str, list[str]] = {"at_chance": [], "below_chance": []}
    for name, kind in found:
        if kind is not None:
            listed[kind].append(name)
    return listed


def chance_notes(guards: Mapping[str, Any]) -> list[str]:
    """Both findings in sentences, those that there are."""
    lines = []
    if guards["at_chance"]:
        lines.append(f"at chance level (within two standard errors of guessing): {', '.join(guards['at_chance'])}")
    if guards["below_chance"]:
        lines.append(
            "below chance level (more than two standard errors under guessing), which points at the prompt, its format or the "
            f"answer key, not at the routers: {', '.join(guards['below_chance'])}"
        )
    return lines


def normalise(text: str) -> str:
    """Lower case, NFKC, letters and digits only: what a trivially reworded copy of a question has in common with it."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\W_]+", " ", folded).strip()


_FOLDS: dict[str, Callable[[str], str]] = {"exact": str, "normalised": normalise}
"""When two texts are alike: letter for letter, or normalised."""


def occurring(
    training: Sequence[Text], asked: Iterable[tuple[Key, Text]], same: Callable[[str, set[str], set[str]], bool]
) -> dict[str, list[Key]]:
    """Which of the asked questions (key, text and choices) occur in training: {exact, normalised}, by their keys.

    A question occurs where its text does and `same`, of that text, its choices and the trained ones, says so.
    """
    questions, found = list(asked), {}
    for name, fold in _FOLDS.items():
        index: dict[str, list[set[str]]] = {}
        for text, choices in training:
            index.setdefault(fold(text), []).append(set(map(fold, choices)))
        found[name] = [
            key
            for key, (text, choices) in questions
            if any(same(fold(text), set(map(fold, choices)), others) for others in index.get(fold(text), ()))
        ]
    return found


def overlap(train: Iterable[Text], test: Iterable[Text]) -> dict[str, int]:
    """How many test questions (text, choices) also occur in training, with the same choices as a set: {exact, normalised}.

    Each is gone through once; of the test questions digests are kept, of the trained ones nothing.
    """
    asked: dict[str, Counter[bytes]] = {name: Counter() for name in _FOLDS}
    for question in test:
        for name, fold in _FOLDS.items():
            asked[name][_digest(question, fold)] += 1
    found = dict.fromkeys(_FOLDS, 0)
    for question in train:
        for name, fold in _FOLDS.items():
            found[name] += asked[name].pop(_digest(question, fold), 0)
    return found


def _digest(question: Text, fold: Callable[[str], str]) -> bytes:
    """128 bits of BLAKE2b: of ten million questions no two share them but with a chance of 1e-25."""
    text, choices = question
    said = json.dumps([fold(text), *sorted(set(map(fold, choices)))])
    return hashlib.blake2b(said.encode(), digest_size=16).digest()
