"""Held-out tasks beside trained ones: what tuning gave to tasks whose questions it never saw.

As data, `held_out` of a summary: {"tasks": the held-out ones, "groups": {"trained tasks", "held-out tasks", "other tasks" (neither
trained on nor named as held out), those that there are: {"tasks", "accuracy": paired figures of verdicts by the configured rule,
over questions, "measures" {measure: {micro, macro: null for one task}}}}, "ctgi": {measure: see `ctgi`}}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from roma_ray.borders.text import figure, with_error
from roma_ray.evaluation.measures import form_of, pair_by_task
from roma_ray.evaluation.statistics import bootstrap_means, compare, p_value, standard_error

TRAINED, HELD_OUT, OTHER = "trained tasks", "held-out tasks", "other tasks"
ALL = "all, trained or not"
"""What a table calls all questions where some are of held-out tasks."""
# Sums of shares that cancel leave last bits; a gain of so little is none.
_NOTHING = 1e-12
_SEED = 0
Values = Mapping[str, np.ndarray]


def group_of(task: str, trained: Set[str], held_out: Sequence[str]) -> str:
    """Which group a task is told in."""
    return HELD_OUT if task in held_out else TRAINED if task in trained else OTHER


def by_group(
    base: Values,
    tuned: Values,
    tasks: Sequence[str],
    trained: Set[str],
    held_out: Sequence[str],
    configured: str,
    *,
    likelihood: str = "choice_logp",
) -> dict[str, Any]:
    """The groups' figures and the index, from every measure's values of the test questions; `configured` judges the answers.

    The index is of that and of `likelihood`, which moves with every question.
    """
    names = np.asarray(tasks)
    members: dict[str, list[str]] = {group: [] for group in (TRAINED, HELD_OUT, OTHER)}
    for task in sorted(set(tasks)):
        members[group_of(task, trained, held_out)].append(task)
    groups = {}
    for group, own in members.items():
        if own:
            mask = np.isin(names, own)
            found = {name: pair_by_task(base[name][mask], tuned[name][mask], names[mask].tolist()) for name in base}
            groups[group] = {
                "tasks": own,
                "accuracy": compare(base[configured][mask], tuned[configured][mask]),
                "measures": {
                    name: {"micro": one.micro.plain(), "macro": one.macro.plain() if one.macro else None}
                    for name, one in found.items()
                },
            }
    gains = {name: {task: (tuned[name] - base[name])[names == task] for task in set(tasks)} for name in base}
    return {
        "tasks": members[HELD_OUT],
        "groups": groups,
        "ctgi": {
            name: ctgi(*([gains[name][task] for task in members[group]] for group in (TRAINED, HELD_OUT)))
            for name in (configured, likelihood)
        },
    }


def ctgi(
    trained: Sequence[np.ndarray],
    held_out: Sequence[np.ndarray],
    *,
    seed: int = _SEED,
    resamples: int = 10_000,
    level: float = 0.95,
) -> dict[str, Any]:
    """The cross-task generalization index: mean gain on held-out tasks over mean gain on trained tasks, every task counted once.

    `trained`, `held_out`: each task's paired gains, question by question. The interval is a percentile bootstrap over questions
    within tasks. A resample whose trained gain is not above zero has no ratio: it counts as lying below every ratio for the
    lower end and above every one for the upper end, so the interval is unbounded (null) once such resamples are more than each
    tail may hold. Keys: value (null: the trained gain is not above zero), low, high (null: unbounded, or no value), trained_gain,
    held_out_gain (null: no such task) with their `_stderr`, undefined (share of such resamples), level, resamples.
    """
    gains = {"trained_gain": trained, "held_out_gain": held_out}
    found: dict[str, Any] = {"value": None, "low": None, "high": None}
    for name, tasks in gains.items():
        found[name] = sum(float(own.mean()) for own in tasks) / len(tasks) if tasks else None
        found[f"{name}_stderr"] = (
            math.sqrt(sum(standard_error(own) ** 2 for own in tasks)) / len(tasks) if tasks else None
        )
    found |= {"undefined": None, "level": level, "resamples": resamples}
    if not trained or not held_out:
        return found
    generator = np.random.default_rng(seed)
    below, above = (bootstrap_means(tasks, generator, resamples) for tasks in (trained, held_out))
    defined = below > _NOTHING
    found["undefined"] = float(1 - defined.mean())
    if found["trained_gain"] <= _NOTHING:
        return found
    found["value"] = found["held_out_gain"] / found["trained_gain"]
    ratios = np.divide(above, below, out=np.full(resamples, np.nan), where=defined)
    tail = (1 - level) / 2
    low = float(np.quantile(np.where(defined, ratios, -np.inf), tail, method="lower"))
    high = float(np.quantile(np.where(defined, ratios, np.inf), 1 - tail, method="higher"))
    if math.isfinite(low) and math.isfinite(high):
        found |= {"low": low, "high": high}
    return found


def ctgi_words(found: Mapping[str, Any]) -> str:
    """The index in words, or why there is none."""
    if found["trained_gain"] is None or found["held_out_gain"] is None:
        return "undefined: there are no test questions of both trained and held-out tasks"
    if found["value"] is None:
        return "undefined: the mean gain on trained tasks is not above zero"
    if found["low"] is None:
        return (
            f"{found['value']:.2f}, its {found['level']:.0%} interval unbounded: in {found['undefined']:.1%} of {found['resamples']:,} "
            "resamples the gain on trained tasks is not above zero"
        )
    return f"{found['value']:.2f} ({found['level']:.0%} interval {found['low']:.2f} to {found['high']:.2f})"


def ctgi_cell(found: Mapping[str, Any]) -> str:
    """The index in a table's cell, with its interval."""
    if found["value"] is None:
        return "undefined"
    interval = "unbounded" if found["low"] is None else f"{found['low']:.2f} to {found['high']:.2f}"
    return f"{found['value']:.2f} ({interval})"


