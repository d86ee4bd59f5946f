"""Scoring by the head alone, from the states after the cut's attention. Serves validation and the paired evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
from roma_ray.store.scratch import roomy_zeros


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

    def not_finite(self) -> list[int]:
        """The rows of which any score is not finite."""
        return [row for row, own in zip(self.rows, self.scores, strict=True) if not all(map(math.isfinite, own))]

    def of(self, rows: Sequence[int]) -> Scores:
        """The answers to some of the questions, in the order asked for."""
        place = {row: n for n, row in enumerate(self.rows)}
        at = [place[row] for row in rows]
        return Scores(
            list(rows),
            [self.scores[n] for n in at],
            [self.predictions[n] for n in at],
            self.correct[at],
            # Without `clip` numpy puts what it takes in a buffer first.
            np.take(self.routing_NLE, at, axis=0, out=_room(len(at), *self.routing_NLE.shape[1:]), mode="clip"),
        )


def _room(*shape: int) -> np.ndarray:
    """Room for routing rows."""
    room: np.ndarray = roomy_zeros(*shape).numpy()
    return room


def plan_scoring(
    prompts: Sequence[Prompt], rows: Sequence[int], prefix: int, batch_tokens: int
) -> list[tuple[list[int], int]]:
    """The batches in which some rows are scored, the longest questions first, each with its tokens."""
    own = [own_tokens(prompts[row], prefix) for row in rows]
    return [
        ([rows[n] for n in batch], prefix + sum(own[n] for n in batch)) for batch in plan_batches(own, batch_tokens)
    ]


def joined(parts: Sequence[Scores]) -> Scores:
    """The answers to the questions of several lists, at least one, in a row."""
    count = sum(len(part.rows) for part in parts)
    return Scores(
        [row for part in parts for row in part.rows],
        [scores for part in parts for scores in part.scores],
        [chosen for part in parts for chosen in part.predictions],
        np.concatenate([part.correct for part in parts]),
        np.concatenate([part.routing_NLE for part in parts], out=_room(count, *parts[0].routing_NLE.shape[1:])),
    )


def score_rows(
    head: Slice | Chain,
    states: States,
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    *,
    tokens: str,
    rule: str,
    batch_tokens: int,
) -> Scores:
    """The answers to the questions `rows`, in their order. See `score_each`."""
    how: dict[str, Any] = {"tokens": tokens, "rule": rule, "batch_tokens": batch_tokens}
    return joined(list(score_each(head, states, prompts, rows, **how))).of(rows)


def score_each(
    head: Slice | Chain,
    states: States,
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    *,
    tokens: str,
    rule: str,
    batch_tokens: int,
) -> Iterator[Scores]:
    """Score every choice of the questions `rows` (indices into `prompts`) with the head, a planned batch at a time.

    Batches are planned from the rows alone, so base and tuned heads see the same batches. Raises CacheError; GuardError, after the
    last, where any score is not finite.
    """
    plan = plan_scoring(prompts, rows, states.prefix, batch_tokens)
    bad: list[int] = []
    for scores in score_batches(head, states, prompts, [batch for batch, _ in plan], tokens=tokens, rule=rule):
        yield scores
        bad += scores.not_finite()
    refuse_not_finite(sorted(bad), len(rows), head, states, prompts, tokens)


def score_batches(
    head: Slice | Chain,
    states: States,
    prompts: Sequence[Prompt],
    batches: Sequence[Sequence[int]],
    *,
    tokens: str,
    rule: str,
) -> Iterator[Scores]:
    """Score planned batches one after another; the next one's states are read meanwhile. Raises CacheError."""
    chain = as_chain(head)

    def prepare(chosen: Sequence[int]) -> tuple[Reading, Tensor]:
        return _prepared(chain, states, prompts, chosen, tokens)

    def begin(prepared: tuple[Reading, Tensor]) -> BegunPass:
        reading, states_TD = prepared
        return chain.begin(_plan(chain, reading), states_TD, graph=False)

    passes = chain.ahead(prefetched(prepare, batches), begin)
    for chosen, ((reading, _), begun) in zip(batches, passes, strict=True):
        yield _scored(chain, prompts, chosen, reading, begun, rule)


def _prepared(
    chain: Chain, states: States, prompts: Sequence[Prompt], chosen: Sequence[int], tokens: str
) -> tuple[Reading, Tensor]:
    layout = lay_out([prompts[row] for row in chosen], prefix=states.prefix)
    return Reading.of(layout, (tokens,)), pinned(states.packed(chosen, layout), chain.device)


def _plan(chain: Chain, reading: Reading) -> PassPlan:
    return PassPlan(reading.layout.packing, reading.flat_positions, tuple(router.layer for router in chain.routers))


@torch.inference_mode()
def _scored(
    chain: Chain, prompts: Sequence[Prompt], chosen: Sequence[int], reading: Reading, begun: BegunPass, rule: str
) -> Scores:
    out = chain.finish(begun, keep=reading.keep)
    (routing_QLE,) = reading.routing(out.routing_1PLE).values()
    scores = choice_scores(out.states, reading.keep, reading.layout)
    predictions = answered(out.states, reading.keep, reading.layout, scores, rule)
    correct = np.array([p == prompts[row].answer for p, row in zip(predictions, chosen, strict=True)], dtype=bool)
    return Scores(list(chosen), scores, predictions, correct, routing_QLE)


@torch.inference_mode()
def refuse_not_finite(
    bad: Sequence[int], count: int, head: Slice | Chain, states: States, prompts: Sequence[Prompt], tokens: str
) -> None:
    """Raise GuardError where `bad` rows of `count` have scores that are not finite, with the layer where that begins: extraction has
    set aside what fails in the base model, and to set aside more here would judge tuned routers by the questions that they leave.
    """
    if not bad:
        return
    chain = as_chain(head)
    reading, states_TD = _prepared(chain, states, prompts, bad[:1], tokens)
    origin = chain.origin(_plan(chain, reading), states_TD, keep=reading.keep)
    raise GuardError(
        f"the scores of {len(bad):,} of {count:,} questions are not finite; of {prompts[bad[0]].id!r}, {begins(origin)}"
    )
