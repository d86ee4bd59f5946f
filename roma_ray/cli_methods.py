"""What `roma-ray baselines` runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from roma_ray.comparison import UNOBSERVED, Comparison, ComparisonObserver, compare
from roma_ray.config import Config
from roma_ray.engine.setup import resolve
from roma_ray.stages.runners import open_place
from roma_ray.terminal import open_progress
from roma_ray.tracking.comparison import ComparisonTracker


def compare_methods(
    config: Config, names: Sequence[str], seeds: int | None, address: str | None, quiet: bool
) -> Comparison:
    """Run the named methods, in this process if the address is `local`, else on Ray, and judge them. Raises RomaError."""
    progress = open_progress(quiet)
    with open_place(config, address, progress) as place:
        setup = resolve(config, device=place.device, measure=place.measure)
        setup.store.check()
        observed: AbstractContextManager[ComparisonObserver] = nullcontext(UNOBSERVED)
        if config.tracking.enabled:
            observed = ComparisonTracker(setup, progress)
        with observed as observer:
            return compare(setup, names, seeds or config.baselines.seeds, progress, place.runners, observer)
