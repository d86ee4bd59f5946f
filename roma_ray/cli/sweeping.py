"""What `roma-ray tune` and `roma-ray report SWEEP` do: one call each, and printing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from roma_ray.ablations import sweep_command, verdict, verdict_page
from roma_ray.ablations.arms import Arms
from roma_ray.ablations.space import Space, load_space, seeds_space
from roma_ray.ablations.sweep import Sweep
from roma_ray.ablations.sweep_report import PAGE, find_sweep_file
from roma_ray.ablations.sweep_transfer import TRANSFER_LEGEND
from roma_ray.config.schema import Config
from roma_ray.evaluation.measures import LEGEND
from roma_ray.store.artifacts import write_json
from roma_ray.store.files import exists
from roma_ray.terminal import LiveBoard, LiveProgress, open_progress, print_table, say


def say_what(space: Space) -> None:
    """Print what a sweep would do; nothing starts."""
    say("\n".join(sweep_command.dry_run(space)))


def say_arms(arms: Arms) -> None:
    """Print what a verdict would do; nothing starts."""
    say_what(arms.space)
    seeds = arms.file.seeds[1:]
    if seeds:
        say(
            f"then, not in this cost: the chosen setting of each of {len(arms.grids)} arms with seed(s) {', '.join(map(str, seeds))}: "
            f"{len(arms.grids) * len(seeds)} trials"
        )


def tune_space(space: Space, address: str | None, quiet: bool, stop_on_failure: bool, summary_path: str | None) -> int:
    """Run what is missing of a sweep and print what it says; the exit code: 1 where a trial failed."""
    progress = open_progress(quiet)
    with LiveBoard(progress.console) if isinstance(progress, LiveProgress) else nullcontext() as board:
        sweep = sweep_command.run(space, progress, board, address, stop_on_failure=stop_on_failure)
    if summary_path:
        write_json(summary_path, sweep_command.summary(sweep))
    print_sweep(sweep)
    if exists(sweep.stage.path / PAGE):
        say(f"report: {sweep.stage.path / PAGE}")
    return 1 if sweep_command.failures(sweep) else 0


def run_seeds(config: Config, count: int, address: str | None, quiet: bool, summary_path: str | None) -> int:
    """Run a configuration with several seeds and print what they say together; the exit code: 1 where one failed."""
    return tune_space(seeds_space(config, count), address, quiet, False, summary_path)


def judge_arms(arms: Arms, address: str | None, quiet: bool, summary_path: str | None) -> int:
    """Run what is missing of a verdict, print and write it; the exit code: 1 where an arm could not be trained."""
    found, sweeps = verdict.run(arms, open_progress(quiet), address)
    page = verdict_page.write_page(found, arms.file.name, sweeps)
    if summary_path:
        write_json(summary_path, verdict_page.plain(found))
    table = verdict_page.arm_table(found)
    print_table(f"{arms.file.name}: arms on test questions, ± standard error over questions", table.header, table.rows)
    table = verdict_page.finding_table(found, found.measure)
    print_table(f"{found.judged} against the others", table.header, table.rows)
    for line in verdict_page.notes(found):
        say(f"note: {line}")
    for line in verdict_page.sentences(found):
        say(line)
    say(f"report: {page.path / PAGE}")
    return 1 if found.missing else 0


def report_sweep(place: str, overrides: Sequence[str], storage: str | None) -> None:
    """Write and name the report of a sweep's trials as far as they are."""
    sweep, page = sweep_command.revisit(
        load_space(find_sweep_file(place), overrides, storage), open_progress(quiet=False)
    )
    print_sweep(sweep)
    say(f"report: {page}" if page else "no trial of this sweep is finished")


def print_sweep(sweep: Sweep) -> None:
    """Print the ranking, every measure's differences, what they say, and what failed."""
    found = sweep_command.result(sweep)
    if found is not None:
        table = found.ranking
        title = f"{sweep.space.file.name}: settings by validation accuracy, ± standard error over questions"
        print_table(title, table.header, table.rows, table.names)
        # Of the two the one to the centre, where there are other settings.
        heading, measures = found.measures[0]
        print_table(f"{heading} on test questions, by every measure", measures.header, measures.rows, measures.names)
        say(LEGEND)
        if found.held_out is not None:
            print_table("held-out tasks", found.held_out.header, found.held_out.rows, found.held_out.names)
            say(TRANSFER_LEGEND)
        for line in found.notes:
            say(f"note: {line}")
        say(found.headline)
    for line in sweep_command.failures(sweep):
        say(f"failed: {line}", error=True)
