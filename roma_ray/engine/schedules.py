"""Values that change over the training's steps: lambda, the learning rate and the weight of the task loss by one schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from roma_ray.config.finetune_settings import FinetuneConfig, ScheduleConfig


@dataclass(frozen=True)
class Moment:
    """What one step trains with."""

    rate: float
    """The learning rate."""
    strength: float
    """lambda(t)."""
    task: float = 1.0
    """The weight of the task loss."""


def moment(config: FinetuneConfig, weight: float, step: int, total: int) -> Moment:
    """The values of step `step` (from 0) of `total`; `weight` is the lambda in force."""
    return Moment(
        rate=config.learning_rate * factor(config, step, total),
        strength=weight * factor(config.regularizer, step, total),
        task=factor(config.task_schedule, step, total),
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
