"""Oracle tuning: gates finetuned towards each training question's own oracle routing, L_task + lambda ||r_i - r*_i||^2."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from roma_ray.baselines.bench import Bench, training_mask
from roma_ray.baselines.head_passes import check_reach
from roma_ray.baselines.oracle import answers_towards
from roma_ray.baselines.router_tuning import RouterMethod
from roma_ray.config.schema import Config
from roma_ray.engine.answers import Answers
from roma_ray.engine.objective import TrainingData
from roma_ray.manifold.neighbors import own_neighborhoods


class OracleTuning(RouterMethod):
    """The routers learn to give what the oracle found. It is eq. 9 with every question as its own single neighbor."""

    name = "oracle_tuning"
    works_on = "train"
    title = "gates finetuned with L_task + λ‖r_i − r*_i‖² towards each training question's oracle routing"
    # The distance of its title; the targets are r*, which no refresh may replace.
    term: ClassVar[Mapping[str, Any]] = {
        "kind": "manifold",
        "distance": "squared",
        "positions": "mean",
        "refresh": False,
    }

    def configure(self, config: Config) -> dict[str, Any]:
        """The oracle's settings too."""
        return {**super().configure(config), "oracle": config.baselines.oracle.model_dump()}

    def check(self, bench: Bench) -> None:
        """Look whether there is a gradient to follow. Raises UnmovedError."""
        check_reach(bench, self.name)

    def work(self, bench: Bench, rows: Sequence[int], seed: int) -> Answers:
        """The oracle of training questions (eq. 1)."""
        aims = {row: bench.data.prompts[row].answer for row in rows}
        return answers_towards(bench, rows, aims, "oracle of the training questions")

    def learned(self, bench: Bench, found: Answers) -> dict[str, Tensor]:
        """r* [N, L, E] of the training questions, zero elsewhere."""
        assert found.routing_NLE is not None
        routing_NLE = torch.zeros_like(bench.data.routing_NLE)
        routing_NLE[found.rows] = torch.from_numpy(found.routing_NLE)
        return {"routing": routing_NLE}

    def data(self, bench: Bench, prepared: dict[str, Tensor]) -> TrainingData:
        """Training data in which every question's target is its own r*."""
        return dataclasses.replace(
            bench.data,
            neighborhoods=own_neighborhoods(training_mask(bench)),
            routing_NLE=prepared["routing"],
            # The oracle's routing is that of the last prompt token, whatever the run compares.
            base_NLE=None,
            tokens="Last1",
        )
