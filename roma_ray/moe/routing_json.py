"""The public reference's routing JSON: one object, question id -> prompt, last-token routing of some layers, answers.

A missing layer, a missing expert or a bad weight is an error: the reference fills such gaps with uniform rows, which then
look like data. Shapes: L layers, E experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roma_ray.borders.documents import first_repeated
from roma_ray.borders.text import printable
from roma_ray.errors import CheckpointError
from roma_ray.moe.folders import refuse_special_file
from roma_ray.store.artifacts import write_atomically

# Files round their weights to a few digits; over many experts that adds up.
_SUM_TOLERANCE = 1e-2


@dataclass(frozen=True)
class RoutingEntry:
    """One question's routing row and outcome."""

    id: str
    input_text: str
    token_id: int
    token_text: str
    layers: tuple[int, ...]
    routing_LE: Tensor = field(repr=False)
    """fp32, L in the order of `layers`."""
    correct_answer: str
    model_answer: str
    is_correct: bool


def write_routing_json(path: str | Path, entries: Iterable[RoutingEntry]) -> None:
    """Write entries in the reference's format, one a line, whole or not at all; weights keep all their digits.

    Entries are streamed, so memory does not grow with their number. Raises StorageError.
    """

    def write(aside: Path) -> None:
        with open(aside, "w", encoding="utf-8") as stream:
            before = "{\n"
            for entry in entries:
                name, value = json.dumps(entry.id, ensure_ascii=False), _as_json(entry)
                stream.write(f"{before}{name}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}")
                before = ",\n"
            stream.write("\n}\n")

    write_atomically(path, write)


def _as_json(entry: RoutingEntry) -> dict[str, Any]:
    return {
        "input_text": entry.input_text,
        "last_token_routing": {
            "token_id": entry.token_id,
            "token_text": entry.token_text,
            "layers": [
                {"layer": layer, "routing_weights": {f"expert_{e}": w for e, w in enumerate(row)}}
                for layer, row in zip(entry.layers, entry.routing_LE.tolist(), strict=True)
            ],
        },
        "correct_answer": entry.correct_answer,
        "model_answer": entry.model_answer,
        "is_correct": entry.is_correct,
    }


def read_routing_json(
    path: str | Path, *, layers: Sequence[int] | None = None, num_experts: int | None = None
) -> list[RoutingEntry]:
    """Read the reference's routing file; every entry must have the same layers and experts.

    `layers` and `num_experts` say which there must be; by default those of the first entry (its highest expert number plus
    one). Raises CheckpointError, naming the question, for a missing or repeated layer or expert, for weights that are
    negative, not finite or do not sum to 1, and for a file of another form.
    """
    refuse_special_file(Path(path))
    content = _load(Path(path))
    entries: list[RoutingEntry] = []
    for name, value in content.items():
        try:
            entry = _entry(name, value, layers, num_experts)
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(f"{path}: question {name!r}: {what}") from error
        layers, num_experts = entry.layers, entry.routing_LE.shape[1]
        entries.append(entry)
    return entries


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f"{path} is not a routing file: it must be an object of questions by id (not a list, not JSONL)"
        )
    return content


def _entry(name: str, value: Any, layers: Sequence[int] | None, num_experts: int | None) -> RoutingEntry:
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    routing = value["last_token_routing"]
    rows: dict[int, dict[str, Any]] = {}
    for item in routing["layers"]:
        layer = item["layer"]
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ValueError(f"{layer!r:.40} is not a layer's number")
        if layer in rows:
            raise ValueError(f"layer {layer} stands twice")
        rows[layer] = item["routing_weights"]
    wanted = tuple(layers) if layers is not None else tuple(sorted(rows))
    if set(rows) != set(wanted):
        raise ValueError(f"it has layers {sorted(rows)}, but {sorted(wanted)} are needed")
    if not wanted:
        raise ValueError("it has no layers")
    if not isinstance(value["is_correct"], bool):
        raise ValueError("is_correct must be true or false")
    experts = num_experts if num_experts is not None else _count(rows[wanted[0]])
    matrix = [_row(rows[layer], layer, experts) for layer in wanted]
    return RoutingEntry(
        id=name,
        input_text=str(value["input_text"]),
        token_id=int(routing["token_id"]),
        token_text=str(routing["token_text"]),
        layers=wanted,
        routing_LE=torch.tensor(matrix, dtype=torch.float32),
        correct_answer=str(value["correct_answer"]),
        model_answer=str(value["model_answer"]),
        is_correct=value["is_correct"],
    )


def _count(weights: dict[str, Any]) -> int:
    if not weights:
        raise ValueError("it has no experts")
    return 1 + max(int(key.removeprefix("expert_")) for key in weights)


def _row(weights: dict[str, Any], layer: int, experts: int) -> list[float]:
    names = [f"expert_{number}" for number in range(experts)]
    if set(weights) != set(names):
        missing = sorted(set(names) - set(weights)) or sorted(set(weights) - set(names))
        raise ValueError(f"layer {layer} must have experts 0 to {experts - 1}; the difference begins with {missing[0]}")
    row = [float(weights[name]) for name in names]
    if not all(math.isfinite(weight) and weight >= 0 for weight in row):
        raise ValueError(f"layer {layer} has a negative or non-finite weight")
    if abs(sum(row) - 1) > _SUM_TOLERANCE:
        raise ValueError(f"the weights of layer {layer} sum to {sum(row):.4g}, not to 1")
    return row


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = first_repeated(name for name, _ in pairs)
    if twice is not None:
        raise ValueError(f"the key {printable(twice, 40)!r} stands twice")
    return dict(pairs)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")
