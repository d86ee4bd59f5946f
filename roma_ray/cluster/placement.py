"""Which nodes a stage's workers may run on, how many fit there, and what a cluster has when none does.

Counted against what the nodes have in all, before any work: Ray itself would wait for ever for a node that never comes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from roma_ray.config.ray_settings import RayConfig

_KIND = "accelerator_type:"
_GIB = 2**30


@dataclass(frozen=True)
class Node:
    """A live node: its resources in all (memory in bytes) and its labels."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def kinds(self) -> list[str]:
        """The kinds of its accelerators, as Ray names them."""
        return sorted(name.removeprefix(_KIND) for name in self.resources if name.startswith(_KIND))


@dataclass(frozen=True)
class Need:
    """What one worker asks of its node."""

    cpus: float
    gpus: float = 0.0
    memory_gib: float | None = None
    accelerator: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def of_kind(self, kind: str | None) -> Need:
        """The same on accelerators of one kind."""
        return replace(self, accelerator=kind)

    def resources(self) -> dict[str, float]:
        """As Ray's resources of a bundle or a training worker."""
        wanted = {"CPU": self.cpus}
        if self.gpus:
            wanted["GPU"] = self.gpus
        if self.memory_gib is not None:
            wanted["memory"] = self.memory_gib * _GIB
        if self.accelerator is not None:
            # What Ray itself asks for where a kind is named: a share too small to run out.
            wanted[_KIND + self.accelerator] = 0.001
        return wanted

    def options(self) -> dict[str, Any]:
        """As the arguments of `ray.remote` and `Dataset.map_batches`."""
        return {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus or None,
            "memory": None if self.memory_gib is None else int(self.memory_gib * _GIB),
            "accelerator_type": self.accelerator,
            "label_selector": dict(self.labels) or None,
        }

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPU"]
        if self.gpus:
            parts.append(f"{self.gpus:g} GPU")
        if self.accelerator is not None:
            parts.append(f"accelerator {self.accelerator}")
        if self.memory_gib is not None:
            parts.append(f"{self.memory_gib:g} GiB of memory")
        parts += [f"label {key}={value}" for key, value in self.labels.items()]
        return ", ".join(parts)


def live_nodes() -> list[Node]:
    """The nodes of the connected cluster that are alive."""
    import ray

    return [Node(node["Resources"], node.get("Labels") or {}) for node in ray.nodes() if node["Alive"]]


def need_of(stage: str, settings: RayConfig, device: str) -> Need:
    """What a worker of a stage needs. Finetuning takes whole GPUs: NCCL wants one for each worker; trials (`tune`) share."""
    placement = settings.finetune if stage == "tune" else getattr(settings, stage)
    gpus = settings.gpus_per_worker if device == "cuda" else 0.0
    return Need(
        cpus=settings.cpus_per_worker,
        gpus=max(1.0, gpus) if stage == "finetune" and gpus else gpus,
        memory_gib=placement.memory_gib,
        accelerator=placement.accelerator if device == "cuda" else None,
        labels=placement.labels,
    )


def room(nodes: Sequence[Node], need: Need) -> int:
    """How many such workers the nodes hold at once."""
    return sum(_room(node, need) for node in nodes)


def chains(nodes: Sequence[Node], needs: Sequence[Need]) -> int:
    """How many chains the nodes hold at once, each of one worker a need, wherever each has room."""
    left = [dict(node.resources) for node in nodes]
    count = 0
    while True:
        for need in sorted(needs, key=lambda need: -(need.memory_gib or 0.0)):
            fitting = (n for n, node in enumerate(nodes) if _room(Node(left[n], node.labels), need))
            if (chosen := next(fitting, None)) is None:
                return count
            for name, amount in need.resources().items():
                left[chosen][name] -= 0.0 if name.startswith(_KIND) else amount
        count += 1


def _room(node: Node, need: Need) -> int:
    if need.accelerator is not None and need.accelerator not in node.kinds:
        return 0
    if not all(matches(node.labels.get(key), wanted) for key, wanted in need.labels.items()):
        return 0
    shares = {name: amount for name, amount in need.resources().items() if not name.startswith(_KIND)}
    # A hair more than it has, so that thirds and tenths add up.
    return min(math.floor(node.resources.get(name, 0.0) / amount + 1e-9) for name, amount in shares.items())


def matches(value: str | None, wanted: str) -> bool:
    """Whether a label's value (None: the node has none) is what a selector of Ray's wants: x, !x, in(a, b), !in(a, b)."""
    negated = wanted.startswith("!")
    text = wanted.removeprefix("!").strip()
    inside = text.startswith("in(") and text.endswith(")")
    choices = [part.strip() for part in text[3:-1].split(",")] if inside else [text]
    return (value in choices) != negated


def main_kind(nodes: Sequence[Node], need: Need) -> tuple[str | None, list[str]]:
    """The accelerator kind with room for the most such workers, where there are several; and all kinds with room."""
    kinds = sorted({kind for node in nodes for kind in node.kinds})
    rooms = {kind: room(nodes, need.of_kind(kind)) for kind in kinds}
    fitting = [kind for kind in kinds if rooms[kind]]
    # A node may have GPUs whose kind Ray does not know: they count as a kind of their own, which cannot be asked for.
    unknown = sum(_room(node, need) for node in nodes if not node.kinds)
    several = len(fitting) + bool(unknown) > 1
    return (max(fitting, key=lambda kind: rooms[kind]) if several else None), fitting


def inventory(nodes: Sequence[Node]) -> str:
    """What a cluster has, alike nodes together."""
    if not nodes:
        return "no live node"
    counted = Counter(_in_words(node) for node in nodes)
    return "; ".join(f"{count} x ({text})" for text, count in sorted(counted.items()))


def _in_words(node: Node) -> str:
    resources = node.resources
    parts = [f"{resources.get('CPU', 0):g} CPU", f"{resources.get('memory', 0) / _GIB:.0f} GiB"]
    if resources.get("GPU"):
        parts.insert(1, f"{resources['GPU']:g} GPU {' '.join(node.kinds) or 'of unknown kind'}")
    # Ray's own labels say where a node is, not what it has.
    parts += [f"{key}={value}" for key, value in sorted(node.labels.items()) if not key.startswith("ray.io/")]
    return ", ".join(parts)
