"""Draws the pictures of the documentation: `python docs/draw.py` writes docs/pictures/*.svg, the same bytes each time.

python docs/draw.py [FOLDER]
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from roma_ray.manifold.losses import NeighborTargets, manifold_loss
from roma_ray.runs.pipeline import STEPS

INK, PALE, BLUE, ORANGE, GREEN = "#1f2933", "#f2f4f7", "#2f6fb3", "#c8641b", "#2f8a5b"
FONT = "font-family='Helvetica, Arial, sans-serif'"


class Sheet:
    """An SVG page of boxes, lines and words."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.parts: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, text: str, fill: str = PALE, ink: str = INK) -> None:
        """A rounded box with centred lines of text."""
        self.parts.append(
            f"<rect x='{x:g}' y='{y:g}' width='{w:g}' height='{h:g}' rx='6' fill='{fill}' stroke='{INK}' stroke-width='1'/>"
        )
        lines = text.split("\n")
        for n, line in enumerate(lines):
            self.words(x + w / 2, y + h / 2 + 17 * (n - (len(lines) - 1) / 2) + 4, line, ink=ink, anchor="middle")

    def words(self, x: float, y: float, text: str, ink: str = INK, anchor: str = "start", size: int = 13) -> None:
        """One line of text."""
        self.parts.append(
            f"<text x='{x:g}' y='{y:g}' fill='{ink}' font-size='{size}' text-anchor='{anchor}' {FONT}>{escape(text)}</text>"
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, ink: str = INK, dashed: bool = False) -> None:
        """A line with a head at its end."""
        dash = " stroke-dasharray='5 4'" if dashed else ""
        self.parts.append(
            f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{ink}' stroke-width='1.6'{dash} "
            f"marker-end='url(#head)' color='{ink}'/>"
        )

    def line(self, points: list[tuple[float, float]], ink: str, width: float = 1.6) -> None:
        """A path through points."""
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f"<polyline points='{text}' fill='none' stroke='{ink}' stroke-width='{width:g}'/>")

    def dot(self, x: float, y: float, ink: str, radius: float = 4, hollow: bool = False) -> None:
        """A point."""
        fill = "white" if hollow else ink
        self.parts.append(
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{radius:g}' fill='{fill}' stroke='{ink}' stroke-width='1.4'/>"
        )

    def text(self) -> str:
        """The whole file."""
        head = (
            "<defs><marker id='head' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' markerHeight='7' orient='auto'>"
            f"<path d='M 0 0 L 10 5 L 0 10 z' fill='{INK}'/></marker></defs>"
        )
        return (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {self.width} {self.height}' width='{self.width}' "
            f"height='{self.height}'>\n{head}\n<rect width='100%' height='100%' fill='white'/>\n"
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def slices() -> Sheet:
    """Trunk, cut, head and the cache."""
    sheet = Sheet(760, 330)
    sheet.words(20, 28, "The trunk runs once. Everything after works on the head alone.", size=16)
    for n, name in enumerate(("layer 0", "layer 1", "layer 2", "layer 3", "attention\n4")):
        sheet.box(20 + 84 * n, 90, 74, 74, name, fill="#e4eefb")
    for n, name in enumerate(("experts\n4", "layer 5", "layer 6", "lm_head")):
        sheet.box(462 + 72 * n, 90, 64, 74, name, fill="#fdeedd")
    sheet.line([(446, 60), (446, 190)], ORANGE, 2.4)
    sheet.words(446, 52, "cut", ink=ORANGE, anchor="middle")
    sheet.words(227, 80, "trunk: frozen, a constant function of the prompt", ink=BLUE, anchor="middle")
    sheet.words(602, 80, "head: only its gates train", ink=ORANGE, anchor="middle")
    sheet.box(316, 215, 260, 46, "activation cache: states after the\nattention of the first tuned layer", fill="white")
    sheet.arrow(446, 190, 446, 213)
    sheet.arrow(576, 238, 620, 170)
    sheet.words(20, 238, "extraction: one pass a question,", ink=BLUE)
    sheet.words(20, 256, "which has to run anyway for r_i and S", ink=BLUE)
    sheet.words(
        20,
        300,
        "From the cache: every epoch, every trial of a grid, validation, evaluation, C3PO, oracle, dense backprop.",
    )
    return sheet


def corner(x: Tensor, left: float, top: float, size: float) -> tuple[float, float]:
    """A distribution over three experts as a point of a triangle."""
    a, b, c = (float(v) for v in x)
    return left + size * (b + 0.5 * c) / (a + b + c), top + size * 0.866 * (1 - c / (a + b + c))


def manifold() -> Sheet:
    """What eq. 7 does to routing rows over three experts: the real loss, followed by gradient descent on the logits."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.tensor([[2.2, 0.0, 0.0], [0.0, 2.2, 0.0], [0.0, 0.2, 2.2]])
    groups = torch.arange(3).repeat_interleave(6)
    logits = (centres[groups] + 1.1 * torch.randn(18, 3, generator=generator)).requires_grad_(True)
    right = torch.zeros(18, dtype=torch.bool)
    right[torch.arange(0, 18, 2)] = True
    stored = torch.softmax(logits, -1).detach()
    members = torch.stack([stored[right & (groups == g)].mean(0) for g in groups.tolist()])[:, None]
    targets = NeighborTargets(members, torch.zeros(18), torch.ones(18, dtype=torch.bool))
    start = stored.clone()
    for _ in range(60):
        (gradient,) = torch.autograd.grad(manifold_loss(torch.softmax(logits, -1)[:, None], targets), logits)
        logits = (logits - 0.6 * gradient).detach().requires_grad_(True)
    end = torch.softmax(logits, -1).detach()
    sheet = Sheet(760, 400)
    sheet.words(
        20, 28, "Eq. 7 pulls a question's routing towards its neighbors that the model answers rightly.", size=16
    )
    colours = [BLUE, ORANGE, GREEN]
    for title, rows, left in (("before", start, 40.0), ("after", end, 410.0)):
        top, size = 90.0, 300.0
        outline = [corner(torch.eye(3)[n], left, top, size) for n in (0, 1, 2, 0)]
        sheet.line(outline, "#8a94a0", 1)
        sheet.words(left + 150, 66, title, anchor="middle", size=15)
        for n, name in enumerate(("expert 1", "expert 2", "expert 3")):
            x, y = outline[n]
            sheet.words(x, y + (16 if n < 2 else -8), name, anchor="middle", size=11)
        for n, row in enumerate(rows):
            x, y = corner(row, left, top, size)
            if title == "after":
                sheet.line([corner(start[n], left, top, size), (x, y)], "#c3cad3", 1)
        for n, row in enumerate(rows):
            sheet.dot(*corner(row, left, top, size), colours[int(groups[n])], hollow=not bool(right[n]))
    sheet.words(
        20,
        388,
        "Colour: task. Filled: answered rightly (in S). Computed by roma_ray.manifold.losses.manifold_loss.",
        size=12,
    )
    return sheet


def machines() -> Sheet:
    """Driver, workers, storage."""
    sheet = Sheet(760, 330)
    sheet.words(20, 28, "Workers meet at the storage; only the driver plans, reports and records.", size=16)
    sheet.box(20, 60, 200, 110, "driver\nplans batches, gathers rows,\nstatistics, report", fill="#e4eefb")
    sheet.box(20, 230, 200, 60, "MLflow\n(server or SQLite)", fill="white")
    for n, text in enumerate(
        ("Ray actors: extract,\nembed, answer", "Ray Train: finetune\nthe head's gates", "Ray Tune: trials\nof a grid")
    ):
        sheet.box(290 + 156 * n, 60, 144, 64, text, fill="#fdeedd")
    sheet.box(
        290,
        210,
        456,
        90,
        "storage: one folder a stage and fingerprint\nfiles appear whole, manifest.json last",
        fill="#eaf5ef",
    )
    sheet.arrow(220, 92, 288, 92)
    sheet.arrow(120, 170, 120, 228)
    sheet.words(128, 204, "metrics, artifacts", size=11)
    for n in range(3):
        sheet.arrow(350 + 156 * n, 124, 350 + 156 * n, 208)
        sheet.arrow(378 + 156 * n, 208, 378 + 156 * n, 126)
    sheet.arrow(220, 150, 300, 208)
    sheet.words(
        20,
        320,
        "A worker, a node or the driver may die: the same command goes on with the batches that have no file yet.",
        size=12,
    )
    return sheet


PLACES = {
    "questions": (20, 120),
    "extract": (150, 60),
    "embed": (150, 180),
    "neighbors": (290, 180),
    "finetune": (420, 60),
    "evaluate": (540, 120),
    "report": (660, 120),
}
NOTES = {
    "questions": "prompts",
    "extract": "r_i, S, cache",
    "embed": "E(x_i)",
    "neighbors": "N(x_i), W",
    "finetune": "adapter",
    "evaluate": "paired figures",
    "report": "page, tables",
}


def stages() -> Sheet:
    """The graph of stages."""
    sheet = Sheet(780, 270)
    sheet.words(20, 28, "A stage's folder is named by its settings, its inputs' names and its version.", size=16)
    for name, step in STEPS.items():
        x, y = PLACES[name]
        for other in step.inputs:
            ox, oy = PLACES[other.name]
            sheet.arrow(ox + 100, oy + 24, x - 2, y + 24)
    for name, (x, y) in PLACES.items():
        sheet.box(x, y, 100, 48, f"{name}\n{NOTES[name]}", fill="#e4eefb" if name != "finetune" else "#fdeedd")
    sheet.words(
        20, 255, "A changed setting renames the folders from its stage on; all before them are used again.", size=12
    )
    return sheet


PICTURES = {"slices": slices, "manifold": manifold, "machines": machines, "stages": stages}


def draw(folder: Path) -> None:
    """Write every picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in PICTURES.items():
        (folder / f"{name}.svg").write_text(make().text(), encoding="utf-8")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures")
