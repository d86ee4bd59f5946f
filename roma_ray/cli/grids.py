"""`roma-ray tune` and `roma-ray verdict`: many trials on Ray Tune."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from roma_ray.cli.options import check, quiet_ray


def grid_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of both: another base, where it runs and what it says."""
    for option in (
        click.option(
            "--summary", "summary_path", type=click.Path(dir_okay=False), help="Write what was found as JSON."
        ),
        click.option("--quiet", is_flag=True, help="No progress, only the result."),
        click.option(
            "--dry-run", is_flag=True, help="Say how many trials there are, what they share and cost; run nothing."
        ),
        click.option("--address", help="A Ray cluster (host:6379); `new` starts one here. Default: the one in sight."),
        click.option("--storage", help="Where artifacts live; default $ROMA_RAY_STORAGE, else ~/.roma-ray."),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override one setting of the base configuration.",
        ),
        click.option(
            "--base", type=click.Path(), help="Base configuration in place of the file's own: the same grid elsewhere."
        ),
    ):
        command = option(command)
    return command


def _on_ray(address: str | None) -> None:
    if address == "local":
        raise click.UsageError("its trials run on Ray Tune, also on one machine: --address new starts a cluster here")


@click.command()
@click.option("--space", type=click.Path(), help="YAML space file; default: the embedded one.")
@grid_options
@click.option("--stop-on-failure", is_flag=True, help="End the sweep with the first failed trial.")
def tune(
    space: str | None,
    base: str | None,
    overrides: tuple[str, ...],
    storage: str | None,
    address: str | None,
    dry_run: bool,
    stop_on_failure: bool,
    quiet: bool,
    summary_path: str | None,
) -> None:
    """Run a grid of trials on Ray Tune and compare them; run it again to finish what is missing."""
    from roma_ray.ablations.space import load_space
    from roma_ray.cli.preflight import check_place

    check_place(summary_path)
    loaded = load_space(space, overrides, storage, base)
    _on_ray(address or loaded.centre.ray.address)
    if not dry_run:
        for config in {trial.config.model: trial.config for trial in loaded.trials}.values():
            check(config)
    quiet_ray()
    from roma_ray.cli.sweeping import say_what, tune_space

    if dry_run:
        say_what(loaded)
    else:
        sys.exit(tune_space(loaded, address, quiet, stop_on_failure, summary_path))


@click.command()
@click.option("--arms", "arms_path", type=click.Path(), help="YAML file of the arms; default: the embedded one.")
@grid_options
def verdict(
    arms_path: str | None,
    base: str | None,
    overrides: tuple[str, ...],
    storage: str | None,
    address: str | None,
    dry_run: bool,
    quiet: bool,
    summary_path: str | None,
) -> None:
    """Judge whether the manifold adds anything to the task loss alone, and to pulls elsewhere: better, worse, equal, or not known.

    Each arm chooses its settings on validation questions within a grid of its own, and trains with every seed.
    """
    from roma_ray.ablations.arms import load_arms
    from roma_ray.cli.preflight import check_place

    check_place(summary_path)
    loaded = load_arms(arms_path, overrides, storage, base)
    _on_ray(address or loaded.space.centre.ray.address)
    if not dry_run:
        check(loaded.space.centre)
    quiet_ray()
    from roma_ray.cli.sweeping import judge_arms, say_arms

    if dry_run:
        say_arms(loaded)
    else:
        sys.exit(judge_arms(loaded, address, quiet, summary_path))
