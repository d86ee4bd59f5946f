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
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from roma_ray.config import FinetuneConfig
from roma_ray.engine.batches import chunks, epoch_order
from roma_ray.engine.cache import ActivationCache, head_input
from roma_ray.engine.checkpoint import LoopState, load_checkpoint, save_checkpoint
from roma_ray.engine.forward import lay_out, mean_routing, routing_positions, task_losses
from roma_ray.engine.scoring import score_rows
from roma_ray.errors import TrainingError
from roma_ray.manifold.losses import neighbor_targets, regularizer_loss
from roma_ray.manifold.neighbors import Neighborhoods
from roma_ray.moe.masters import RouterMasters, frozen_digest
from roma_ray.moe.reading import read_routing
from roma_ray.moe.slices import Slice, slice_logits
from roma_ray.questions.prompts import Prompt

PROBE_QUESTIONS = 64
# Below this part of the task term's gradient the regularizer is idle, and the run says so.
IDLE_RATIO = 0.01


class World(Protocol):
    """The workers of one training run."""

    rank: int
    size: int

    def gather(self, mine: list[Tensor], total: int) -> list[Tensor]:
        """All workers' micro-batch results in plan order; worker r holds the micro-batches r, r + size, ..."""


@dataclass(frozen=True)
class Alone:
    """A world of one worker."""

    rank: int = 0
    size: int = 1

    def gather(self, mine: list[Tensor], total: int) -> list[Tensor]:
        assert len(mine) == total
        return mine


@dataclass
class TrainingData:
    """What the loop reads: everything by row number of the question table."""

    prompts: Sequence[Prompt]
    cache: ActivationCache
    train: list[int]
    validation: list[int]
    neighborhoods: Neighborhoods
    routing_NLE: Tensor
    """The base model's r of every question at the tuned layers, fp32; r_j of eq. 7 unless refreshed."""
    tokens: str
    rule: str
    cloze: bool
    batch_tokens: int


@dataclass
class Outcome:
    """The trained gates and what is worth telling about the run."""

    gates: dict[str, Tensor]
    epochs: list[dict[str, Any]]
    probe: dict[str, float]
    steps_run: int
    selected_epoch: int
    step_table: Tensor = field(repr=False)
    """[steps, 5]: task loss, manifold loss, lambda, learning rate, gate gradient norm (before clipping)."""


