"""The loop of methods that train other tensors than the tuned gates: the budget's epochs of AdamW on a sum over questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from roma_ray.baselines.bench import Bench
from roma_ray.config.finetune_settings import ScheduleConfig
from roma_ray.config.schema import Config
from roma_ray.engine.batches import chunks, epoch_order
from roma_ray.engine.identity import finetune_settings, is_cloze
from roma_ray.engine.schedules import factor
from roma_ray.errors import TrainingError


def loop_settings(config: Config) -> dict[str, Any]:
    """The settings of finetuning that act in `train` besides the budget."""
    tuning = finetune_settings(config.finetune, cloze=is_cloze(config))
    names = ("weight_decay", "clip_norm", *ScheduleConfig.model_fields)
    return {name: tuning[name] for name in names if name in tuning}


def train(
    bench: Bench,
    weights: Sequence[nn.Parameter],
    loss: Callable[[Sequence[int]], Tensor],
    questions: Sequence[int],
    learning_rate: float,
    seed: int,
) -> list[float]:
    """The budget's epochs over some questions, in the order and with the schedule that finetuning has; mean losses.

    `loss` gives the sum over some rows. Raises TrainingError.
    """
    own, base = bench.config, bench.setup.config.finetune
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=base.weight_decay, foreach=False)
    total = base.epochs * math.ceil(len(questions) / base.batch_size)
    means, step = [], 0
    for epoch in range(base.epochs):
        summed = 0.0
        for rows in chunks(epoch_order(questions, seed, epoch), base.batch_size):
            for weight in weights:
                weight.grad = torch.zeros_like(weight)
            for micro in chunks(rows, own.micro_batch_size):
                value = loss(micro)
                if not torch.isfinite(value):
                    raise TrainingError(f"the loss is not finite at learning rate {learning_rate}; leave that rate out")
                for weight, gradient in zip(weights, torch.autograd.grad(value, list(weights)), strict=True):
                    assert weight.grad is not None
                    weight.grad += gradient / len(rows)
                summed += float(value.detach())
            torch.nn.utils.clip_grad_norm_(weights, base.clip_norm)
            optimizer.param_groups[0]["lr"] = learning_rate * factor(base, step, total)
            optimizer.step()
            step += 1
            bench.advance(len(rows), f"loss {summed:.3f}")
        means.append(summed / len(questions))
    return means
