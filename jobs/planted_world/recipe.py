"""All settings of a world and of its model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What decides every bit of a world, on one kind of machine with one thread."""

    seed: int = 0
    top_k: int = 2
    """Experts of a token; their weights are renormalised to sum to 1."""

    people: int = 500
    public: int = 150
    plain: int = 60
    rare: int = 4
    test: int = 33

    vocabulary: int = 2048
    width: int = 96
    ffn: int = 64
    heads: int = 4
    dense: int = 2
    """Layers below the first that has experts."""
    sparse: int = 5

    seed_steps: int = 700
    seed_batch: int = 128
    seed_rate: float = 4e-3
    branch_steps: int = 750
    branch_batch: int = 128
    branch_rate: float = 5e-3
    branch_decay: float = 1.0
    branch_dropout: float = 0.2

    gate_people: int = 40
    """People whose documents make a domain's prototype."""
    gate_norm: float = 1.0
    """Length of each gate's row."""
