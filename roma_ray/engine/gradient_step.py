"""From the gradient sums of a step's micro-batches to the gates' gradients and the step's figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from roma_ray.engine.checkpoint import layer_norm
from roma_ray.errors import TrainingError
from roma_ray.moe.masters import RouterMasters


def add(parts: Sequence[Tensor]) -> Tensor:
    """Sum in plan order: the order is what makes the bits independent of who computed what."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def apply(masters: RouterMasters, mean: Tensor, clip_norm: float) -> dict[str, float]:
    """Put a step's mean gradient on the gates and clip it; returns the step's figures, norms before that. Raises TrainingError."""
    start, norms, gates = 0, [], masters.parameters()
    for by_name in masters.parameters_by_layer.values():
        first = start
        for gate in by_name.values():
            gate.grad = mean[start : start + gate.numel()].reshape(gate.shape).clone()
            start += gate.numel()
        norms.append(mean[first:start].norm())
    norms.append(torch.nn.utils.clip_grad_norm_(gates, clip_norm))
    # One transfer from the device for all of them: each would wait for the whole step.
    task, manifold, entropy, loss, *by_layer, norm = torch.cat([mean[start:], torch.stack(norms)]).tolist()
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss is not finite (task {task}, regularizer {manifold}). Lower finetune.learning_rate or "
            "finetune.regularizer.weight; the last checkpoint is kept."
        )
    if not math.isfinite(norm):
        raise TrainingError(
            "a gate's gradient is not finite. Lower finetune.learning_rate; the last checkpoint is kept."
        )
    layers = {layer_norm(layer): value for layer, value in zip(masters.layers, by_layer, strict=True)}
    return {"task": task, "manifold": manifold, "entropy": entropy, "norm": norm, **layers}
