"""Figures of a sweep: a factor's levels, a grid's one or two settings, and settings that vary beside others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from roma_ray.figures.style import BASE, MARKERS, PALETTE, SEQUENTIAL, TUNED, new_figure, shorten, styled

PAPER = "#D55E00"
_CENTRE = PALETTE[2]
# Beyond so many levels labels would run into one another.
_UPRIGHT = 8
# From this ratio on numbers are told apart by their logarithm.
_ORDERS = 30


@dataclass(frozen=True)
class Bar:
    """One level of a factor. Accuracies as fractions; None for a level that is not finished, or not given in the paper."""

    label: str
    accuracy: float | None
    stderr: float
    """Over questions."""
    centre: bool
    paper: float | None
    over_seeds: float | None = None
    """Standard error over seeds; None for one seed."""
    x: float | None = None
    """The level where it is a number."""


@styled
def factor_levels(
    bars: Sequence[Bar], base: float, base_stderr: float, *, paper: str | None, paper_base: float | None
) -> Figure:
    """Test accuracy of each level with its error bars, the base model as a line, the paper's results as open diamonds.

    Levels that are numbers become a line over their scale, others bars. `paper` names the paper's model; its base is a dotted
    line. The centre has a mark of its own.
    """
    figure, (axis,) = new_figure(max(5.8, 1.6 + 0.52 * len(bars)), 3.6 + 0.4 * bool(paper))
    numbers = [bar.x for bar in bars if bar.x is not None]
    numeric = len(numbers) == len(bars) > 1
    place = np.array(numbers) if numeric else np.arange(len(bars), dtype=float)
    (_line if numeric else _bars)(axis, place, bars)
    axis.axhline(100 * base, color=BASE, linestyle="--", label="base model")
    axis.axhspan(100 * (base - base_stderr), 100 * (base + base_stderr), color=BASE, alpha=0.18, linewidth=0, zorder=0)
    given = [n for n, bar in enumerate(bars) if bar.paper is not None]
    if given:
        values = [100 * (bars[n].paper or 0.0) for n in given]
        label = f"the paper's {paper} (other questions)"
        axis.plot(place[given], values, "D", color=PAPER, markerfacecolor="none", markersize=7, label=label)
        if paper_base is not None:
            axis.axhline(100 * paper_base, color=PAPER, linestyle=":", linewidth=1.2, label="its base model")
    for x, bar in zip(place, bars, strict=True):
        if bar.accuracy is None:
            axis.annotate(
                "not finished", (x, 0.02), xycoords=("data", "axes fraction"), rotation=90, ha="center", color=BASE
            )
    _range(axis, bars, base, paper_base)
    if numeric:
        _scale(axis, numbers)
    else:
        _labels(axis, [shorten(bar.label, 16) + ("\n(centre)" if bar.centre else "") for bar in bars])
    axis.set_ylabel("test accuracy (%)")
    figure.legend(loc="outside upper left", ncols=1 if paper else 2)
    return figure


def _finished(place: np.ndarray, bars: Sequence[Bar]) -> tuple[list[int], list[float], list[float], list[float]]:
    done = [n for n, bar in enumerate(bars) if bar.accuracy is not None]
    heights = [100 * (bars[n].accuracy or 0.0) for n in done]
    return done, place[done].tolist(), heights, [100 * bars[n].stderr for n in done]


def _bars(axis: Axes, place: np.ndarray, bars: Sequence[Bar]) -> None:
    done, xs, heights, errors = _finished(place, bars)
    colours = [_CENTRE if bars[n].centre else TUNED for n in done]
    drawn = axis.bar(xs, heights, width=0.66, color=colours)
    for n, patch in zip(done, drawn.patches, strict=True):
        if bars[n].centre:
            patch.set_hatch("///")
            patch.set_edgecolor("white")
    several = any(bar.over_seeds is not None for bar in bars)
    _errors(axis, [x - 0.12 * several for x in xs], heights, errors, "#222222", "questions")
    _over_seeds(axis, [x + 0.12 for x in xs], heights, [bars[n] for n in done])
    axis.grid(False, axis="x")


def _line(axis: Axes, place: np.ndarray, bars: Sequence[Bar]) -> None:
    done, xs, heights, errors = _finished(place, bars)
    order = np.argsort(xs)
    axis.plot(np.array(xs)[order], np.array(heights)[order], "-o", color=TUNED)
    for n, x, height in zip(done, xs, heights, strict=True):
        if bars[n].centre:
            axis.plot([x], [height], "s", color=_CENTRE, markersize=9, label="the centre", linestyle="")
    _errors(axis, xs, heights, errors, "#222222", "questions")
    _over_seeds(axis, xs, heights, [bars[n] for n in done])


def _errors(
    axis: Axes, xs: Sequence[float], heights: Sequence[float], errors: Sequence[float], colour: str, over: str
) -> None:
    axis.errorbar(
        xs, heights, yerr=errors, fmt="none", ecolor=colour, elinewidth=1, capsize=3, label=f"± standard error over {over}"
    )  # fmt: skip


def _over_seeds(axis: Axes, xs: Sequence[float], heights: Sequence[float], bars: Sequence[Bar]) -> None:
    known = [
        (x, y, 100 * bar.over_seeds) for x, y, bar in zip(xs, heights, bars, strict=True) if bar.over_seeds is not None
    ]
    if known:
        places, tops, errors = zip(*known, strict=True)
        _errors(axis, places, tops, errors, PALETTE[1], "seeds")


def _labels(axis: Axes, labels: Sequence[str]) -> None:
    steep = len(labels) > _UPRIGHT or any(len(label.split("\n")[0]) > 9 for label in labels)
    turned: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if steep else {}
    axis.set_xticks(range(len(labels)), labels, **turned)


def logarithmic(values: Sequence[float]) -> bool:
    """Whether numbers span orders of magnitude, so that a logarithmic scale tells them apart."""
    return min(values) > 0 and max(values) >= _ORDERS * min(values)


def _scale(axis: Axes, values: Sequence[float]) -> None:
    if logarithmic(values):
        axis.set_xscale("log")
    if len(set(values)) <= _UPRIGHT:
        axis.set_xticks(sorted(set(values)), [f"{value:.4g}" for value in sorted(set(values))])
        axis.minorticks_off()


def _range(axis: Axes, bars: Sequence[Bar], base: float, paper_base: float | None) -> None:
    """Show the part of the scale that matters: differences are small beside the accuracies. The axis says where it starts."""
    values = [base, *(v for bar in bars for v in (bar.accuracy, bar.paper) if v is not None)]
    if paper_base is not None:
        values.append(paper_base)
    errors = max((max(bar.stderr, bar.over_seeds or 0.0) for bar in bars if bar.accuracy is not None), default=0.0)
    low, high = 100 * (min(values) - errors), 100 * (max(values) + errors)
    margin = max(1.0, 0.15 * (high - low))
    axis.set_ylim(max(0.0, low - margin), min(100.0, high + margin))


@dataclass(frozen=True)
class Level:
    """One setting of a grid: its place along one or two settings, and what it reached, (mean, standard error over questions)."""

    labels: tuple[str, ...]
    numbers: tuple[float | None, ...]
    validation: tuple[float, float]
    gain: tuple[float, float]
    """Test accuracy less the base model's, paired."""
    centre: bool


