"""Figures of the result: accuracy by task, and what tuning put at risk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from roma_ray.evaluation.transfer import listed
from roma_ray.figures.style import BASE, PALETTE, TUNED, new_figure, shorten, styled

MOST_TASKS = 40


@styled
def accuracy_bars(figures: Mapping[str, Mapping[str, Any]], held_out: Mapping[str, Any] | None = None) -> Figure:
    """Accuracy of base and tuned routers on each task with standard errors; `figures` is one split's comparisons.

    Beyond `MOST_TASKS` tasks, those with most questions are drawn; the table has all.
    """
    figures = dict(listed(figures, held_out))
    names = list(figures)
    if len(names) > MOST_TASKS:
        largest = sorted(names, key=lambda name: -figures[name]["n"])[:MOST_TASKS]
        names = [name for name in names if name in largest]
    figure, (axis,) = new_figure(6.6, 1.1 + 0.52 * len(names))
    place = np.arange(len(names))[::-1]
    for offset, key, colour, label in ((0.19, "base", BASE, "base"), (-0.19, "tuned", TUNED, "tuned (RoMA)")):
        axis.barh(
            place + offset,
            [100 * figures[name][f"{key}_accuracy"] for name in names],
            height=0.36,
            xerr=[100 * figures[name][f"{key}_stderr"] for name in names],
            color=colour,
            error_kw={"ecolor": "#222222", "elinewidth": 1, "capsize": 2.5},
            label=label,
        )
    labels = ["all tasks" if name == "all" else shorten(name) for name in names]
    axis.set_yticks(place, [f"{label} (n={figures[name]['n']})" for label, name in zip(labels, names, strict=True)])
    axis.set_xlim(0, 100)
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.set_xlabel("accuracy (%), ± one standard error")
    axis.grid(False, axis="y")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


@styled
def drift(diagnostics: Mapping[str, Any], overall: Mapping[str, Any]) -> Figure:
    """How far the routers moved: KL to the base and kept experts by layer, and answers lost and won.

    `diagnostics` are the evaluation's, `overall` the `all` comparison of the test split.
    """
    figure, (divergence, kept, answers) = new_figure(8.4, 3.0, columns=3)
    layers = [str(layer) for layer in diagnostics["layers"]]
    divergence.bar(layers, diagnostics["routing_kl"], color=TUNED)
    divergence.set_title("routing moved by (KL, nats)")
    kept.bar(layers, [100 * share for share in diagnostics["selection_overlap"]], color=PALETTE[2])
    kept.set_title("selected experts kept (%)")
    kept.set_ylim(0, 100)
    bars = answers.bar(["lost", "won"], [overall["lost"], overall["won"]], color=[PALETTE[5], PALETTE[0]])
    answers.bar_label(bars, padding=2)
    answers.set_title("test answers changed")
    answers.margins(y=0.15)
    answers.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    for axis in (divergence, kept):
        axis.set_xlabel("layer")
    for axis in (divergence, kept, answers):
        axis.grid(False, axis="x")
    return figure
