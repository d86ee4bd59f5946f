"""A tiny world of free-form questions: files of GSM8K's and SQuAD's form, conversations and texts, for a random model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from roma_ray.config.schema import Config
from tests.world import WORDS, make_world


def gsm8k(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sums in words, their answers a line of reasoning and a number after `####`."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        one, two = rng.randrange(2, 9), rng.randrange(2, 9)
        asked = f"Tom has {one} {rng.choice(WORDS)} and buys {two} more. How many are there, number {number}?"
        rows.append(
            {"question": asked, "answer": f"{one} + {two} = <<{one}+{two}={one + two}>>{one + two}\n#### {one + two}"}
        )
    return rows


def squad(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions about a passage that holds the answer, each with two accepted ones."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        word = rng.choice(WORDS)
        answers = {"text": [word, f"the {word}", word], "answer_start": [4, 0, 4]}
        context = f"In box {number} lies the {word} thing."
        rows.append(
            {"id": f"s{number}", "context": context, "question": f"What lies in box {number}?", "answers": answers}
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def free_world(root: Path, rows: list[dict[str, Any]], family: str = "olmoe", **sections: Any) -> Config:
    """A world as of `make_world` that asks these rows; by default success is a likelihood that about half of them reach."""
    root.mkdir(parents=True, exist_ok=True)
    questions = {
        "sources": [{"path": str(write_rows(root / "free.jsonl", rows))}],
        "prompt": {"format": "free", "max_tokens": 256},
    }
    extraction = {"batch_tokens": 512, "success": {"metric": "likelihood", "threshold": -6.8}}
    given = {"extraction": extraction, "questions": questions, **sections}
    return make_world(root, family, count=6, **given)
