"""Each model's self-check (`moe/selfcheck.py`), done once and kept in the storage: what every loaded slice was held against."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from roma_ray.moe.selfcheck import check_slice
from roma_ray.moe.slices import Slice
from roma_ray.store.artifacts import fingerprint, write_json
from roma_ray.store.files import listed, read_json

FOLDER = "checks"
# What this process has checked itself, by place: workers that cannot write do not check every load again.
_KNOWN: dict[str, set[int]] = {}


def checks_folder(identity: dict[str, Any]) -> str:
    """Where the self-checks of a model under these numeric settings lie, below the storage.

    A new torch or transformers is another place: it is their code that is checked.
    """
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    return f"{FOLDER}/{fingerprint({**identity, **versions})}"


def ensure_checked(part: Slice, folder: str) -> None:
    """Check a slice unless all its layers were checked before. Raises ModelError where it differs from the stock forward."""
    known = _KNOWN.setdefault(folder, set())
    wanted = set(range(part.start, part.stop))
    if not wanted <= known:
        known |= {layer for facts in read_checks(folder) for layer in range(facts["start"], facts["stop"])}
    if wanted <= known:
        return
    found = check_slice(part)
    if found is not None:
        write_json(Path(folder) / f"{part.start}-{part.stop}.json", found.facts())
        known |= wanted


def read_checks(folder: str | Path) -> list[dict[str, Any]]:
    """The self-checks kept in a folder; a damaged file counts as missing, so that check is done again."""
    found = []
    for file in listed(folder, "[0-9]*.json"):
        try:
            facts = read_json(file)
            if isinstance(facts["start"], int) and isinstance(facts["stop"], int):
                found.append(facts)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def worst_of(folder: str | Path) -> dict[str, float]:
    """The largest differences over a model's slices, {packed, resumed, trimmed, routing, gradient}, and the least `reach`;
    empty without a check."""
    checks = read_checks(folder) if folder else []
    names = ("packed", "resumed", "trimmed", "routing", "gradient")
    found = {name: [check[name] for check in checks if check.get(name) is not None] for name in (*names, "reach")}
    return {name: min(values) if name == "reach" else max(values) for name, values in found.items() if values}
