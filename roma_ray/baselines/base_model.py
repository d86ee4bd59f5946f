"""The model as it is: what every method is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from roma_ray.baselines.bench import Bench
from roma_ray.baselines.contract import Fitted, Method
from roma_ray.engine.answers import Answers


class Base(Method):
    """The untouched model."""

    name = "base"
    title = "the model as it is"

    def predict(self, bench: Bench, fitted: Fitted, rows: Sequence[int], seed: int) -> Answers:
        """The model's own answers."""
        return bench.answer(rows)
