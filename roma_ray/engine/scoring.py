"""Scoring from cached activations: the head alone answers the questions. Serves validation and the paired evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from roma_ray.engine.batches import plan_batches, prompt_shape
from roma_ray.engine.cache import ActivationCache, head_input
from roma_ray.engine.forward import choice_scores, lay_out, mean_routing, predict, routing_positions
from roma_ray.moe.reading import read_routing
from roma_ray.moe.slices import Slice, slice_logits
from roma_ray.questions.prompts import Prompt


@dataclass(frozen=True)
class Scores:
    """Answers to some questions, in the order of `rows`."""

    rows: list[int]
    scores: list[list[float]]
    predictions: list[int]
    correct: np.ndarray
    """bool, [N]"""
    routing_NLE: np.ndarray
    """Mean routing rows r of the head's MoE layers, fp32."""

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())


@torch.inference_mode()
def score_rows(
    head: Slice,
    cache: ActivationCache,
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    *,
    tokens: str,
    rule: str,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda count: None,
) -> Scores:
    """Score every choice of the questions `rows` (indices into `prompts`) with the head. Raises CacheError.

    Batches are planned from the rows alone, so base and tuned heads see the same batches.
    """
    shapes = [prompt_shape(prompts[row]) for row in rows]
    found: dict[int, tuple[list[float], np.ndarray]] = {}
    for batch in plan_batches([s[0] for s in shapes], [s[1] for s in shapes], batch_tokens):
        members = [rows[n] for n in batch]
        chosen = [prompts[row] for row in members]
        layout = lay_out(chosen)
        inputs = head_input(head, cache, members, chosen, layout)
        layout = layout.to(str(head.device))
        positions_BP = routing_positions(layout, tokens)
        with read_routing(head.model, head.routers, positions_BP) as tape:
            logits_BPV = slice_logits(head, inputs, layout.mask_BS, layout.score_positions_BP)
        routing_QLE = mean_routing(tape.routing_BPLE, positions_BP, layout).float().cpu().numpy()
        for n, row in enumerate(members):
            found[row] = ([], routing_QLE[n])
        for row, scores in zip(members, choice_scores(logits_BPV, layout, chosen), strict=True):
            found[row][0].extend(scores)
        advance(len(members))
    answers = [found[row][0] for row in rows]
    predictions = [predict(s, prompts[row], rule) for s, row in zip(answers, rows, strict=True)]
    correct = np.array([p == prompts[row].answer for p, row in zip(predictions, rows, strict=True)], dtype=bool)
    return Scores(list(rows), answers, predictions, correct, np.stack([found[row][1] for row in rows]))
