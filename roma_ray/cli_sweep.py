"""What `roma-ray tune` and `roma-ray report SWEEP` do and print."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import click


def run_sweep(
    space: str | None,
    overrides: tuple[str, ...],
    storage: str | None,
    address: str | None,
    dry_run: bool,
    stop_on_failure: bool,
    quiet: bool,
    summary_path: str | None,
) -> int:
    """Run a space file's trials and print their ranking; the exit code."""
    from roma_ray.ablations.space import load_space
    from roma_ray.terminal import LiveBoard, LiveProgress, open_progress

    loaded = load_space(space, overrides, storage)
    from roma_ray.stages.environment import quiet_ray

    quiet_ray()
    from roma_ray.ablations import command

    if dry_run:
        click.echo("\n".join(command.dry_run(loaded)))
        return 0
    progress = open_progress(quiet)
    with LiveBoard(progress.console) if isinstance(progress, LiveProgress) else nullcontext() as board:
        sweep = command.run(loaded, progress, board, address, stop_on_failure=stop_on_failure)
    print_sweep(sweep)
    if summary_path:
        from roma_ray.artifacts import write_json

        write_json(summary_path, command.summary(sweep))
    click.echo(f"report: {sweep.stage.path / 'report.html'}")
    return 1 if command.failures(sweep) else 0


def report_sweep(sweep: str, storage: str | None) -> None:
    """Write the report of a sweep as far as it is, and print where."""
    from roma_ray.stages.environment import quiet_ray

    quiet_ray()
    from roma_ray.ablations.command import revisit
    from roma_ray.ablations.report import find_sweep_file
    from roma_ray.ablations.space import load_space
    from roma_ray.terminal import open_progress

    found, page = revisit(load_space(find_sweep_file(sweep), storage=storage), open_progress(quiet=False))
    print_sweep(found)
    click.echo(f"report: {page}" if page else "no trial of this sweep is finished")


def print_sweep(sweep: Any) -> None:
    """Print the ranking, and what failed."""
    from roma_ray.ablations.command import failures, result
    from roma_ray.terminal import print_table

    found = result(sweep)
    if found is not None:
        text, table = found
        print_table(f"{sweep.space.file.name}: settings by validation accuracy", table.header, table.rows)
        click.echo(text)
    for line in failures(sweep):
        click.echo(f"failed: {line}", err=True)
