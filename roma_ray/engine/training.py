"""Router finetuning as one flat loop: eq. 7-10 over cached activations, on any number of workers.

Only the gates of the tuned layers move. They are fp32 masters, cast to the model's type inside the graph. A step's
micro-batches are planned from the configuration alone; each worker does every n-th, and all add the same gradient sums in
the same order, so the number of workers changes no bit on a CPU.

B questions of a step, L tuned layers, E experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roma_ray.config.finetune_settings import FinetuneConfig
from roma_ray.engine.batches import chunks, epoch_order
from roma_ray.engine.checkpoint import LoopState, load_checkpoint, save_checkpoint
from roma_ray.engine.collapse import act, check_kept
from roma_ray.engine.gradient_step import add, apply
from roma_ray.engine.objective import Objective, TrainingData
from roma_ray.engine.schedules import moment
from roma_ray.engine.workers import ALONE, World
from roma_ray.errors import TrainingError, UnmovedError
from roma_ray.moe.head_chain import Chain, as_chain
from roma_ray.moe.masters import RouterMasters
from roma_ray.moe.reach import WeightsReader, read_weights
from roma_ray.moe.slices import Slice
from roma_ray.store.files import exists
from roma_ray.store.uploads import trailing

PROBE_QUESTIONS = 64


@dataclass
class Outcome:
    """The trained gates and what is worth telling about the run."""

    gates: dict[str, Tensor]
    epochs: list[dict[str, Any]]
    probe: dict[str, float]
    selected_epoch: int
    step_table: Tensor = field(repr=False)
    """[steps, 5]: task loss, manifold loss, lambda, learning rate, gate gradient norm (before clipping)."""


def finetune(
    head: Slice | Chain,
    data: TrainingData,
    config: FinetuneConfig,
    *,
    layers: Sequence[int],
    seed: int,
    world: World = ALONE,
    checkpoint: Path | None = None,
    report: Callable[[dict[str, Any]], None] = lambda epoch: None,
    advance: Callable[[int, str], None] = lambda count, note: None,
    weights: WeightsReader = read_weights,
) -> Outcome:
    """Finetune the gates of `layers`; resumes from `checkpoint` where it exists. Raises TrainingError, CacheError.

    The head is left as it was, so that one that is loaded serves any number of runs. `weights` reads what the experts are
    weighed by, where that is not what the routers give.
    """
    chain = as_chain(head)
    masters = RouterMasters(chain.routers, layers)
    try:
        # A checkpoint on its way to a bucket stops no step.
        with trailing() as put:
            return _finetune(chain, masters, data, config, seed, world, checkpoint, report, advance, weights, put)
    finally:
        masters.detach()


def _finetune(
    head: Chain,
    masters: RouterMasters,
    data: TrainingData,
    config: FinetuneConfig,
    seed: int,
    world: World,
    checkpoint: Path | None,
    report: Callable[[dict[str, Any]], None],
    advance: Callable[[int, str], None],
    weights: WeightsReader,
    put: Callable[[Callable[[], object]], None],
) -> Outcome:
    gates = masters.parameters()
    pretrained, frozen = masters.state(), head.digest()
    base, decay = [gate.detach().clone() for gate in gates], config.weight_decay
    to_zero = decay if config.decay_to == "zero" else 0.0
    optimizer = torch.optim.AdamW(gates, lr=config.learning_rate, weight_decay=to_zero, foreach=False)
    objective = Objective(config, head, data, masters, weights)
    probe_rows = epoch_order(data.train, seed, 0)[:PROBE_QUESTIONS]
    if checkpoint and exists(checkpoint):
        state = load_checkpoint(checkpoint, masters, optimizer)
    else:
        state = LoopState(probe=objective.probe(probe_rows), epoch_start=pretrained)
    objective.settle(state.probe)

    def save() -> None:
        if checkpoint and world.rank == 0:
            put(partial(save_checkpoint, checkpoint, masters, optimizer, state))

    per_epoch = math.ceil(len(data.train) / config.batch_size)
    total = per_epoch * config.epochs
    for epoch in takewhile(lambda _: not state.stopped, range(state.step // per_epoch, config.epochs)):
        first = state.step - epoch * per_epoch
        if first == 0:
            state.epoch_start = masters.state()
        objective.refresh(epoch, state.epoch_start)
        clock, questions = time.monotonic(), 0
        batches = chunks(epoch_order(data.train, seed, epoch), config.batch_size)[first:]
        planned = [chunks(rows, config.micro_batch_size) for rows in batches]
        feed = objective.feed([part for micro in planned for part in micro[world.rank :: world.size]])
        for rows, micro in zip(batches, planned, strict=True):
            now = moment(config, state.probe["weight"] * state.lambda_factor, seed, state.step, total)
            mine = objective.gradients_of(islice(feed, len(micro[world.rank :: world.size])), now)
            facts = apply(masters, add(world.gather(mine, len(micro))) / len(rows), config.clip_norm)
            optimizer.param_groups[0]["lr"] = now.rate
            if decay and config.decay_to == "base":
                masters.approach(base, now.rate * decay)
            optimizer.step()
            state.record(facts, now.strength, now.rate, len(rows))
            if state.step % config.checkpoint_steps == 0 and state.step % per_epoch:
                save()
            questions += len(rows)
            advance(len(rows), f"loss {facts['task']:.3f}")
        answers = objective.validation()
        logp = answers.answer_logp(data.prompts) if data.rule == "greedy" else None
        record = state.close_epoch(epoch, answers, objective.routing_figures(answers), logp)
        act(config, state, world)
        state.keep_best(masters.state())
        save()
        report({**record, "questions_per_second": questions / max(time.monotonic() - clock, 1e-9)})

    selected = _take_exported(config, state, masters)
    _check_moved(masters, pretrained, frozen, head, state)
    probe = {**state.probe, **_final(objective.probe(probe_rows, state.probe["weight"] * state.lambda_factor))}
    return Outcome(masters.state(), state.epochs, probe, selected, state.table())


def _take_exported(config: FinetuneConfig, state: LoopState, masters: RouterMasters) -> int:
    """Give the masters the gates that are exported, and tell of which epoch they are. Raises TrainingError."""
    check_kept(state, config.guard)
    if config.select == "best_validation":
        masters.load(state.best_gates)
        return state.best_epoch
    if state.stopped:
        # The gates at the start of the collapsed epoch are those of the one before.
        masters.load(state.epoch_start)
        return len(state.epochs) - 2
    return len(state.epochs) - 1


def _final(probe: dict[str, float]) -> dict[str, float]:
    return {f"final_{key}": value for key, value in probe.items() if key != "weight"}


def _check_moved(
    masters: RouterMasters, pretrained: dict[str, Tensor], frozen: str, head: Chain, state: LoopState
) -> None:
    """Every trained gate changed and nothing else did. Raises TrainingError."""
    if head.digest() != frozen:
        raise TrainingError("a frozen weight changed during finetuning: this is a bug, and the result must not be used")
    still = [key for key, value in masters.state().items() if torch.equal(value, pretrained[key])]
    moving = any(row[4] > 0 and row[3] > 0 for row in state.steps)
    if still and moving:
        raise TrainingError(
            f"the gate(s) {', '.join(still)} did not change: no gradient reaches them, or the learning rate is too small"
        )
    if len(still) == len(pretrained):
        raise UnmovedError(
            f"nothing was trained: learning rate or gradient was 0 at each of {len(state.steps)} step(s). A schedule that anneals to a "
            "floor of 0 is there at the last step: take more steps (a smaller finetune.batch_size, more epochs), or raise its anneal_floor"
        )
