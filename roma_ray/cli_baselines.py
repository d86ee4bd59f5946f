"""What `roma-ray baselines` does and prints."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import click


def run_methods(
    config: Any, methods: str, seeds: int | None, here: bool, address: str | None, summary_path: str | None, quiet: bool
) -> int:
    """Run the methods, print their table, name those that failed; the exit code."""
    from roma_ray.artifacts import write_json
    from roma_ray.baselines.registry import chosen_methods
    from roma_ray.comparison import UNOBSERVED, compare
    from roma_ray.engine.runners import LOCAL
    from roma_ray.engine.setup import resolve
    from roma_ray.stages.cluster import open_cluster
    from roma_ray.stages.runners import measure_near, ray_runners
    from roma_ray.terminal import open_progress

    names, progress = chosen_methods(methods), open_progress(quiet)
    with nullcontext() if here else open_cluster(config, address, progress.say) as cluster:
        setup, runners = resolve(config) if cluster is None else None, LOCAL
        if cluster is not None:
            device = cluster.device()
            setup = resolve(config, device=device, measure=measure_near(cluster, device, progress))
            runners = ray_runners(cluster, device)
        assert setup is not None
        setup.store.check()
        observer: Any = UNOBSERVED
        if config.tracking.enabled:
            from roma_ray.tracking.comparison import ComparisonTracker

            observer = ComparisonTracker(setup, progress)
        found = compare(setup, names, seeds or config.baselines.seeds, progress, runners, observer)
    print_comparison(found.summary)
    if summary_path:
        write_json(summary_path, found.summary)
    for name, reason in found.failures.items():
        click.echo(f"roma-ray: {name} failed: {reason}\n  {found.methods[name][0].path.parent}", err=True)
    return 1 if found.failures else 0


def print_comparison(summary: Mapping[str, Any]) -> None:
    """Print the table of all methods, what was equal for all, and what the oracle means."""
    from roma_ray.evaluation.methods import COSTS, RESULTS, budget_line, cost_rows, describe_oracle, result_rows
    from roma_ray.terminal import print_table

    title = f"{summary['name']}: {summary['questions']} test questions, with standard errors"
    print_table(title, RESULTS, result_rows(summary))
    print_table("costs, trunk included", COSTS, cost_rows(summary))
    click.echo(budget_line(summary))
    if summary["oracle"]:
        click.echo(describe_oracle(summary["oracle"]))
