"""What `roma-ray baselines` does, and the tables that it, `tune` and the pipeline's commands print."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import click

from roma_ray.baselines.registry import chosen_methods
from roma_ray.comparison import UNOBSERVED, Comparison, ComparisonObserver, compare
from roma_ray.config import Config
from roma_ray.engine.runners import LOCAL
from roma_ray.engine.setup import resolve
from roma_ray.evaluation.methods import COSTS, RESULTS, budget_line, cost_rows, describe_oracle
from roma_ray.evaluation.methods import result_rows as method_rows
from roma_ray.evaluation.summary import result_rows, warnings_of
from roma_ray.stages.cluster import open_cluster
from roma_ray.stages.runners import measure_near, ray_runners
from roma_ray.terminal import open_progress, print_table
from roma_ray.tracking.comparison import ComparisonTracker


def compare_methods(
    config: Config, methods: str, seeds: int | None, here: bool, address: str | None, quiet: bool
) -> Comparison:
    """Run the named methods, in this process if `here`, else on Ray, and judge them. Raises RomaError."""
    names, progress = chosen_methods(methods), open_progress(quiet)
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


def print_comparison(summary: Mapping[str, Any]) -> None:
    """Print the table of all methods, what was equal for all, and what the oracle means."""
    title = f"{summary['name']}: {summary['questions']} test questions, with standard errors"
    print_table(title, RESULTS, method_rows(summary))
    print_table("costs, trunk included", COSTS, cost_rows(summary))
    click.echo(budget_line(summary))
    if summary["oracle"]:
        click.echo(describe_oracle(summary["oracle"]))


def print_run(summary: Mapping[str, Any]) -> None:
    """Print the result table on the test questions, diagnostics, and what a reader must know."""
    header = ("test questions", "n", "base %", "RoMA %", "difference", "McNemar p")
    print_table(f"{summary['name']}: accuracy with standard errors", header, result_rows(summary))
    found = summary["diagnostics"]
    rows = [
        (
            str(layer),
            f"{found['base']['routing_entropy'][n]:.3f} -> {found['tuned']['routing_entropy'][n]:.3f}",
            f"{max(found['base']['expert_load'][n]):.3f} -> {max(found['tuned']['expert_load'][n]):.3f}",
            f"{found['routing_kl'][n]:.4f}",
            f"{found['selection_overlap'][n]:.3f}",
        )
        for n, layer in enumerate(found["layers"])
    ]
    print_table(
        "routing of the last prompt token, base -> tuned",
        ("layer", "entropy", "largest load", "KL to base", "top-k kept"),
        rows,
    )
    for line in warnings_of(summary):
        click.echo(f"note: {line}")
    click.echo(f"adapter: {summary['paths']['finetune']}/adapter")


def print_sweep(sweep: Any) -> None:
    """Print the ranking, and what failed."""
    from roma_ray.ablations.command import failures, result

    found = result(sweep)
    if found is not None:
        text, table = found
        print_table(f"{sweep.space.file.name}: settings by validation accuracy", table.header, table.rows)
        click.echo(text)
    for line in failures(sweep):
        click.echo(f"failed: {line}", err=True)
