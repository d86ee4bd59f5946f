"""A world and what is made of it without training: other gates, other numbers of experts a token, fewer choices."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .assemble import LETTERS, build
from .recipe import Recipe

WORLD = "planted"
MODELS: Mapping[str, Mapping[str, Any]] = {
    WORLD: {},
    "planted-gates-0.25": {"gate_norm": Recipe.gate_norm / 4},
    "planted-gates-4": {"gate_norm": Recipe.gate_norm * 4},
    "planted-top-1": {"top_k": 1},
    "planted-top-4": {"top_k": 4},
}
"""Folder -> in what its recipe differs."""
CHOICES: Mapping[str, int] = {"planted-choices-2": 2}
"""Folder -> choices of its training questions."""


def make_variants(out: Path, seed: int) -> None:
    """The world of a seed and all its variants below `out`; what is there is kept. Raises ValueError where it is of another recipe."""
    for name, changes in MODELS.items():
        recipe = replace(Recipe(seed=seed), **changes)
        # Written last but for its README.
        if not (out / name / "recipe.json").exists():
            build(out / name, recipe, None if name == WORLD else out / WORLD)
        if Recipe(**json.loads((out / name / "recipe.json").read_text(encoding="utf-8"))) != recipe:
            raise ValueError(f"{out / name} is of another recipe: give another folder, or remove it")
    rows = [json.loads(line) for line in (out / WORLD / "questions" / "train.jsonl").read_text("utf-8").splitlines()]
    for name, count in CHOICES.items():
        (out / name).mkdir(exist_ok=True)
        lines = [json.dumps(with_choices(row, count)) + "\n" for row in rows]
        (out / name / "train.jsonl").write_text("".join(lines), encoding="utf-8")


def with_choices(row: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The question with so many of its choices: its last wrong ones are left out."""
    right = row["choices"][LETTERS.index(row["answer"])]
    kept = {right, *[choice for choice in row["choices"] if choice != right][: count - 1]}
    choices = [choice for choice in row["choices"] if choice in kept]
    return {**row, "choices": choices, "answer": LETTERS[choices.index(right)]}
