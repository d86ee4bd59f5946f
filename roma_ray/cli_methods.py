"""What `roma-ray baselines` runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from roma_ray.comparison import UNOBSERVED, Comparison, ComparisonObserver, compare
from roma_ray.config import Config
from roma_ray.engine.runners import LOCAL
from roma_ray.engine.setup import resolve
from roma_ray.stages.cluster import open_cluster
from roma_ray.stages.runners import measure_near, ray_runners
from roma_ray.terminal import open_progress
from roma_ray.tracking.comparison import ComparisonTracker


def compare_methods(
    config: Config, names: Sequence[str], seeds: int | None, here: bool, address: str | None, quiet: bool
) -> Comparison:
    """Run the named methods, in this process if `here`, else on Ray, and judge them. Raises RomaError."""
    progress = open_progress(quiet)
    with ExitStack() as stack:
        if here:
            setup, runners = resolve(config), LOCAL
        else:
            cluster = stack.enter_context(open_cluster(config, address, progress.say))
            device = cluster.device()
            setup = resolve(config, device=device, measure=measure_near(cluster, device, progress))
            runners = ray_runners(cluster, device)
        setup.store.check()
        observer: ComparisonObserver = ComparisonTracker(setup, progress) if config.tracking.enabled else UNOBSERVED
        return compare(setup, names, seeds or config.baselines.seeds, progress, runners, observer)
