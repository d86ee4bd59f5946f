"""The oracle: the routing weights of each question that lower its own task loss, found with its label (eq. 1).

And its control, the same optimization towards a random wrong choice. An oracle alone shows that routing can steer the
answer; how far it goes beyond what any aim reaches is the oracle's reach less its control's.

Q questions of a batch, C choices, L tuned layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from roma_ray.baselines.bench import HIDDEN, Bench
from roma_ray.baselines.contract import NOTHING, Fitted, Method
from roma_ray.baselines.head_passes import LEAST, HeadRun, as_lists, check_reach, loss_kind, task_loss
from roma_ray.config.baseline_settings import OracleConfig
from roma_ray.config.schema import Config
from roma_ray.engine.answers import Answers


@dataclass(frozen=True)
class Optimum:
    """The best routing found for some questions, with its loss and scores."""

    routing_QLE: Tensor
    scores: list[list[float]]
    start_Q: Tensor
    """Task loss under the model's own routing."""
    best_Q: Tensor
    """Task loss under the best routing: never above `start_Q`."""


def optimise(bench: Bench, rows: Sequence[int], aims: Sequence[int], settings: OracleConfig) -> Optimum:
    """Adam on z = log r at the last prompt token of a batch of questions, r = softmax z, towards the choices `aims`.

    Every question is its own problem: nothing that one question's routing does reaches another's loss. The first iterate
    is the model's own routing.
    """
    run = HeadRun(bench, rows)
    over = loss_kind(bench.setup.config)

    def losses(routing_QLE: Tensor) -> tuple[Tensor, Tensor]:
        likelihoods_QC = run.likelihoods(routing_QLE)
        return task_loss(likelihoods_QC, aims, run.prompts, over), likelihoods_QC

    return _descend(run, losses, settings.steps, settings.step_size)


def _descend(run: HeadRun, losses: Callable[[Tensor], tuple[Tensor, Tensor]], steps: int, step_size: float) -> Optimum:
    """The best of `steps` + 1 iterates for each question."""
    start_QLE = run.own_routing().clamp_min(LEAST)
    z_QLE = start_QLE.log().requires_grad_()
    adam = torch.optim.Adam([z_QLE], lr=step_size)
    best_Q = first_Q = torch.full((len(z_QLE),), torch.inf, device=z_QLE.device)
    best_QLE, best_QC = start_QLE, torch.empty(0)
    for step in range(steps + 1):
        routing_QLE = z_QLE.softmax(-1)
        with torch.set_grad_enabled(step < steps):
            loss_Q, likelihoods_QC = losses(routing_QLE)
        better_Q = loss_Q.detach() < best_Q
        if step == 0:
            first_Q, best_QC = loss_Q.detach(), likelihoods_QC.detach()
        best_Q = torch.where(better_Q, loss_Q.detach(), best_Q)
        best_QLE = torch.where(better_Q[:, None, None], routing_QLE.detach(), best_QLE)
        best_QC = torch.where(better_Q[:, None], likelihoods_QC.detach(), best_QC)
        if step < steps:
            (z_QLE.grad,) = torch.autograd.grad(loss_Q.sum(), [z_QLE])
            adam.step()
    return Optimum(best_QLE.cpu(), as_lists(best_QC, run.prompts), first_Q.cpu(), best_Q.cpu())


def answers_towards(bench: Bench, rows: Sequence[int], aims: dict[int, int], note: str = "oracle") -> Answers:
    """Optimise every question towards its aim, batch by batch, and give the answers under the best routing."""
    found: dict[int, tuple[list[float], np.ndarray]] = {}
    for batch in bench.batches(rows):
        best = optimise(bench, batch, [aims[row] for row in batch], bench.config.oracle)
        routing = best.routing_QLE.numpy()
        for number, row in enumerate(batch):
            found[row] = (best.scores[number], routing[number])
        bench.advance(len(batch), note)
    return Answers(
        list(rows),
        [found[row][0] for row in rows],
        [aims[row] for row in rows],
        np.stack([found[row][1] for row in rows]),
    )


class Oracle(Method):
    """Routing weights optimized with the label: how far routing alone could go."""

    name = "oracle"
    title = "routing of each question optimized with its label (eq. 1): an upper bound"
    sees_labels = True
    works_on = "test"

    def configure(self, config: Config) -> dict[str, Any]:
        """Steps and step size."""
        return {"oracle": config.baselines.oracle.model_dump(), "task_loss": loss_kind(config)}

    def check(self, bench: Bench) -> None:
        """Look whether there is a gradient to follow. Raises UnmovedError."""
        check_reach(bench, self.name)

    def fit(self, bench: Bench, prepared: dict[str, Tensor], learning_rate: float, seed: int) -> Fitted:
        """Nothing is learned before the questions. Raises as `check`."""
        self.check(bench)
        return NOTHING

    def predict(self, bench: Bench, fitted: Fitted, rows: Sequence[int], seed: int) -> Answers:
        """Towards the right choice."""
        answers = {row: bench.data.prompts[row].answer for row in rows}
        assert HIDDEN not in answers.values()
        return answers_towards(bench, rows, answers)


class OracleControl(Oracle):
    """The oracle's control: the same optimization towards a random wrong choice."""

    name = "oracle_control"
    title = "the same optimization towards a random wrong choice: the oracle's control"
    seeded = True

    def predict(self, bench: Bench, fitted: Fitted, rows: Sequence[int], seed: int) -> Answers:
        """Towards a wrong choice drawn by seed and row."""
        return answers_towards(bench, rows, {row: wrong_choice(bench, row, seed) for row in rows})


def wrong_choice(bench: Bench, row: int, seed: int) -> int:
    """A choice that is not the answer, uniform over them, a function of (seed, row) alone."""
    prompt = bench.data.prompts[row]
    others = [c for c in range(len(prompt.choice_ids)) if c != prompt.answer]
    return others[int(np.random.default_rng((seed, row)).integers(len(others)))]
