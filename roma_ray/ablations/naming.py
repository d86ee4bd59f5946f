"""How settings and their values are called in names, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from roma_ray.borders.text import printable


def level_name(value: Any) -> str:
    """A value as a level's name."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return printable(value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).split("\n")[0])


def assigned(name: str, level: str) -> str:
    """A factor, or a setting, at a level: `layers=F2`, `neighbors: k = 3`."""
    return f"{name}: {level}" if "=" in level else f"{name}={level}"


def short_names(keys: Sequence[str]) -> list[str]:
    """The last part of each dotted key, or as much of its end as tells it from the others."""
    names = []
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        names.append(next((e for e in ends if sum(f".{other}".endswith(f".{e}") for other in keys) == 1), key))
    return names
