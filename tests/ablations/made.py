"""Finished trials made by hand: no model, no training, answers as a test wants them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import yaml

from roma_ray.ablations.space import Space, Trial, load_space
from roma_ray.ablations.sweep import Sweep
from roma_ray.ablations.sweep_results import FinishedTrial, SeededMean
from roma_ray.evaluation.measures import Asked
from roma_ray.evaluation.results_file import Judged
from roma_ray.evaluation.shares import answer_shares

CHOICES = 4


def space_of(folder: Path, **content: Any) -> Space:
    """A checked space file around the embedded default."""
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({"name": "made", **content}, sort_keys=False, allow_unicode=True))
    return load_space(path)


def sweep_of(space: Space) -> Sweep:
    """What tables and words ask of a sweep: its space, and no trial that is not finished."""
    states: dict[str, Any] = {}
    return cast(Sweep, SimpleNamespace(space=space, states=states, having=lambda *names: []))


def scores_of(right: np.ndarray, gold: np.ndarray, seed: int = 0) -> np.ndarray:
    """[N, choices] log-likelihoods whose highest is the gold answer where `right`, else another."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(-3, 0.1, (len(right), CHOICES))
    chosen = np.where(right, gold, (gold + 1) % CHOICES)
    scores[np.arange(len(right)), chosen] = -1.0
    return scores


def finished(
    trial: Trial,
    tuned: np.ndarray,
    *,
    base: np.ndarray,
    gold: np.ndarray,
    tasks: Sequence[str] | None = None,
    validation: float = 0.57,
) -> FinishedTrial:
    """A trial with these scores [N, choices] of its base and tuned model."""
    count = len(gold)
    named = list(tasks or ["t"] * count)
    asked = Asked(named, gold.tolist(), [[2] * CHOICES] * count, [[5, 7, 6, 9]] * count, "raw")
    judged = Judged(
        range(count), tuple(f"q{n}" for n in range(count)), asked, {"base": base.tolist(), "tuned": tuned.tolist()}
    )
    choices = [[f"{n} {letter}" for letter in "abcd"] for n in range(count)]
    return FinishedTrial(
        trial=trial,
        judged=judged,
        base=judged.values("base"),
        tuned=judged.values("tuned"),
        validation=SeededMean(validation, 0.035),
        base_validation=SeededMean(0.5, 0.036),
        validation_questions=200,
        shares=answer_shares(judged.scores["base"], judged.scores["tuned"], asked, choices),
        choices=choices,
        gradient_ratio=None,
        idle=False,
        pin="pin",
    )
