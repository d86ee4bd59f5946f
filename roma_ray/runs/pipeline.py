"""A run walks the graph of steps, and nothing else. What runs where is the caller's choice."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from roma_ray.baselines.method_runs import method_stage
from roma_ray.engine import steps
from roma_ray.engine.devices import mixed_devices
from roma_ray.engine.observers import NOBODY, RunObserver
from roma_ray.engine.progress import Progress
from roma_ray.engine.runners import LOCAL, Runners
from roma_ray.engine.setup import Setup, save_config
from roma_ray.engine.steps import Step, complete, order
from roma_ray.engine.work import said_of
from roma_ray.errors import ArtifactError, IdenticalError, TrainingError
from roma_ray.figures.run_report import ORACLE, REPORT
from roma_ray.moe.reach import is_unreached
from roma_ray.stages.extraction import bring_back
from roma_ray.stages.finetuning import FINETUNE
from roma_ray.stages.paired_evaluation import EVALUATE
from roma_ray.stages.run_summary import summarise_run
from roma_ray.stages.task_loss_alone import ALONE, without_regularizer
from roma_ray.store.artifacts import CONFIG, Stage, run_identity
from roma_ray.store.files import exists


@dataclass(frozen=True)
class Run:
    """A finished run."""

    setup: Setup
    stages: Mapping[str, Stage]
    summary: dict[str, Any]


def oracle_answers(setup: Setup, stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """The oracle's answers, its control's and the base model's, where `roma-ray baselines` gave them; else none of them."""
    found = {name: method_stage(setup, stages, name, setup.config.seed) for name in ORACLE}
    return found if all(stage.complete for stage in found.values()) else {}


def task_loss_alone(setup: Setup, stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """The evaluation of the same run without regularizer, where one is asked for and finished; else nothing."""
    other = without_regularizer(setup)
    if other is None:
        return {}
    known = {step.name: stages[step.name] for step in order(FINETUNE)[:-1]}
    stage = steps.locate(EVALUATE, other, known)[EVALUATE.name]
    return {ALONE: stage} if stage.complete else {}


def beside(setup: Setup, stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """What else a report shows: the oracle's answers, and the task loss alone."""
    return {**oracle_answers(setup, stages), **task_loss_alone(setup, stages)}


BATCHED = ("extract", "embed")
"""Stages whose workers may as well start while the questions are read."""
LAST = replace(REPORT, others=beside)
STEPS = {step.name: step for step in order(LAST)}
"""The steps of a run by name, in their order."""


def locate(setup: Setup) -> dict[str, Stage]:
    """Where each stage of this run lives, whether or not it ran yet. Raises QuestionError when a question file is gone."""
    return steps.locate(LAST, setup)


def run(
    setup: Setup,
    progress: Progress,
    runners: Runners = LOCAL,
    until: str = "evaluate",
    observer: RunObserver = NOBODY,
    *,
    states: bool = False,
    alone: bool = True,
) -> Run:
    """Run the stages up to `until`, skipping those that are complete. Raises what the stages raise (RomaError).

    `states`: whoever follows reads the activations, as training and evaluation do. `alone`: train by the task loss alone beside it,
    where that is asked for.
    """
    started = time.monotonic()
    planned, wanted = locate(setup), order(STEPS[until])
    if states or any(step.reads_states and not planned[step.name].complete for step in wanted):
        bring_back(planned["extract"])
    # A comparison of methods goes up to the neighborhoods, unobserved: that is no start of this run.
    if observer is not NOBODY or FINETUNE in wanted:
        setup.store.begin(run_identity(planned))
    observer.started(planned)
    runners = replace(runners, on_epoch=observer.epoch)
    if expected := [step.name for step in wanted if step.name in BATCHED and not planned[step.name].complete]:
        runners.expect(expected[0])
    stages: dict[str, Stage] = {}
    for step in wanted:
        stage = planned[step.name]
        skipped = stage.complete
        if not skipped:
            observer.stage_started(stage)
        complete(step, step.job(setup, planned), runners, progress)
        stages[step.name] = stage
        for line in told(step, stage, "already complete" if skipped else "done"):
            progress.say(line)
        observer.stage_finished(stage)
        if step is EVALUATE and (other := without_regularizer(setup)) is not None:
            if is_unreached(stages[FINETUNE.name].manifest()["facts"]["probe"]):
                progress.say("by the task loss alone nothing can be trained: it does not reach these routers")
            elif alone:
                _run_alone(other, progress, runners)
            stages |= task_loss_alone(setup, planned)
            planned[LAST.name] = LAST.at(setup, planned)
    save_config(stages[until], setup.config)
    summary = summarise_run(setup, stages, time.monotonic() - started) if "evaluate" in stages else {}
    observer.finished()
    return Run(setup, stages, summary)


def _run_alone(other: Setup, progress: Progress, runners: Runners) -> None:
    """The run without regularizer, where it can be trained so. Raises what the stages raise, but for a training that fails: it is no
    fault of the run that it stands beside.
    """
    progress.say("beside it, the task loss alone:")
    try:
        run(other, progress, replace(runners, on_epoch=NOBODY.epoch))
    except (TrainingError, IdenticalError) as error:
        progress.say(f"nothing was trained by the task loss alone: {error}")


def told(step: Step, stage: Stage, how: str) -> list[str]:
    """What a run says of a finished stage."""
    manifest = stage.manifest()
    notes = (mixed_devices(step.name, manifest["devices"]), stage.other_versions())
    starting = manifest.get("starting")
    return [
        f"{step.name}: {how} ({manifest['seconds']:.1f} s{', ' + said_of(starting) if starting else ''})  {stage.path}",
        *(f"note: {note}" for note in notes if note is not None),
        *step.lines(stage),
    ]


def revisit(setup: Setup, progress: Progress) -> Run:
    """A run whose evaluation is complete, its report written where there is none; nothing is trained. Raises ArtifactError."""
    planned = locate(setup)
    missing = [step.name for step in order(EVALUATE) if not planned[step.name].complete]
    if missing:
        raise ArtifactError(
            f"the run of this configuration is not finished in {setup.store.root} (missing: {', '.join(missing)}). Give the options "
            "that it was started with, or run it: `roma-ray run` (on Ray) or `roma-ray local`."
        )
    if without_regularizer(setup) is not None and not task_loss_alone(setup, planned):
        progress.say(
            "note: no training by the task loss alone stands beside this run: `roma-ray run` or `roma-ray local` trains it, or says why "
            "it cannot"
        )
    return run(setup, progress, until="report", alone=False)


def replay(setup: Setup, observer: RunObserver) -> None:
    """Tell an observer of the stages that are complete, as if they just were; computes nothing. Raises ArtifactError."""
    planned = locate(setup)
    done = {name: stage for name, stage in planned.items() if stage.complete}
    if not done:
        raise ArtifactError(f"nothing of this configuration's run is finished in {setup.store.root}; run it first")
    observer.started(planned)
    for stage in done.values():
        observer.stage_finished(stage)
    if "evaluate" in done or _ended(planned, list(done)[-1]):
        observer.finished()


def _ended(planned: Mapping[str, Stage], last: str) -> bool:
    """Whether a run was to go up to this stage and did; one that is at work or was killed beyond it is another matter."""
    names = list(planned)
    later = names[names.index(last) + 1 :]
    return exists(planned[last].path / CONFIG) and not any(exists(planned[name].path) for name in later)
