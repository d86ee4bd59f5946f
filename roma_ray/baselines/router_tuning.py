"""Finetuned routers: with the manifold term (RoMA) and without it (router tuning, lambda = 0)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from roma_ray.baselines.bench import Bench, within_budget
from roma_ray.baselines.contract import Fitted, Method
from roma_ray.config.schema import Config
from roma_ray.engine.answers import Answers
from roma_ray.engine.identity import finetune_settings, is_cloze
from roma_ray.engine.objective import TrainingData
from roma_ray.engine.training import finetune
from roma_ray.moe.reach import WeightsReader, read_weights


class RouterMethod(Method):
    """A method whose outcome is other gates in the tuned layers."""

    trains = True
    seeded = True
    term: ClassVar[Mapping[str, Any]] = {"kind": "none"}
    """Its own settings of the regularizer, in place of the configured ones."""

    def configure(self, config: Config) -> dict[str, Any]:
        """The budget and the settings of finetuning that the budget leaves alone."""
        shared = super().configure(config)
        settings = finetune_settings(within_budget(config, self.term), cloze=is_cloze(config))
        known = {*shared["budget"], "learning_rate"}
        return {**shared, "finetune": {name: value for name, value in settings.items() if name not in known}}

    def data(self, bench: Bench, prepared: dict[str, Tensor]) -> TrainingData:
        """What the loop reads."""
        return bench.data

    def fit(self, bench: Bench, prepared: dict[str, Tensor], learning_rate: float, seed: int) -> Fitted:
        """Finetune the gates of the tuned layers (eq. 8-10)."""
        return self.train(bench, prepared, learning_rate, seed, read_weights)

    def train(
        self, bench: Bench, prepared: dict[str, Tensor], learning_rate: float, seed: int, weights: WeightsReader
    ) -> Fitted:
        """As `fit`, with what reads the experts' weights. Raises UnmovedError where nothing but noise would move a gate."""
        outcome = finetune(
            bench.head,
            self.data(bench, prepared),
            bench.training_settings(learning_rate, self.term),
            layers=bench.setup.layers,
            seed=seed,
            advance=bench.advance,
            weights=weights,
        )
        facts = {"epochs": outcome.epochs, "probe": outcome.probe}
        return Fitted(outcome.gates, sum(gate.numel() for gate in outcome.gates.values()), facts)

    def predict(self, bench: Bench, fitted: Fitted, rows: Sequence[int], seed: int) -> Answers:
        """The answers of the head with the tuned gates."""
        with bench.gates(fitted.tensors):
            return bench.answer(rows)


class RouterTuning(RouterMethod):
    """Finetuning of the gates by the task loss alone."""

    name = "router_tuning"
    title = "gates finetuned by the task loss alone (λ = 0)"


class Roma(RouterMethod):
    """This project's method, within the same budget as the others."""

    name = "roma"
    title = "gates finetuned with the manifold term (eq. 9)"
    # The regularizer as configured for the run.
    term: ClassVar[Mapping[str, Any]] = {}
