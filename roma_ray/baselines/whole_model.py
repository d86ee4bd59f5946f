"""Answers of the whole model, for methods that change what the trunk sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from roma_ray.baselines.bench import Bench
from roma_ray.baselines.passes import ChoiceReading, as_lists
from roma_ray.engine.batches import plan_batches, prompt_shape
from roma_ray.engine.forward import lay_out
from roma_ray.questions.prompts import Prompt


def whole_likelihoods(model: Any, prompts: Sequence[Prompt], *, before: int = 0, gold_only: bool = False) -> Tensor:
    """Log-likelihood of every choice [Q, C] of some prompts, with graph.

    `before` counts positions that the model itself puts before each sequence and returns hidden states of.
    """
    layout = lay_out(prompts, gold_only=gold_only).to(str(next(model.parameters()).device))
    positions_BP = layout.score_positions_BP
    logits_BPV = model(
        input_ids=layout.ids_BS,
        attention_mask=layout.mask_BS,
        logits_to_keep=positions_BP.clamp(min=0) + before,
    ).logits
    return ChoiceReading(layout, prompts)(logits_BPV)


def score_whole(bench: Bench, model: Any, prompts: Sequence[Prompt], *, before: int = 0) -> list[list[float]]:
    """Scores of every choice of the prompts, in their order, in planned batches."""
    shapes = [prompt_shape(p) for p in prompts]
    found: dict[int, list[float]] = {}
    for batch in plan_batches([s[0] + before for s in shapes], [s[1] for s in shapes], bench.data.batch_tokens):
        chosen = [prompts[n] for n in batch]
        with torch.no_grad():
            found |= zip(batch, as_lists(whole_likelihoods(model, chosen, before=before), chosen), strict=True)
        bench.advance(len(batch), "whole model")
    return [found[n] for n in range(len(prompts))]
