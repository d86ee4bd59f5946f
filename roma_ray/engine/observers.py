"""Who hears of work as it goes: what an observer does with it must not raise, and changes no result. These tell nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from roma_ray.store.artifacts import Stage


class RunObserver:
    """Hears of one run of the pipeline."""

    def started(self, planned: Mapping[str, Stage]) -> None:
        """Before any work: where every stage of the pipeline lives or will live."""

    def stage_started(self, stage: Stage) -> None:
        """A stage that is not complete begins or goes on."""

    def epoch(self, stage: Stage) -> None:
        """Finetuning has written another epoch's record."""

    def stage_finished(self, stage: Stage) -> None:
        """A stage is complete, from now or from before."""

    def finished(self) -> None:
        """All that was asked for is complete."""


class ComparisonObserver:
    """Hears of one comparison of methods."""

    def planned(self, methods: Mapping[str, Sequence[Stage]]) -> None:
        """Before any method runs: where each method's stages live or will live."""

    def method_finished(self, name: str) -> None:
        """A method is complete, from now or from before, or failed."""

    def finished(self, summary: Mapping[str, Any]) -> None:
        """All methods were tried."""


NOBODY = RunObserver()
UNOBSERVED = ComparisonObserver()
