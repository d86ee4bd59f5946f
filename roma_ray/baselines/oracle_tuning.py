"""Oracle tuning: gates finetuned towards each training question's own oracle routing, L_task + lambda ||r_i - r*_i||^2."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from roma_ray.baselines.bench import Bench, training_mask
from roma_ray.baselines.head_passes import check_reach
from roma_ray.baselines.oracle import optimise
from roma_ray.baselines.router_tuning import RouterMethod
from roma_ray.config.schema import Config
from roma_ray.engine.objective import TrainingData
from roma_ray.manifold.neighbors import own_neighborhoods


class OracleTuning(RouterMethod):
    """The routers learn to give what the oracle found. It is eq. 9 with every question as its own single neighbor."""

    name = "oracle_tuning"
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

    def prepare(self, bench: Bench, seed: int) -> dict[str, Tensor]:
        """r* [N, L, E] of the training questions, zero elsewhere (eq. 1). Raises UnmovedError."""
        check_reach(bench, self.name)
        routing_NLE = torch.zeros_like(bench.data.routing_NLE)
        for batch in bench.batches(bench.rows["train"]):
            aims = [bench.data.prompts[row].answer for row in batch]
            routing_NLE[batch] = optimise(bench, batch, aims, bench.config.oracle).routing_QLE
            bench.advance(len(batch), "oracle of the training questions")
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
