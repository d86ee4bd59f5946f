"""Which answers a model gives: the share of each position, and of each label where a task's choices recur (yes and no, say).

A model that has come to prefer one answer can win or lose questions without knowing more or less of any. So each task's
difference is computed again with every model's own preference taken out: from each choice's log-probability among its question's
choices, the model's mean log-probability of that position (or label) over the task's questions is subtracted, and the highest
remainder answers. A significant difference *lives in the shift alone* when what is left of it is within one standard error
of zero, or has the other sign.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from roma_ray.borders.text import figure
from roma_ray.evaluation.measures import Asked, log_softmax
from roma_ray.evaluation.statistics import Paired, pair, significant
from roma_ray.questions.prompts import rule_scores
from roma_ray.questions.records import LETTERS

_RECURRING = 0.1
"""A choice's text is a label where it is offered by at least this share of its task's questions, and by two."""


def answer_shares(
    base: Sequence[Sequence[float]],
    tuned: Sequence[Sequence[float]],
    asked: Asked,
    choices: Sequence[Sequence[str]],
) -> dict[str, Any]:
    """{task: {positions, labels, shift}} of two models' scores of the same questions; `choices` are their texts.

    positions, labels   {name: {gold, base, tuned}}: the share of the questions whose right answer it is, and that each
                        model answers so; `labels` is null where the choices are no labels
    shift               one record for each of the two that there is, `by` position or label: the figures of
                        the task's difference, `plain` and `corrected`, and whether the first lives in the shift `alone`
    """
    names = np.asarray(asked.tasks)
    models = {"base": base, "tuned": tuned}
    values = {
        name: [rule_scores(s, c, asked.rule) for s, c in zip(scores, asked.chars, strict=True)]
        for name, scores in models.items()
    }
    result = {}
    for task in sorted(set(asked.tasks)):
        rows = np.flatnonzero(names == task).tolist()
        gold = [asked.answers[row] for row in rows]
        own = {name: [values[name][row] for row in rows] for name in models}
        keys = {"position": [list(LETTERS[: len(choices[row])]) for row in rows]}
        if is_labelled([choices[row] for row in rows]):
            keys["label"] = [list(choices[row]) for row in rows]
        result[task] = {
            "positions": _shares(keys["position"], gold, own),
            "labels": _shares(keys["label"], gold, own) if "label" in keys else None,
            "shift": [{"by": by, **shift(found, gold, own["base"], own["tuned"])} for by, found in keys.items()],
        }
    return result


def is_labelled(choices: Sequence[Sequence[str]]) -> bool:
    """Whether the choices of a task's questions are labels: every text recurs."""
    offered = Counter(text for texts in choices for text in texts)
    return min(offered.values()) >= max(2, _RECURRING * len(choices))


def _shares(
    keys: Sequence[Sequence[str]], gold: Sequence[int], values: Mapping[str, Sequence[np.ndarray]]
) -> dict[str, dict[str, float]]:
    chosen = {
        "gold": Counter(key[right] for key, right in zip(keys, gold, strict=True)),
        **{
            name: Counter(key[int(v.argmax())] for key, v in zip(keys, own, strict=True))
            for name, own in values.items()
        },
    }
    names = sorted({name for key in keys for name in key})
    return {name: {who: counts[name] / len(keys) for who, counts in chosen.items()} for name in names}


def shift(
    keys: Sequence[Sequence[str]],
    gold: Sequence[int],
    base: Sequence[np.ndarray],
    tuned: Sequence[np.ndarray],
) -> dict[str, Any]:
    """{plain, corrected, alone}: the paired difference as it is, and without either model's preference for a key."""
    plain = pair(_verdicts(base, gold), _verdicts(tuned, gold))
    corrected = pair(_verdicts(unbiased(base, keys), gold), _verdicts(unbiased(tuned, keys), gold))
    return {"plain": plain.plain(), "corrected": corrected.plain(), "alone": lives_in_shift(plain, corrected)}


def lives_in_shift(plain: Paired, corrected: Paired) -> bool:
    """Whether a difference is only a shift between answers: significant as it is, but within its error or reversed once corrected."""
    gone = abs(corrected.difference) <= corrected.difference_stderr
    reversed_ = corrected.difference * plain.difference < 0
    return significant(plain.p) and (gone or reversed_)


def unbiased(values: Sequence[np.ndarray], keys: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """Log-probabilities of the choices, less the model's mean log-probability of each choice's key over the questions."""
    logp = [log_softmax(v) for v in values]
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for own, names in zip(logp, keys, strict=True):
        for value, name in zip(own.tolist(), names, strict=True):
            sums[name] += value
            counts[name] += 1
    return [
        own - np.array([sums[name] / counts[name] for name in names]) for own, names in zip(logp, keys, strict=True)
    ]


def _verdicts(values: Sequence[np.ndarray], gold: Sequence[int]) -> np.ndarray:
    return np.array([float(int(v.argmax()) == right) for v, right in zip(values, gold, strict=True)])


def shift_notes(shares: Mapping[str, Any], before: str = "the base model", after: str = "the tuned model") -> list[str]:
    """A sentence for every task whose difference lives in a shift between answers alone; the two models by name."""
    lines = []
    for task, found in shares.items():
        for by in found["shift"]:
            if by["alone"]:
                shares_of = found["labels"] if by["by"] == "label" else found["positions"]
                name, moved = max(shares_of.items(), key=lambda item: abs(item[1]["tuned"] - item[1]["base"]))
                plain, left = (figure(by[key], "difference") for key in ("plain", "corrected"))
                lines.append(
                    f"{task}: the difference of {plain} points lives in a shift between answers alone ({name!r} is "
                    f"{moved['base']:.0%} of the answers of {before}, {moved['tuned']:.0%} of those of {after}, and right for "
                    f"{moved['gold']:.0%}); with each model's preference for a {by['by']} taken out, {left} points remain"
                )
                break
    return lines