def finetune(
    head: Slice,
    data: TrainingData,
    config: FinetuneConfig,
    *,
    layers: Sequence[int],
    seed: int,
    world: World | None = None,
    checkpoint: Path | None = None,
    report: Callable[[dict[str, Any]], None] = lambda epoch: None,
    advance: Callable[[int, str], None] = lambda count, note: None,
) -> Outcome:
    """Finetune the gates of `layers`; resumes from `checkpoint` where it exists. Raises TrainingError, CacheError."""
    world = world or Alone()
    masters = RouterMasters(head, layers)
    frozen = frozen_digest(head.model)
    gates = masters.parameters()
    optimizer = torch.optim.AdamW(gates, lr=config.learning_rate, weight_decay=config.weight_decay, foreach=False)
    pretrained = {key: value.clone() for key, value in masters.state().items()}
    term = _Term(config, head, data, masters)

    steps_an_epoch = math.ceil(len(data.train) / config.batch_size)
    total_steps = steps_an_epoch * config.epochs
    state = load_checkpoint(checkpoint, masters, optimizer) if checkpoint and checkpoint.exists() else None
    if state is None:
        state = LoopState(
            probe=term.probe(epoch_order(data.train, seed, 0)[:PROBE_QUESTIONS]), epoch_start=masters.state()
        )
    weight = state.probe["weight"]
    first_step, steps_run = state.step, 0

    for epoch in range(state.step // steps_an_epoch, config.epochs):
        order = epoch_order(data.train, seed, epoch)
        plan = chunks(order, config.batch_size)
        start = state.step - epoch * steps_an_epoch
        if start == 0:
            state.epoch_start = masters.state()
        term.refresh(epoch, state.epoch_start)
        clock, questions = time.monotonic(), 0
        for rows in plan[start:]:
            rate = config.learning_rate * _warmup(state.step, total_steps, config.warmup_fraction)
            strength = weight * _warmup(state.step, total_steps, config.regularizer.warmup_fraction)
            micro = chunks(rows, config.micro_batch_size)
            mine = [term.gradients(m, strength) for m in micro[world.rank :: world.size]]
            sums = _add(world.gather(mine, len(micro)))
            facts = _apply(gates, sums, len(rows), config.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            state.record([facts["task"], facts["manifold"], strength, rate, facts["norm"]], facts, len(rows))
            questions += len(rows)
            steps_run += 1
            advance(len(rows), f"loss {facts['task']:.3f}")
            if (
                checkpoint
                and world.rank == 0
                and state.step % config.checkpoint_steps == 0
                and state.step % steps_an_epoch
            ):
                save_checkpoint(checkpoint, masters, optimizer, state)
        validation = score_rows(
            head,
            data.cache,
            data.prompts,
            data.validation,
            tokens=data.tokens,
            rule=data.rule,
            batch_tokens=data.batch_tokens,
        )
        summary = state.close_epoch(epoch, validation.accuracy, masters.state())
        if checkpoint and world.rank == 0:
            save_checkpoint(checkpoint, masters, optimizer, state)
        report(
            {
                **summary,
                "questions_per_second": questions / max(time.monotonic() - clock, 1e-9),
                "resumed_at": first_step,
            }
        )

    chosen = state.best_epoch if config.select == "best_validation" else config.epochs - 1
    if config.select == "best_validation":
        masters.load(state.best_gates)
    _check_moved(masters, pretrained, frozen, head, state)
    state.probe.update(
        {
            f"final_{k}": v
            for k, v in term.probe(epoch_order(data.train, seed, 0)[:PROBE_QUESTIONS]).items()
            if k != "weight"
        }
    )
    return Outcome(masters.state(), state.epochs, state.probe, steps_run, chosen, state.table())


class _Term:
    """The objective of eq. 9 on some rows, as sums over questions."""

    def __init__(self, config: FinetuneConfig, head: Slice, data: TrainingData, masters: RouterMasters) -> None:
        self.config, self.head, self.data, self.masters = config, head, data, masters
        self.device = str(next(head.model.parameters()).device)
        self.targets = neighbor_targets(data.neighborhoods, data.routing_NLE)
        self.columns = [n for n, router in enumerate(head.routers) if router.layer in masters.layers]
        if data.cloze:
            self.over = "continuation"
        else:
            self.over = config.task_loss

    def losses(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(task, regularizer, routing entropy) summed over the rows; the first two carry the graph."""
        prompts = [self.data.prompts[row] for row in rows]
        layout = lay_out(prompts, gold_only=self.data.cloze)
        inputs = head_input(self.head, self.data.cache, rows, prompts, layout)
        layout = layout.to(self.device)
        positions_BP = routing_positions(layout, self.data.tokens)
        routers = [self.head.routers[n] for n in self.columns]
        with read_routing(self.head.model, routers, positions_BP) as tape:
            logits_BPV = slice_logits(self.head, inputs, layout.mask_BS, layout.score_positions_BP)
        routing_BLE = mean_routing(tape.routing_BPLE, positions_BP, layout)
        task = task_losses(logits_BPV, layout, prompts, over=self.over)
        kind = self.config.regularizer.kind
        targets = self.targets.take(torch.tensor(rows), torch.device(self.device))
        penalty = regularizer_loss(kind, routing_BLE, targets=targets, parameters=self.masters.parameters())
        entropy = -(routing_BLE * routing_BLE.clamp_min(1e-30).log()).sum(-1).mean(-1).sum().detach()
        return task, penalty, entropy

    def gradients(self, rows: Sequence[int], strength: float) -> Tensor:
        """One flat fp32 vector: every gate's gradient sum, then the sums of task loss, regularizer and entropy."""
        task, penalty, entropy = self.losses(rows)
        # Adding an unused term would still be exact, but a run without one must be readable as such.
        loss = task if strength == 0 else task + strength * penalty
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is not finite (task {task.item()}, regularizer {penalty.item()}). Lower finetune.learning_rate or "
                "finetune.regularizer.weight; the last checkpoint is kept."
            )
        parts = torch.autograd.grad(loss, self.masters.parameters())
        sums = torch.stack([task.detach(), penalty.detach(), entropy]).float()
        return torch.cat([*(p.reshape(-1) for p in parts), sums])

    def probe(self, rows: Sequence[int]) -> dict[str, float]:
        """Gradient norm of each term on the gates over some rows, their ratio, and the lambda in force (DESIGN 5.7)."""
        gates = self.masters.parameters()
        totals = [[torch.zeros_like(g) for g in gates] for _ in range(2)]
        for micro in chunks(rows, self.config.micro_batch_size):
            task, penalty, _ = self.losses(micro)
            for term, total in ((task, totals[0]), (penalty, totals[1])):
                if term.requires_grad:
                    grads = torch.autograd.grad(term, gates, retain_graph=term is task, allow_unused=True)
                    for sum_, grad in zip(total, grads, strict=True):
                        if grad is not None:
                            sum_ += grad
        task_norm, penalty_norm = (float(torch.cat([g.reshape(-1) for g in t]).norm()) / len(rows) for t in totals)
        regularizer = self.config.regularizer
        weight = regularizer.weight
        if regularizer.kind == "none":
            weight = 0.0
        elif weight == "auto":
            if penalty_norm == 0:
                raise TrainingError(
                    "finetune.regularizer.weight: auto needs a regularizer with a gradient; give a number instead"
                )
            weight = regularizer.gradient_ratio * task_norm / penalty_norm
        assert isinstance(weight, float | int)
        ratio = weight * penalty_norm / task_norm if task_norm else 0.0
        return {
            "task_gradient": task_norm,
            "regularizer_gradient": penalty_norm,
            "gradient_ratio": ratio,
            "weight": float(weight),
        }

    def refresh(self, epoch: int, gates: dict[str, Tensor]) -> None:
        """With `refresh`, rebuild r_j from the routers as they were at the start of this epoch (epoch 0: the base's)."""
        if not self.config.regularizer.refresh or epoch == 0:
            return
        now = self.masters.state()
        self.masters.load(gates)
        data = self.data
        rows = data.neighborhoods.indices.unique().tolist()
        scores = score_rows(
            self.head,
            data.cache,
            data.prompts,
            rows,
            tokens=data.tokens,
            rule=data.rule,
            batch_tokens=data.batch_tokens,
        )
        routing_NLE = data.routing_NLE.clone()
        routing_NLE[rows] = torch.from_numpy(scores.routing_NLE[:, self.columns])
        self.targets = neighbor_targets(data.neighborhoods, routing_NLE)
        self.masters.load(now)


def _warmup(step: int, total: int, fraction: float) -> float:
    """Linear from 0 over a fraction of the run's real steps, then 1."""
    return min(1.0, (step + 1) / max(1, round(fraction * total)))


def _add(parts: Sequence[Tensor]) -> Tensor:
    """Sum in plan order: the order is what makes the bits independent of who computed what."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _apply(gates: Sequence[Tensor], sums: Tensor, count: int, clip_norm: float) -> dict[str, float]:
    """Put the mean gradient on the gates and clip it; returns the step's figures. Raises TrainingError."""
    mean = sums / count
    start = 0
    for gate in gates:
        gate.grad = mean[start : start + gate.numel()].reshape(gate.shape).clone()
        start += gate.numel()
    norm = float(torch.nn.utils.clip_grad_norm_(gates, clip_norm))
    if not math.isfinite(norm):
        raise TrainingError(
            "a gate's gradient is not finite. Lower finetune.learning_rate; the last checkpoint is kept."
        )
    task, manifold, entropy = mean[start:].tolist()
    return {"task": task, "manifold": manifold, "entropy": entropy, "norm": norm}


def _check_moved(
    masters: RouterMasters, pretrained: dict[str, Tensor], frozen: str, head: Slice, state: LoopState
) -> None:
    """Every trained gate changed and nothing else did. Raises TrainingError."""
    if frozen_digest(head.model) != frozen:
        raise TrainingError("a frozen weight changed during finetuning: this is a bug, and the result must not be used")
    still = [key for key, value in masters.state().items() if torch.equal(value, pretrained[key])]
    moving = any(row[4] > 0 and row[3] > 0 for row in state.steps)
    if still and moving:
        raise TrainingError(
            f"the gate(s) {', '.join(still)} did not change: no gradient reaches them, or the learning rate is too small"
        )