HEADER = ("measure", "trained tasks", "held-out tasks", "CTGI")
LEGEND = (
    "Mean gain of the tasks, each counted once, ± standard error over questions. CTGI, the cross-task generalization index: the gain "
    "on held-out tasks over that on trained tasks, with a 95 % bootstrap interval over questions within tasks; undefined where the "
    "gain on trained tasks is not above zero, unbounded where that is so in too many resamples."
)


def ctgi_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The index by measure as text under `HEADER`."""
    return [
        (
            name,
            *(gain_text(name, one, which) for which in ("trained_gain", "held_out_gain")),
            ctgi_cell(one),
        )
        for name, one in found["ctgi"].items()
    ]


def gain_text(measure: str, found: Mapping[str, Any], which: str) -> str:
    """A gain of the index's record (`trained_gain`, `held_out_gain`) with its error and unit."""
    if found[which] is None:
        return ""
    form = form_of(measure)
    text = with_error(found[which], found[f"{which}_stderr"], scale=form.scale, digits=form.finer, signed=True)
    return f"{text} {'points' if form.unit == '%' else form.unit}"


def transfer_words(found: Mapping[str, Any]) -> str:
    """Both groups and the index in a sentence each."""
    told = [
        f"{group[0].upper()}{group[1:]} ({', '.join(one['tasks'])}): {figure(one['accuracy'], 'difference')} points on "
        f"{one['accuracy']['n']} questions, McNemar's exact p {p_value(one['accuracy']['mcnemar_p'])}."
        for group, one in found["groups"].items()
    ]
    configured = next(iter(found["ctgi"].values()))
    return " ".join([*told, f"CTGI {ctgi_words(configured)}."])


def held_out_notes(found: Mapping[str, Any] | None) -> list[str]:
    """What a reader of figures over all questions must know where some are of held-out tasks."""
    if found is None:
        return []
    counts = {group: one["accuracy"]["n"] for group, one in found["groups"].items()}
    return [
        f"{counts.get(HELD_OUT, 0):,} of {sum(counts.values()):,} test questions are of held-out tasks ({', '.join(found['tasks'])}), of "
        "which nothing was trained on: figures over all questions mix them with trained tasks, and the tables tell them apart"
    ]


def listed(
    figures: Mapping[str, Mapping[str, Any]], held_out: Mapping[str, Any] | None = None
) -> list[tuple[str, Mapping[str, Any]]]:
    """One split's comparisons by the name of their line: tasks by name, `all` last; with held-out tasks group by group."""
    if held_out is None:
        return [(name, figures[name]) for name in sorted(figures, key=lambda name: (name == "all", name))]
    lines: list[tuple[str, Mapping[str, Any]]] = []
    for group, one in held_out["groups"].items():
        lines += [(task, figures[task]) for task in one["tasks"]]
        lines.append((group, one["accuracy"]))
    return [*lines, (ALL, figures["all"])]
