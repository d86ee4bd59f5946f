"""What every method works on: one set of questions, one cache of activations, one head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from roma_ray.config.baseline_settings import BaselinesConfig
from roma_ray.config.finetune_settings import FinetuneConfig, GuardConfig
from roma_ray.config.schema import Config
from roma_ray.engine.answers import Answers
from roma_ray.engine.batches import plan_batches
from roma_ray.engine.forward import own_tokens
from roma_ray.engine.objective import TrainingData
from roma_ray.engine.scoring import Scores, score_rows
from roma_ray.engine.setup import Setup
from roma_ray.manifold.neighbors import Neighborhoods, find_neighbors
from roma_ray.moe.masters import RouterMasters
from roma_ray.moe.slices import Slice
from roma_ray.stages.embedding import embedding_texts, read_embeddings
from roma_ray.stages.finetuning import TrainJob
from roma_ray.stages.neighborhoods import usable_rows
from roma_ray.store.artifacts import Stage

Kept = TypeVar("Kept")
HIDDEN = -1
"""The answer of a question whose label a method must not see."""


def _ignore(amount: float, note: str = "") -> None:
    return


@dataclass(frozen=True)
class QuestionCost:
    """What one question costs."""

    flops: float
    seconds: float


@dataclass
class Bench:
    """Everything that a method may look at, by row number of the question table."""

    setup: Setup
    stages: dict[str, Stage]
    """The finished stages: questions, extract, embed, neighbors."""
    data: TrainingData
    rows: dict[str, list[int]]
    """Usable rows of each split; `train` are the training questions in use."""
    embeddings_NC: Tensor
    trunk: QuestionCost | None = None
    """What the trunk costs a question, once it was measured."""
    advance: Callable[..., None] = _ignore
    """Receives progress."""
    _heads: dict[str, Slice] = field(default_factory=dict, repr=False)
    _kept: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """Of this bench alone: one with other questions, or without answers, keeps its own."""

    @property
    def config(self) -> BaselinesConfig:
        return self.setup.config.baselines

    @property
    def head(self) -> Slice:
        """The layers from the cut up; loaded once, shared by all methods."""
        if "head" not in self._heads:
            self._heads["head"] = self.setup.model.load(self.setup.cut, None, with_lm_head=True)
        return self._heads["head"]

    @property
    def whole(self) -> Slice:
        """All layers, for methods that change what the trunk sees."""
        if "whole" not in self._heads:
            self._heads["whole"] = (
                self.head if self.setup.cut == 0 else self.setup.model.load(0, None, with_lm_head=True)
            )
        return self._heads["whole"]

    @property
    def columns(self) -> list[int]:
        """Where the tuned layers lie among the head's routers."""
        return [n for n, router in enumerate(self.head.routers) if router.layer in self.setup.layers]

    def drop_models(self) -> None:
        """Forget the loaded models: the next use loads them anew."""
        self._heads.clear()

    def once(self, name: str, make: Callable[[], Kept]) -> Kept:
        """What a method computes of all its questions before it works on the first of them; kept for the further ones."""
        if name not in self._kept:
            self._kept[name] = make()
        found: Kept = self._kept[name]
        return found

    def blinded(self) -> Bench:
        """The same bench without the answers of test questions and held-out tasks; it shares the loaded models."""
        return self.once("blinded", self._blinded)

    def _blinded(self) -> Bench:
        seen = ("train", "validation")
        prompts = [p if p.split in seen else dataclasses.replace(p, answer=HIDDEN) for p in self.data.prompts]
        return dataclasses.replace(self, data=dataclasses.replace(self.data, prompts=prompts))

    def score(self, rows: Sequence[int], *, tokens: str = "Last1") -> Scores:
        """The head's answers to the questions, with the routing rows of the tuned layers' tokens."""
        data = self.data
        return score_rows(
            self.head, data.states, data.prompts, rows, tokens=tokens, rule=data.rule, batch_tokens=data.batch_tokens
        )

    def answer(self, rows: Sequence[int]) -> Answers:
        """The head's answers as they are judged."""
        return Answers(list(rows), self.score(rows).scores)

    def accuracy(self, answers: Answers) -> float:
        """Part of the answers that is right. Only for questions whose labels the bench holds."""
        prompts = self.data.prompts
        chosen = answers.predictions(prompts, self.data.rule)
        assert all(prompts[row].answer != HIDDEN for row in answers.rows), "hidden labels cannot be judged"
        return float(np.mean([prompts[row].answer == c for row, c in zip(answers.rows, chosen, strict=True)]))

    def batches(self, rows: Sequence[int], *, copies: int = 1) -> list[list[int]]:
        """Planned batches of rows within `extraction.batch_tokens` tokens; a row counts `copies` times."""
        prefix = self.data.states.prefix
        sizes = [copies * own_tokens(self.data.prompts[row], prefix) for row in rows]
        return [[rows[n] for n in batch] for batch in plan_batches(sizes, self.data.batch_tokens)]

    def neighbors_of(self, rows: Sequence[int]) -> Neighborhoods:
        """The k nearest successful training questions of any questions (eq. 3, 5, 6), never one with an equal text."""
        config, questions = self.setup.config, self.stages["questions"]
        queried_N = torch.zeros(len(self.data.prompts), dtype=torch.bool)
        queried_N[list(rows)] = True
        return find_neighbors(
            self.embeddings_NC,
            self.data.successful_N,
            training_N=training_mask(self),
            queried_N=queried_N,
            ids=[p.id for p in self.data.prompts],
            text_keys=embedding_texts(questions, config.embedding.context),
            k=self.config.c3po.neighbors,
            similarity="gaussian",
            sigma=config.neighbors.sigma,
        )

    @contextmanager
    def gates(self, state: dict[str, Tensor], layers: Sequence[int] | None = None) -> Iterator[None]:
        """The head with other routers inside the block, in the tuned layers or others: fp32 masters as finetuning leaves them."""
        masters = RouterMasters(self.head, self.setup.layers if layers is None else layers)
        try:
            masters.load(state)
            yield
        finally:
            masters.detach()

    def training_settings(self, learning_rate: float, regularizer: Mapping[str, Any]) -> FinetuneConfig:
        """The settings of finetuning with a rate of the grid."""
        budgeted = within_budget(self.setup.config, regularizer)
        return budgeted.model_copy(update={"learning_rate": learning_rate})


