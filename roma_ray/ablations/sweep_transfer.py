"""Settings of a sweep that hold tasks out: what each gives to trained and to held-out tasks, and what holding out costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from roma_ray.ablations.factors import columns
from roma_ray.ablations.sweep import Sweep
from roma_ray.ablations.sweep_results import Findings, SettingResult
from roma_ray.borders.text import figure
from roma_ray.evaluation.statistics import macro
from roma_ray.evaluation.transfer import HELD_OUT, LEGEND, TRAINED, ctgi, ctgi_cell, gain_text
from roma_ray.figures.report_tables import Table

_HEADER = ("held-out tasks", "gain, trained tasks", "gain, held-out tasks", "CTGI", "held-out tasks, to centre")
TRANSFER_LEGEND = (
    f"{LEGEND} To centre: the paired difference on the held-out tasks, "
    "so what is lost by not training on them as the centre does."
)


def held_out_table(sweep: Sweep, findings: Findings) -> Table | None:
    """A row for each setting that holds tasks out, of the accuracy its answers are chosen by; None where none does."""
    varied = columns(sweep.space)
    rows = []
    for result in findings.results:
        first = result.finished[0]
        if first.held_out is None:
            continue
        groups = first.held_out["groups"]
        found = ctgi(*(_gains(result, groups.get(name, {"tasks": []})["tasks"]) for name in (TRAINED, HELD_OUT)))
        rows.append(
            (
                *(column.level(result.trial) for column in varied),
                ", ".join(first.held_out["tasks"]),
                *(gain_text(first.measure, found, which) for which in ("trained_gain", "held_out_gain")),
                ctgi_cell(found),
                _to_centre(result, first.held_out["tasks"]),
            )
        )
    return Table((*(column.name for column in varied), *_HEADER), rows, names=len(varied) + 1) if rows else None


def _gains(result: SettingResult, tasks: Sequence[str]) -> list[np.ndarray]:
    """Each task's gains over the base model, question by question, means over seeds."""
    own = np.mean([f.tuned[f.measure] - f.base[f.measure] for f in result.finished], axis=0)
    names = np.asarray(result.finished[0].judged.asked.tasks)
    return [own[names == task] for task in tasks]


def _to_centre(result: SettingResult, tasks: Sequence[str]) -> str:
    if result.to_centre is None:
        return "centre" if result.centre else "not paired"
    parts = [result.to_centre.judged.tasks[task] for task in tasks]
    return figure(vars(macro(parts) or parts[0]), "difference")


def _held_out(findings: Findings) -> set[tuple[str, ...]]:
    return {tuple(f.held_out["tasks"]) if f.held_out else () for r in findings.results for f in r.finished}


def validated_differently(findings: Findings) -> bool:
    """Whether settings hold out different tasks, so that their validation questions are not the same."""
    return len(_held_out(findings)) > 1


def held_out_notes(findings: Findings) -> list[str]:
    """Why validation accuracies of settings that hold out different tasks are not comparable, where there are such."""
    if _held_out(findings) == {()}:
        return []
    lines = [
        "test accuracies and gains over all questions mix trained and held-out tasks; the table of held-out tasks does not"
    ]
    if validated_differently(findings):
        lines.append(
            "settings that hold out different tasks have different validation questions: their validation accuracies rank nothing"
        )
    return lines
