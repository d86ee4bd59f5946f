"""Settings of router finetuning, eq. 8-10 (`finetune`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from roma_ray.config.section import Section


class ScheduleConfig(Section):
    """A value over the training's steps: it rises linearly from 0, stays, or falls from there to a floor at the last step."""

    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    """Part of all steps over which it rises."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """The same as a number of steps."""
    anneal: Literal["none", "linear", "cosine"] = "none"
    """How it falls after the rise."""
    anneal_floor: float = Field(default=0.0, ge=0, le=1)
    """Part of the whole value that is left at the last step."""


class TaskScheduleConfig(ScheduleConfig):
    """The schedule of the task loss in eq. 9."""

    warmup_fraction: float = Field(default=0.0, ge=0, le=1)
    """Above 0 the regularizer comes first (its own warm-up is `finetune.regularizer.warmup_fraction`)."""


class LogitsConfig(Section):
    """What the tuned routers' logits go through in training alone: exported routers need none of it."""

    temperature: float = Field(default=1.0, gt=0)
    """What they are divided by at first; it reaches 1 at the last step."""
    anneal: Literal["linear", "cosine"] = "linear"
    """How it gets there."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Part of them that is set to 0, the others scaled up, at each token of a question (not of the instruction that all share):
    drawn by seed, step and question id, whatever the number of workers."""


class RegularizerConfig(ScheduleConfig):
    """The second term of eq. 9; the schedule is lambda's."""

    kind: Literal["manifold", "none", "l1", "l2", "entropy", "base", "prior"] = "manifold"
    """`manifold` is RoMA; the others are what it is compared with. `base`: KL(r_i || the base model's r of that question), a pull
    to the start. `prior`: KL(r_i || q) to a fixed q."""
    prior: Literal["uniform", "task"] = "uniform"
    """q of `prior`: every expert alike, or the mean base routing of the task's successes."""
    entropy_sign: Literal["raise", "lower"] = "raise"
    """Where `entropy` moves the entropy of r_i: up by KL(r_i || uniform), or down by the entropy itself."""
    entropy_target: float | None = Field(default=None, ge=0, le=1)
    """Where `entropy` ends, as a part of log E: a row whose entropy is past it is not moved. Default: nowhere."""
    distance: Literal["squared", "kl"] = "squared"
    """Of r_i to its neighbors (manifold): eq. 7, or KL(m_i || r_i) to their mean row, whose gradient in the logits, r_i - m_i,
    does not vanish where the router is nearly certain (not the paper's)."""
    positions: Literal["mean", "sum"] = "mean"
    """Of several `routing.tokens` (manifold): pull their mean row, or each one's own to the neighbors' at the same place."""
    weight: float | Literal["auto"] = 0.8
    """lambda. `auto` sets it on a probe batch so that this term's gradient on the gates is `gradient_ratio` of the task
    term's."""
    gradient_ratio: float = Field(default=0.3, gt=0)
    """Used by `weight: auto` only."""
    refresh: bool = False
    """Recompute the neighbors' routing r_j from the tuned routers at the start of each epoch."""

    @field_validator("weight")
    @classmethod
    def _not_negative(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and not 0 <= value < float("inf"):
            raise ValueError("lambda is a finite number of at least 0, or `auto`")
        return value


class GuardConfig(Section):
    """What watches the routing of the validation questions for a collapse, layer by layer, once an epoch (docs/paper.md)."""

    action: Literal["none", "warn", "halve", "stop"] = "warn"
    """After an epoch past a threshold: `warn` says so; `halve` also trains on with half the lambda; `stop` also ends the training and
    keeps the epochs before."""
    least_entropy: float = Field(default=0.5, ge=0, lt=1)
    """Of the base model's mean routing entropy: what a layer must keep. Below it fewer experts share a token's weight. 0: off."""
    most_entropy: float = Field(default=0.9, gt=0, le=1)
    """Of the way from the base model's mean entropy to that of even weights: past it routers no longer choose. 1: off."""
    most_unused: float = Field(default=0.25, gt=0, le=1)
    """Of a layer's experts: how many may fall out of use, beyond those that the base model does not use on these questions. 1: off."""
    most_load: float = Field(default=0.9, gt=0, le=1)
    """Of the way from the base model's largest load to the largest there is, one expert selected by all questions. 1: off."""
    most_gradient: float = Field(default=10.0, gt=1)
    """Of the first epoch's mean gradient norm on a layer's gate: a healthy one falls."""


class DistillConfig(Section):
    """The teacher of `task_loss: distill`: its next-token distribution at the answers' tokens is what the student's is drawn to."""

    teacher: str | None = None
    """Folder or hub id of a checkpoint with the student's tokenizer (the model before pruning); default: the student itself, which
    `dtype` then makes another."""
    revision: str | None = None
    """Branch, tag or commit of a hub teacher."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type that it runs in; `auto` is the checkpoint's."""
    top_n: int = Field(default=64, ge=1)
    """Its likeliest tokens that are kept at each place; all others count as one outcome."""


class FinetuneConfig(ScheduleConfig):
    """Router finetuning, eq. 8-10; the schedule is the learning rate's."""

    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=32, ge=1)
    """Questions of one optimizer step, over all workers."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Questions of one forward pass. Part of the result's identity; independent of the number of workers."""
    learning_rate: float = Field(default=7e-5, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled, as in AdamW: each step moves the gates by this part of the learning rate times the way to `decay_to`."""
    decay_to: Literal["zero", "base"] = "zero"
    """Zero, as usual, which pretrained gates are far from; or the pretrained gates themselves. (Soft prompts decay to zero.)"""
    clip_norm: float = Field(default=1.0, gt=0)
    task_loss: Literal["choices", "vocabulary", "distill"] = "choices"
    """`letter`: cross-entropy over the choice letters or over the whole vocabulary. `cloze` and `free` always use the right
    continuation over the whole vocabulary. `distill`, in any format: KL to a teacher at the right answer's tokens."""
    distill: DistillConfig = DistillConfig()
    task_schedule: TaskScheduleConfig = TaskScheduleConfig()
    logits: LogitsConfig = LogitsConfig()
    select: Literal["last", "best_validation"] = "last"
    """Which epoch's routers are exported."""
    checkpoint_steps: int = Field(default=25, ge=1)
    """Optimizer steps between checkpoints."""
    chain: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Workers that hold the head (the layers from the cut up) between them, a slice of its layers each: micro-batches go forward
    and backward through them, several at once, and so do validation and the run's evaluation. `auto`: as few as have the memory. As
    many chains train side by side as there is room for. Of a cluster: one process holds the whole head. No part of any fingerprint:
    the results are the same."""
    chain_activations: Literal["keep", "recompute"] = "keep"
    """Of a slice below the last one, between a micro-batch's forward and backward pass: `keep` them, or `recompute` them from the
    states that entered, which takes the slice's forward pass again and the memory of one micro-batch in place of several."""
    regularizer: RegularizerConfig = RegularizerConfig()
    guard: GuardConfig = GuardConfig()
