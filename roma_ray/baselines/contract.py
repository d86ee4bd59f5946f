"""The one shape of all methods: configure, prepare, fit, predict.

A method sees a `Bench`: questions, the activation cache, the base model's routing, neighborhoods, and the head. Unless it
says that it `sees_labels`, the test questions that it is given carry no answer, so no method can use one by mistake.
The runner (`method_runs.py`) chooses the learning rate on the validation questions, over one grid for all methods that train.
What a method does at each question by itself it may leave to others (`works_on`): then it is done in planned parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from roma_ray.baselines.bench import Bench
from roma_ray.config.schema import Config
from roma_ray.engine.answers import Answers


@dataclass(frozen=True)
class Fitted:
    """What fitting left behind: tensors on the CPU by name, and plain facts worth reading later."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    trained_parameters: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


NOTHING = Fitted()


class Method(ABC):
    """A method of the comparison; the defaults are those of one that has nothing to learn."""

    name: str
    title: str
    """One line for the table's legend."""
    trains: bool = False
    """It is fitted by gradient steps, once for each learning rate of the grid."""
    seeded: bool = False
    """Its result depends on the seed."""
    sees_labels: bool = False
    """It is given the test questions' answers: an upper bound or a control, never a method to be used."""
    runs_whole_model: bool = False
    """It changes what the trunk sees, so its questions cost the whole model and cached activations do not serve."""

    works_on: str | None = None
    """The split on whose questions it works one by one, each by itself (`test`: to answer them, `train`: before it learns). They are
    shared out in planned parts (`method_parts.py`) among the workers there are. None: the whole method is one task."""

    def configure(self, config: Config) -> dict[str, Any]:
        """The settings that its result depends on besides those of the bench, as plain JSON: part of its fingerprint."""
        return {"budget": budget(config)} if self.trains else {}

    def check(self, bench: Bench) -> None:
        """Refuse before any work. Raises UnmovedError."""
        return

    def parts(self, bench: Bench) -> list[list[int]]:
        """The questions of `works_on` in planned batches, each of which is worked on alone: so who does which changes no bit."""
        assert self.works_on is not None
        return bench.batches(bench.rows[self.works_on])

    def work(self, bench: Bench, rows: Sequence[int], seed: int) -> Answers:
        """What it finds for the questions of a part: where it works on the test questions, its answers. Raises CacheError."""
        return self.predict(bench, NOTHING, rows, seed)

    def learned(self, bench: Bench, found: Answers) -> dict[str, Tensor]:
        """Where it works on the training questions: what `prepare` gives, of all that was found."""
        assert self.works_on == "train"
        return {}

    def prepare(self, bench: Bench, seed: int) -> dict[str, Tensor]:
        """What all learning rates share, computed once."""
        if self.works_on != "train":
            return {}
        self.check(bench)
        return self.learned(bench, self.work(bench, bench.rows["train"], seed))

    def fit(self, bench: Bench, prepared: dict[str, Tensor], learning_rate: float, seed: int) -> Fitted:
        """Learn from the training questions; leaves the bench as it was. Raises TrainingError, CacheError."""
        return NOTHING

    @abstractmethod
    def predict(self, bench: Bench, fitted: Fitted, rows: Sequence[int], seed: int) -> Answers:
        """Log-likelihoods of every choice of the questions `rows`; leaves the bench as it was. Raises CacheError."""


def budget(config: Config) -> dict[str, Any]:
    """The settings that are equal for every method that trains."""
    return {
        "epochs": config.finetune.epochs,
        "batch_size": config.finetune.batch_size,
        "micro_batch_size": config.baselines.micro_batch_size,
        "learning_rates": list(config.baselines.learning_rates),
    }
