"""`roma-ray tune` behind its options: a dry run, a sweep with all who follow it, a report, a summary."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roma_ray.ablations import sweep_tables
from roma_ray.ablations.plan import Plan, describe, make_plan, without_model
from roma_ray.ablations.space import Space
from roma_ray.ablations.sweep import DONE, FAILED, Sweep, SweepObserver, open_sweep, other_versions, run_sweep
from roma_ray.ablations.sweep_observers import Board, Lines, LiveTable
from roma_ray.ablations.sweep_report import PAGE, write_report
from roma_ray.ablations.sweep_results import read_findings
from roma_ray.ablations.sweep_tracker import SweepTracker
from roma_ray.ablations.sweep_transfer import held_out_table
from roma_ray.ablations.sweep_words import headline, notes
from roma_ray.cluster.ray_runners import Place, open_place
from roma_ray.engine import hub
from roma_ray.engine.progress import Progress
from roma_ray.engine.setup import resolve_path
from roma_ray.errors import ModelError, QuestionError, UnmeasuredError
from roma_ray.figures.report_tables import Table
from roma_ray.store.artifacts import Store
from roma_ray.store.files import local_place


def dry_run(space: Space) -> list[str]:
    """What a sweep would do, as lines; starts nothing and writes nothing. A model out of reach takes only its part away.

    Raises ConfigError.
    """
    try:
        for model in {resolve_path(trial.config.model.path) for trial in space.trials}:
            if not local_place(model).is_dir() and hub.is_hub_id(model):
                hub.check_model(model)
        try:
            return describe(make_plan(space))
        except ModelError as error:
            if space.centre.device != "cuda" and not isinstance(error, UnmeasuredError):
                raise
            # Without a measured GPU, count for a CPU: what trials share is the same.
            return describe(make_plan(space, "cpu"))
    except (ModelError, QuestionError) as error:
        return without_model(space, error)


def run(
    space: Space, progress: Progress, board: Board | None, address: str | None = None, *, stop_on_failure: bool = False
) -> Sweep:
    """Run what is missing of a sweep and write its report. Failed trials are in its states. Raises RomaError."""
    with open_place(space.centre, address, progress) as place:
        return run_at(place, space, progress, board, stop_on_failure=stop_on_failure)


def run_at(
    place: Place, space: Space, progress: Progress, board: Board | None = None, *, stop_on_failure: bool = False
) -> Sweep:
    """As `run`, on a cluster that is open."""
    assert place.cluster is not None, "a sweep's trials run on Ray"
    assert place.measure is not None
    plan = make_plan(space, place.device, place.measure)
    Store(space.centre.storage).check()
    with ExitStack() as open_until_the_end:
        followers: list[SweepObserver] = [LiveTable(board) if board is not None else Lines(progress)]
        if space.centre.tracking.enabled:
            followers.append(open_until_the_end.enter_context(SweepTracker(plan, progress)))
        sweep = run_sweep(plan, place.cluster, progress, followers, stop_on_failure=stop_on_failure)
        if board is not None:
            board.close()  # the report has a bar of its own
        write_report(sweep, progress)
        for follower in followers:
            follower.finished(sweep)
    return sweep


def revisit(space: Space, progress: Progress) -> tuple[Sweep, Path | None]:
    """The report of a sweep as far as it is. Raises ArtifactError, ConfigError, ModelError."""
    candidates = [open_sweep(plan) for plan in _plans(space)]
    sweep = max(candidates, key=lambda found: len(found.having(DONE)))
    return sweep, write_report(sweep, progress)


def _plans(space: Space) -> Sequence[Plan]:
    """The sweep as this machine resolves it and, for `device: auto`, as a machine with the other kind of device would."""
    found = []
    for device in ("cuda", "cpu") if space.centre.device == "auto" else (None,):
        # No run of this storage used a GPU: there is no sweep of one to find.
        with suppress(UnmeasuredError) if device == "cuda" else nullcontext():
            found.append(make_plan(space, device))
    return found


def failures(sweep: Sweep) -> list[str]:
    """Each failed trial with its error."""
    return [f"{state.trial.name}: {state.error}" for state in sweep.having(FAILED)]


@dataclass(frozen=True)
class SweepFindings:
    """The findings of the finished trials."""

    headline: str
    ranking: Table
    measures: Sequence[tuple[str, Table]]
    """Every measure's differences, by what they are differences to."""
    notes: Sequence[str]
    held_out: Table | None
    """What settings that hold tasks out give to them; None where none does."""


def result(sweep: Sweep) -> SweepFindings | None:
    """The sweep in sentences and tables; None where no trial is finished. Raises ArtifactError."""
    findings = read_findings(sweep)
    if findings is None:
        return None
    measures = list(sweep_tables.measure_tables(sweep, findings))
    ranking, told = sweep_tables.ranking(sweep, findings), notes(sweep, findings)
    return SweepFindings(headline(findings), ranking, measures, told, held_out_table(sweep, findings))


def summary(sweep: Sweep) -> dict[str, Any]:
    """The sweep as plain data: `trials` (one record each), `settings` (each over its seeds: `gain` on the base model and difference
    `to_centre`, with errors over questions and seeds), `report`, `complete`, `other_versions` (of reused trials).
    """
    findings = read_findings(sweep)
    return {
        "format": 1,
        "name": sweep.space.file.name,
        "sweep": sweep.space.identity,
        "report": str(sweep.stage.path / PAGE),
        "complete": sweep.stage.complete,
        "other_versions": other_versions(sweep),
        "settings": [
            {
                "name": result.name,
                "centre": result.centre,
                "seeds": list(result.seeds),
                "validation": vars(result.validation),
                "accuracy": vars(result.accuracy),
                "gain": result.gain.plain(),
                "to_centre": result.to_centre.plain() if result.to_centre else None,
            }
            for result in (findings.results if findings else ())
        ],
        "trials": [
            {
                "id": state.trial.id,
                "name": state.trial.name,
                "state": state.state,
                "centre": state.trial.centre,
                "factors": dict(state.trial.factors),
                "settings": dict(state.trial.settings),
                "seed": state.trial.seed,
                "epochs": state.epoch,
                "validation_accuracy": state.validation_accuracy,
                "test_difference": state.test_difference,
                "error": state.error,
                "paths": {name: str(stage.path) for name, stage in state.planned.stages.items()},
            }
            for state in sweep.states.values()
        ],
    }