@styled
def grid_line(name: str, levels: Sequence[Level], base_validation: float) -> Figure:
    """A grid of one setting: validation accuracy and gain on test questions, over its scale where it is a number, else as dots."""
    figure, axes = new_figure(9.0, 3.5, columns=2)
    numbers = [n for level in levels for n in level.numbers if n is not None]
    numeric = len(numbers) == len(levels)
    place = np.array(numbers) if numeric else np.arange(len(levels), dtype=float)
    order = np.argsort(place)
    panels = (
        ("validation accuracy (%)", [level.validation for level in levels], 100 * base_validation),
        ("test: gain over the base model (points)", [level.gain for level in levels], 0.0),
    )
    for axis, (title, values, base) in zip(axes, panels, strict=True):
        heights = np.array([100 * mean for mean, _ in values])
        axis.plot(place[order], heights[order], "-o" if numeric else "o", color=TUNED)
        for x, height, level in zip(place, heights, levels, strict=True):
            if level.centre:
                axis.plot([x], [height], "s", color=_CENTRE, markersize=9, linestyle="", label="the centre")
        _errors(axis, place.tolist(), heights.tolist(), [100 * error for _, error in values], "#222222", "questions")
        axis.axhline(base, color=BASE, linestyle="--", label="base model")
        if numeric:
            _scale(axis, numbers)
        else:
            _labels(axis, [shorten(level.labels[0], 16) for level in levels])
        axis.set_xlabel(shorten(name, 40))
        axis.set_ylabel(title)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3)
    return figure


@styled
def grid_maps(names: tuple[str, str], levels: Sequence[Level]) -> Figure:
    """A grid of two settings as two maps: validation accuracy, and gain on test questions; the centre is framed."""
    down, across = (_ordered(levels, n) for n in (0, 1))
    width, height = 1.9 + 1.0 * len(across), 1.6 + 0.55 * len(down)
    figure, axes = new_figure(2 * width, height, columns=2)
    panels = (
        ("validation accuracy (%)", "validation", "{:.2f}"),
        ("test: gain over the base (points)", "gain", "{:+.2f}"),
    )
    for axis, (title, field, form) in zip(axes, panels, strict=True):
        values = np.full((len(down), len(across)), np.nan)
        for level in levels:
            values[down.index(level.labels[0]), across.index(level.labels[1])] = 100 * getattr(level, field)[0]
        limit = float(np.nanmax(np.abs(values))) or 1.0
        scale = {"cmap": SEQUENTIAL} if field == "validation" else {"cmap": "RdBu", "vmin": -limit, "vmax": limit}
        image = axis.imshow(values, aspect="auto", **scale)
        for row, column in zip(*np.nonzero(~np.isnan(values)), strict=True):
            red, green, blue, _ = image.cmap(image.norm(values[row, column]))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            text = form.format(values[row, column])
            axis.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
        for level in levels:
            if level.centre:
                corner = (across.index(level.labels[1]) - 0.5, down.index(level.labels[0]) - 0.5)
                axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=PAPER, linewidth=2.5))
        axis.set_xticks(range(len(across)), [shorten(label, 12) for label in across])
        axis.set_yticks(range(len(down)), [shorten(label, 12) for label in down])
        axis.set_ylabel(shorten(names[0], 30))
        axis.set_xlabel(shorten(names[1], 30))
        axis.set_title(title)
        axis.grid(False)
    return figure


def _ordered(levels: Sequence[Level], which: int) -> list[str]:
    """The labels along one setting: numbers ascending, then what is none in its order."""
    found = dict.fromkeys((level.labels[which], level.numbers[which]) for level in levels)
    numbers = sorted((n, label) for label, n in found if n is not None)
    return [*(label for _, label in numbers), *(label for label, n in found if n is None)]


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
        _scale(axis, [p.x for p in points])
        axis.set_xlabel(shorten(name, 40))
        axis.set_ylabel("validation accuracy (%)")
        axis.legend(loc="best", fontsize=8)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return figure
