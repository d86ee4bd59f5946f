"""Scoring by the head alone, from the states after the cut's attention. Serves validation and the paired evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from roma_ray.engine.batches import plan_batches
from roma_ray.engine.cache import States, prefetched
from roma_ray.engine.extractor import Reading
from roma_ray.engine.forward import answered, choice_scores, lay_out, own_tokens
from roma_ray.errors import GuardError
from roma_ray.moe.finite import begins
from roma_ray.moe.head_chain import BegunPass, Chain, as_chain
from roma_ray.moe.links import PassPlan
from roma_ray.moe.sending import pinned
from roma_ray.moe.slices import Slice
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

    def answer_logp(self, prompts: Sequence[Prompt]) -> float:
        """The right answers' log-likelihood a token, mean over questions; `prompts` is the whole question table."""
        gold = [prompts[row].choice_ids[prompts[row].answer] for row in self.rows]
        values = [s[prompts[r].answer] / len(ids) for s, r, ids in zip(self.scores, self.rows, gold, strict=True)]
        return float(np.mean(values))

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def stderr(self) -> float:
        """Standard error of the accuracy over questions, of n - 1; 0 for a single one."""
        n, share = len(self.correct), self.accuracy
        return math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else 0.0

    def of(self, rows: Sequence[int]) -> Scores:
        """The answers to some of the questions, in the order asked for."""
        place = {row: n for n, row in enumerate(self.rows)}
        at = [place[row] for row in rows]
        return Scores(
            list(rows),
            [self.scores[n] for n in at],
            [self.predictions[n] for n in at],
            self.correct[at],
            self.routing_NLE[at],
        )


def plan_scoring(
    prompts: Sequence[Prompt], rows: Sequence[int], prefix: int, batch_tokens: int
) -> list[tuple[list[int], int]]:
    """The batches in which some rows are scored, the longest questions first, each with its tokens."""
    own = [own_tokens(prompts[row], prefix) for row in rows]
    return [
        ([rows[n] for n in batch], prefix + sum(own[n] for n in batch)) for batch in plan_batches(own, batch_tokens)
    ]


@torch.inference_mode()
def score_rows(
    head: Slice | Chain,
    states: States,
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    *,
    tokens: str,
    rule: str,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Scores:
    """Score every choice of the questions `rows` (indices into `prompts`) with the head; `advance` hears of each batch's tokens.

    Batches are planned from the rows alone, so base and tuned heads see the same batches. Raises CacheError; GuardError where
    any score is not finite: extraction has set aside what fails in the base model, and to set aside more here would judge
    tuned routers by the questions that they leave.
    """
    chain, plan = as_chain(head), plan_scoring(prompts, rows, states.prefix, batch_tokens)
    layers = tuple(router.layer for router in chain.routers)
    members = [batch for batch, _ in plan]

    def prepare(chosen: Sequence[int]) -> tuple[Reading, Tensor]:
        layout = lay_out([prompts[row] for row in chosen], prefix=states.prefix)
        return Reading.of(layout, (tokens,)), pinned(states.packed(chosen, layout), chain.device)

    def begin(prepared: tuple[Reading, Tensor]) -> BegunPass:
        reading, states_TD = prepared
        return chain.begin(PassPlan(reading.layout.packing, reading.flat_positions, layers), states_TD, graph=False)

    found: dict[int, tuple[list[float], np.ndarray, int]] = {}
    passes = chain.ahead(prefetched(prepare, members), begin)
    for (chosen, size), ((reading, _), begun) in zip(plan, passes, strict=True):
        out = chain.finish(begun, keep=reading.keep)
        routing_QLE = reading.routing(out.routing_1PLE)[tokens]
        scores = choice_scores(out.states, reading.keep, reading.layout)
        chose = answered(out.states, reading.keep, reading.layout, scores, rule)
        found.update({row: (scores[n], routing_QLE[n], chose[n]) for n, row in enumerate(chosen)})
        advance(size)
    answers = [found[row][0] for row in rows]
    bad = [row for row, scores in zip(rows, answers, strict=True) if not all(map(math.isfinite, scores))]
    if bad:
        reading, states_TD = prepare(bad[:1])
        failing = PassPlan(reading.layout.packing, reading.flat_positions, layers)
        origin = chain.origin(failing, states_TD, keep=reading.keep)
        raise GuardError(
            f"the scores of {len(bad):,} of {len(rows):,} questions are not finite; of {prompts[bad[0]].id!r}, "
            f"{begins(origin)}"
        )
    predictions = [found[row][2] for row in rows]
    correct = np.array([p == prompts[row].answer for p, row in zip(predictions, rows, strict=True)], dtype=bool)
    return Scores(list(rows), answers, predictions, correct, np.stack([found[row][1] for row in rows]))