def within_budget(config: Config, regularizer: Mapping[str, Any]) -> FinetuneConfig:
    """The settings of finetuning within the budget that all methods have, with the method's own settings of the regularizer.

    The rest is as configured for RoMA, without the guard: a training that it ends or weakens has another budget.
    """
    base = config.finetune
    return base.model_copy(
        update={
            "micro_batch_size": config.baselines.micro_batch_size,
            "guard": GuardConfig(action="none"),
            "regularizer": base.regularizer.model_copy(update=dict(regularizer)),
        }
    )


def training_mask(bench: Bench) -> Tensor:
    """Mask [N] of the training questions in use."""
    mask_N = torch.zeros(len(bench.data.prompts), dtype=torch.bool)
    mask_N[bench.rows["train"]] = True
    return mask_N


def open_bench(setup: Setup, stages: dict[str, Stage]) -> Bench:
    """Open the finished stages of a run. Raises ArtifactError, CacheError."""
    scratch = Stage(setup.store.root / "baselines", "baselines", {})
    data = TrainJob(setup, stages, scratch).open_data()
    usable = usable_rows(stages["extract"]).tolist()
    rows = {"train": data.train, "validation": data.validation}
    rows["test"] = [n for n, p in enumerate(data.prompts) if p.split == "test" and usable[n]]
    return Bench(setup, stages, data, rows, read_embeddings(stages["embed"]))
