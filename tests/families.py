"""The self-check's figures of every supported family, on tiny random models in fp32: `python -m tests.families [FAMILY ...]`.

Prints the Markdown table of `docs/models.md`: largest relative differences from transformers' own forward pass, one sequence
at a time, over two slices (from the first layer, from the fourth).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence

import torch

from roma_ray.moe.families import supported_families
from roma_ray.moe.selfcheck import check_slice
from roma_ray.moe.slices import load_slice
from tests.tiny import save_tiny, tiny_moe

COLUMNS = ("packed", "resumed", "trimmed", "routing", "gradient", "reach")


def figures(family: str) -> dict[str, float]:
    """The largest differences of a family's two slices, and the least reach of their routers."""
    with tempfile.TemporaryDirectory() as folder:
        path = save_tiny(tiny_moe(family, seed=1), folder)
        checks = [
            check_slice(load_slice(path, start=start, dtype=torch.float32, with_lm_head=True)) for start in (0, 3)
        ]
    found = [check.facts() for check in checks if check is not None]
    return {name: (min if name == "reach" else max)(facts[name] for facts in found) for name in COLUMNS}


def row(family: str) -> str:
    """A family's line of the table."""
    values = figures(family)
    shown = [f"{values[name]:.2f}" if name == "reach" else f"{values[name]:.1e}" for name in COLUMNS]
    return f"| `{family}` | {' | '.join(shown)} |"


def main(chosen: Sequence[str]) -> None:
    """Print the table, a line as soon as it is measured."""
    print(f"| `model_type` | {' | '.join(COLUMNS)} |")
    print(f"| --- |{' --- |' * len(COLUMNS)}")
    for family in chosen or supported_families():
        print(row(family), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
