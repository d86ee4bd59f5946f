"""Figures of a sweep: one factor's levels as bars, and validation accuracy over settings that are numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from roma_ray.figures.style import BASE, MARKERS, PALETTE, TUNED, new_figure, shorten, styled

PAPER = "#D55E00"
# Beyond so many levels labels would run into one another.
_UPRIGHT = 8


@dataclass(frozen=True)
class Bar:
    """One level of a factor. Accuracies as fractions; None for a level that is not finished, or not given in the paper."""

    label: str
    accuracy: float | None
    stderr: float
    centre: bool
    paper: float | None


@styled
def factor_bars(
    bars: Sequence[Bar], base: float, base_stderr: float, *, seeds: int, paper: str | None, paper_base: float | None
) -> Figure:
    """Test accuracy of each level with its error bar, the base model as a line, the paper's results as open diamonds.

    `paper` names the paper's model; its base is a dotted line. The centre has a mark of its own.
    """
    figure, (axis,) = new_figure(max(4.6, 1.6 + 0.52 * len(bars)), 3.6)
    place = np.arange(len(bars))
    done = [n for n, bar in enumerate(bars) if bar.accuracy is not None]
    error = f"± standard error over {seeds} seeds" if seeds > 1 else "± standard error over questions"
    drawn = axis.bar(
        place[done],
        [100 * (bars[n].accuracy or 0.0) for n in done],
        width=0.66,
        yerr=[100 * bars[n].stderr for n in done],
        color=[PALETTE[2] if bars[n].centre else TUNED for n in done],
        error_kw={"ecolor": "#222222", "elinewidth": 1, "capsize": 3},
        label=error,
    )
    for n, patch in zip(done, drawn.patches, strict=True):
        if bars[n].centre:
            patch.set_hatch("///")
            patch.set_edgecolor("white")
    axis.axhline(100 * base, color=BASE, linestyle="--", label="base model")
    axis.axhspan(100 * (base - base_stderr), 100 * (base + base_stderr), color=BASE, alpha=0.18, linewidth=0, zorder=0)
    given = [n for n, bar in enumerate(bars) if bar.paper is not None]
    if given:
        values = [100 * (bars[n].paper or 0.0) for n in given]
        label = f"the paper's {paper} (other questions)"
        axis.plot(place[given], values, "D", color=PAPER, markerfacecolor="none", markersize=7, label=label)
        if paper_base is not None:
            axis.axhline(100 * paper_base, color=PAPER, linestyle=":", linewidth=1.2, label="its base model")
    for n, bar in enumerate(bars):
        if bar.accuracy is None:
            axis.annotate(
                "not finished", (n, 0.02), xycoords=("data", "axes fraction"), rotation=90, ha="center", color=BASE
            )
    _range(axis, bars, base, paper_base)
    labels = [shorten(bar.label, 16) + ("\n(centre)" if bar.centre else "") for bar in bars]
    steep = len(bars) > _UPRIGHT or any(len(bar.label) > 9 for bar in bars)
    axis.set_xticks(place, labels, rotation=35 if steep else 0, ha="right" if steep else "center")
    axis.set_ylabel("test accuracy (%)")
    axis.grid(False, axis="x")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def _range(axis: Axes, bars: Sequence[Bar], base: float, paper_base: float | None) -> None:
    """Show the part of the scale that matters: differences are small beside the accuracies. The axis says where it starts."""
    values = [base, *(v for bar in bars for v in (bar.accuracy, bar.paper) if v is not None)]
    if paper_base is not None:
        values.append(paper_base)
    errors = max((bar.stderr for bar in bars if bar.accuracy is not None), default=0.0)
    low, high = 100 * (min(values) - errors), 100 * (max(values) + errors)
    margin = max(1.0, 0.15 * (high - low))
    axis.set_ylim(max(0.0, low - margin), min(100.0, high + margin))


@dataclass(frozen=True)
class Point:
    """A setting's value with the validation accuracy it gave; `series` tells settings apart that vary beside it."""

    x: float
    y: float
    series: str


@styled
def setting_curves(panels: Sequence[tuple[str, Sequence[Point]]], base: float) -> Figure:
    """Validation accuracy over each varied number, one panel a setting, one line a series; the base model as a line."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(4.4 * columns, 3.4 * rows, columns=columns, rows=rows)
    for axis, (name, points) in zip(axes, panels, strict=False):
        names = sorted({p.series for p in points})
        for n, series in enumerate(names):
            mine = sorted((p for p in points if p.series == series), key=lambda p: p.x)
            colour, marker = PALETTE[n % len(PALETTE)], MARKERS[(n // len(PALETTE)) % len(MARKERS)]
            line = "-" if len(mine) > 1 and len(names) <= len(PALETTE) else ""
            label = shorten(series, 30) if series and len(names) <= len(PALETTE) else None
            axis.plot([p.x for p in mine], [100 * p.y for p in mine], line, marker=marker, color=colour, label=label)
        axis.axhline(100 * base, color=BASE, linestyle="--", label="base model")
        positive = [p.x for p in points if p.x > 0]
        if len(positive) == len(points) and max(positive) >= 30 * min(positive):
            axis.set_xscale("log")
        axis.set_xlabel(shorten(name, 40))
        axis.set_ylabel("validation accuracy (%)")
        axis.legend(loc="best", fontsize=8)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return figure
