"""What changes over the training's steps: lambda, learning rate, weight of the task loss, and what router logits go through.

T flat tokens of a micro-batch, L tuned layers, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from roma_ray.config.finetune_settings import FinetuneConfig, ScheduleConfig
from roma_ray.engine.forward import Layout
from roma_ray.manifold.ranking import row_key


@dataclass(frozen=True)
class Moment:
    """What one step trains with."""

    rate: float
    """The learning rate."""
    strength: float
    """lambda(t)."""
    task: float = 1.0
    """The weight of the task loss."""
    temperature: float = 1.0
    """What router logits are divided by."""
    dropout: float = 0.0
    """The part of them that is dropped."""
    seed: int = 0
    step: int = 0

    def logit_factors(self, layout: Layout, layers: int, experts: int) -> Tensor | None:
        """What router logits are multiplied by, [T, L, E] fp32 on the CPU; None where by 1.

        Dropout is a function of seed, step and question id: of neither the micro-batch nor the worker. Tokens that all questions share
        are no question's, and keep theirs.
        """
        if self.temperature == 1 and self.dropout == 0:
            return None
        factors_TLE = torch.ones(len(layout.packing), layers, experts)
        for prompt, span in zip(layout.prompts, layout.spans() if self.dropout else (), strict=False):
            generator = torch.Generator().manual_seed(row_key(self.seed, f"{self.step}\0{prompt.id}"))
            drawn_TLE = torch.rand(len(span), layers, experts, generator=generator)
            factors_TLE[span.start : span.stop] = (drawn_TLE >= self.dropout) / (1 - self.dropout)
        return factors_TLE / self.temperature


def moment(config: FinetuneConfig, weight: float, seed: int, step: int, total: int) -> Moment:
    """The values of step `step` (from 0) of `total`; `weight` is the lambda in force."""
    logits = config.logits
    excess = factor(ScheduleConfig(warmup_steps=0, anneal=logits.anneal), step, total)
    return Moment(
        rate=config.learning_rate * factor(config, step, total),
        strength=weight * factor(config.regularizer, step, total),
        task=factor(config.task_schedule, step, total),
        temperature=1 + (logits.temperature - 1) * excess,
        dropout=logits.dropout,
        seed=seed,
        step=step,
    )


def factor(schedule: ScheduleConfig, step: int, total: int) -> float:
    """Part of the whole value at a step: the warm-up ends, and the anneal reaches its floor, within the steps that a run really has."""
    asked = schedule.warmup_steps
    warm = round(schedule.warmup_fraction * total) if asked is None else asked
    rise = min(1.0, (step + 1) / max(1, warm))
    if schedule.anneal == "none":
        return rise
    done = min(1.0, max(0, step + 1 - warm) / max(1, total - warm))
    left = 1 - done if schedule.anneal == "linear" else (1 + math.cos(math.pi * done)) / 2
    return rise * (schedule.anneal_floor + (1 - schedule.anneal_floor) * left)
