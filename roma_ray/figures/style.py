"""How every figure looks, and how it is saved: the same data give the same bytes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from roma_ray.store.files import write_bytes

P = ParamSpec("P")

# Okabe and Ito's palette, told apart with any colour vision; base and tuned have their own two colours throughout.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8B7A00", "#000000")
BASE, TUNED = "#7A7A7A", "#0072B2"
MARKERS = "os^DvPX*"
OTHER = "#B5B5B5"
SEQUENTIAL = "cividis"

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    # Names that matplotlib gives to parts of an SVG come from this and the content, not from chance.
    "svg.hashsalt": "roma-ray",
    "svg.fonttype": "path",
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Give a figure function the common look without touching matplotlib's global settings."""

    @wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return wrapped


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of that many inches and its axes, row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    return figure, list(grid.flat)


def render(figure: Figure, form: str) -> bytes:
    """The figure as `svg` or `png` (160 dots an inch)."""
    stream = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else {"Software": None}
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A task's name may be in a script that the font lacks; it is drawn as boxes, and the tables have it in full.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(stream, format=form, metadata=metadata, dpi=160)
    return stream.getvalue()


def save(figure: Figure, folder: Path, name: str) -> bytes:
    """Write `folder/name.svg` and `folder/name.png`; returns the SVG. Raises StorageError."""
    drawn = {form: render(figure, form) for form in ("svg", "png")}
    for form, data in drawn.items():
        write_bytes(folder / f"{name}.{form}", data)
    return drawn["svg"]


def shorten(text: str, width: int = 22) -> str:
    """A label that fits and is safe to draw: `$` would start a formula, control characters would break an SVG."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return (line if len(line) <= width else line[: width - 1] + "…").replace("$", r"\$")


def colours(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each name: both differ from name to name, and no pair comes twice among 64."""
    return {
        name: (PALETTE[n % len(PALETTE)], MARKERS[(n + n // len(PALETTE)) % len(MARKERS)])
        for n, name in enumerate(names)
    }
