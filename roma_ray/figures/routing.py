"""Figures of the routing: entropy and expert load before and after, and the neighborhoods that it is pulled to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from roma_ray.figures.style import BASE, PALETTE, SEQUENTIAL, TUNED, new_figure, styled


@styled
def routing_entropy(diagnostics: Mapping[str, Any]) -> Figure:
    """Mean entropy of the routing rows of each tuned layer before and after, with the largest possible value."""
    figure, (axis,) = new_figure(5.2, 3.4)
    layers = [str(layer) for layer in diagnostics["layers"]]
    for key, colour, marker, label in (("base", BASE, "s", "base"), ("tuned", TUNED, "o", "tuned")):
        axis.plot(layers, diagnostics[key]["routing_entropy"], color=colour, marker=marker, label=label)
    limit = math.log(len(diagnostics["base"]["expert_load"][0]))
    axis.axhline(limit, color="#222222", linestyle=":", linewidth=1, label="uniform")
    axis.set_xlabel("layer")
    axis.set_ylabel("routing entropy (nats)")
    axis.set_ylim(bottom=0, top=1.12 * limit)
    axis.legend(loc="lower right", ncols=3)
    return figure


@styled
def expert_load(diagnostics: Mapping[str, Any]) -> Figure:
    """Each expert's share of the selections, by layer: base, tuned, and the change in percentage points."""
    before, after = (100 * np.asarray(diagnostics[key]["expert_load"]) for key in ("base", "tuned"))
    layers = diagnostics["layers"]
    figure, axes = new_figure(7.2, 1.5 + 3 * (0.55 + 0.2 * len(layers)), rows=3)
    top = max(before.max(), after.max())
    change = after - before
    swing = max(float(np.abs(change).max()), 1e-9)
    panels = (
        (before, "base: share of selections (%)", SEQUENTIAL, 0.0, top),
        (after, "tuned: share of selections (%)", SEQUENTIAL, 0.0, top),
        (change, "change (percentage points)", "PuOr", -swing, swing),
    )
    for axis, (values, title, colours, low, high) in zip(axes, panels, strict=True):
        image = axis.imshow(values, aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        figure.colorbar(image, ax=axis, pad=0.01)
        axis.set_title(title)
        axis.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axis.set_ylabel("layer")
        axis.grid(False)
    axes[-1].set_xlabel("expert")
    return figure


@styled
def neighborhoods(facts: Mapping[str, Any], sizes: np.ndarray, similarities: np.ndarray) -> Figure:
    """Sizes of the successful neighborhoods and similarities within them, as cumulative shares with their medians.

    `facts` are the neighbors stage's, `sizes` one value a queried question, `similarities` one a pair.
    """
    # One bar says less than a number: where all have as many, the number stands in the title.
    same = len(np.unique(sizes)) < 2
    figure, axes = new_figure(4.6 if same else 7.2, 3.1, columns=1 if same else 2)
    right, how_many = axes[-1], f"{int(sizes[0])} neighbors each" if same and len(sizes) else ""
    if not same:
        left = axes[0]
        counts, edges = _size_bars(sizes)
        left.bar(range(len(counts)), 100 * counts / len(sizes), color=PALETTE[4], width=0.9)
        left.set_xticks(range(len(counts)), edges)
        left.set_title(f"neighborhood size (median {facts['sizes']['q50']:.0f}, empty {facts['empty']})")
        left.set_xlabel("neighbors")
        left.set_ylabel("training questions (%)")
        left.grid(False, axis="x")
    right.set_title("similarity of neighbors")
    if len(similarities):
        sorted_values = np.sort(similarities)
        marks = np.linspace(0, 1, min(500, len(sorted_values)))
        right.plot(np.quantile(sorted_values, marks), 100 * marks, color=PALETTE[0])
        right.axvline(facts["similarities"]["q50"], color=BASE, linestyle="--", linewidth=1)
        right.set_title(f"similarity of neighbors (median {facts['similarities']['q50']:.3f})")
    if how_many:
        right.set_title(f"{how_many}\n{right.get_title()}")
    right.set_xlabel("similarity (eq. 5 or cosine, as configured)")
    right.set_ylabel("pairs up to here (%)")
    return figure


def _size_bars(sizes: np.ndarray, most: int = 12) -> tuple[np.ndarray, list[str]]:
    """Counts of each size where there are few, else of ranges of equal width; with the bars' labels."""
    if not len(sizes):
        return np.zeros(0), []
    top = int(sizes.max())
    width = max(1, math.ceil((top + 1) / most))
    counts = np.bincount(sizes.astype(np.int64) // width, minlength=top // width + 1)
    starts = [number * width for number in range(len(counts))]
    labels = [str(start) if width == 1 else f"{start}-{start + width - 1}" for start in starts]
    return counts, labels
