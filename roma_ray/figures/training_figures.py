"""Figures of the finetuning: losses by step and epoch, validation accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from roma_ray.engine.collapse import FIGURES
from roma_ray.figures.style import BASE, PALETTE, SEQUENTIAL, TUNED, new_figure, styled

_MOST_NAMED = 6


@styled
def loss_curves(steps: Mapping[str, Sequence[float]], epochs: Sequence[Mapping[str, Any]]) -> Figure:
    """Task loss, manifold loss, lambda and gradient norm by optimizer step, with each epoch's mean.

    `steps` holds the columns of steps.parquet, `epochs` the records of epochs.jsonl.
    """
    panels = (
        ("task_loss", "task loss (nats)", PALETTE[0]),
        ("manifold_loss", "manifold loss", PALETTE[2]),
        ("lambda", "weight of the manifold loss, λ", PALETTE[5]),
        ("gradient_norm", "gate gradient norm", PALETTE[3]),
    )
    figure, axes = new_figure(7.2, 4.8, columns=2, rows=2)
    at = np.asarray(steps["step"]) + 1
    for axis, (key, label, colour) in zip(axes, panels, strict=True):
        values = np.asarray(steps[key], dtype=float)
        # Single steps are noisy: thin and pale. Means of epochs carry the eye. lambda has no noise.
        noisy = key != "lambda"
        axis.plot(at, values, color=colour, linewidth=0.8 if noisy else 1.8, alpha=0.45 if noisy else 1)
        if noisy and epochs:
            ends = [epoch["step"] for epoch in epochs]
            starts = [0, *ends[:-1]]
            middles = [(a + b) / 2 + 0.5 for a, b in zip(starts, ends, strict=True)]
            axis.plot(
                middles, [epoch[key] for epoch in epochs], color=colour, marker="o", linewidth=1.8, label="epoch mean"
            )
            axis.legend(loc="upper right")
        axis.set_title(label)
        _whole_numbers(axis)
    for axis in axes[2:]:
        axis.set_xlabel("optimizer step")
    return figure


@styled
def routing_by_epoch(epochs: Sequence[Mapping[str, Any]]) -> Figure:
    """Figures of the validation questions' routing and the gates' gradient norm by epoch, a line a tuned layer.

    `epochs` are records of epochs.jsonl that hold `routing`. Epoch 0 is the base model, where it has such a figure.
    """
    names = ("entropy", "load_max", "load_p50", "unused_experts", "kl_to_base", "gradient_norm")
    figure, axes = new_figure(7.2, 6.6, columns=2, rows=3)
    layers = epochs[0]["routing"]["layers"]
    colours = matplotlib.colormaps[SEQUENTIAL](np.linspace(0, 0.9, len(layers)))
    for axis, name in zip(axes, names, strict=True):
        scale = 100 if name.startswith("load") else 1
        for n, (layer, colour) in enumerate(zip(layers, colours, strict=True)):
            line = {epoch["epoch"] + 1: scale * epoch["routing"][name][n] for epoch in epochs}
            if before := epochs[0]["routing"].get(f"base_{name}"):
                line = {0: scale * before[n], **line}
            axis.plot(list(line), list(line.values()), color=colour, marker="o", markersize=4, label=f"layer {layer}")
        axis.set_title(FIGURES[name])
        top = float(np.max([np.max(line.get_ydata()) for line in axis.lines]))
        axis.set_ylim(0, 1.1 * top or 1)
        _whole_numbers(axis)
        if name == "unused_experts":
            axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[-2:]:
        axis.set_xlabel("epoch (0: base model)")
    # Lines in their order from dark to light: with many the ends are enough.
    shown = range(len(layers)) if len(layers) <= _MOST_NAMED else (0, len(layers) - 1)
    handles = axes[0].lines
    figure.legend(handles=[handles[n] for n in shown], loc="outside lower center", ncols=min(len(shown), _MOST_NAMED))
    return figure


@styled
def validation_accuracy(epochs: Sequence[Mapping[str, Any]], base: Mapping[str, Any], selected: int) -> Figure:
    """Validation accuracy after each epoch against the base model's; `base` is the `all` comparison of that split. Of free-form
    questions the answers' log-likelihood, which is what the epochs are told apart by.
    """
    figure, (axis,) = new_figure(5.2, 3.4)
    numbers = [epoch["epoch"] + 1 for epoch in epochs]
    free = "base_logp" in base
    values = [epoch["validation_logp"] if free else 100 * epoch["validation_accuracy"] for epoch in epochs]
    level, error = 100 * base["base_accuracy"], 100 * base["base_stderr"]
    axis.axhline(base["base_logp"] if free else level, color=BASE, linestyle="--", label="base")
    if not free:
        axis.axhspan(level - error, level + error, color=BASE, alpha=0.18, linewidth=0, label="base ± standard error")
    axis.plot(numbers, values, color=TUNED, marker="o", label="tuned")
    if not free:
        errors = [100 * epoch["validation_stderr"] for epoch in epochs]
        axis.errorbar(numbers, values, yerr=errors, fmt="none", color=TUNED, capsize=2.5, label="± standard error")
    axis.plot(
        [numbers[selected]],
        [values[selected]],
        "o",
        markersize=12,
        markerfacecolor="none",
        color=TUNED,
        label="exported",
    )
    axis.set_xlabel("epoch")
    axis.set_ylabel("log-likelihood (nats a token)" if free else "validation accuracy (%)")
    _whole_numbers(axis)
    axis.margins(y=0.25)
    axis.legend(loc="best", ncols=2)
    return figure


def _whole_numbers(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
