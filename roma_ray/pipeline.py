"""The order of the stages, and nothing else. What runs where is the caller's choice."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from roma_ray.artifacts import CONFIG, Stage, run_identity
from roma_ray.baselines.runs import method_stage
from roma_ray.engine.devices import mixed_devices
from roma_ray.engine.embedding import embed
from roma_ray.engine.extraction import bring_back, extract
from roma_ray.engine.finetuning import tune
from roma_ray.engine.neighborhoods import describe, neighbors
from roma_ray.engine.observers import NOBODY, RunObserver
from roma_ray.engine.prepare import prepare, sources_of
from roma_ray.engine.progress import Progress
from roma_ray.engine.runners import LOCAL, Runners
from roma_ray.engine.setup import Setup, save_config
from roma_ray.errors import ArtifactError
from roma_ray.evaluation.paired import evaluate, locate_stages
from roma_ray.evaluation.summary import summarise_run
from roma_ray.figures.report import report, report_stage
from roma_ray.questions.counts import describe_sources

STAGES = ("questions", "extract", "embed", "neighbors", "finetune", "evaluate", "report")


@dataclass(frozen=True)
class Run:
    """A finished run."""

    setup: Setup
    stages: Mapping[str, Stage]
    summary: dict[str, Any]


def locate(setup: Setup) -> dict[str, Stage]:
    """Where each stage of this run lives, whether or not it ran yet. Raises QuestionError when a question file is gone."""
    stages = locate_stages(setup)
    return {**stages, "report": report_stage(setup, stages["evaluate"], oracle_answers(setup, stages))}


def oracle_answers(setup: Setup, stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """The oracle's answers, its control's and the base model's, where `roma-ray baselines` gave them; else none of them."""
    found = {
        name: method_stage(setup, stages, name, setup.config.seed) for name in ("base", "oracle", "oracle_control")
    }
    return found if all(stage.complete for stage in found.values()) else {}


def run(
    setup: Setup,
    progress: Progress,
    runners: Runners = LOCAL,
    until: str = "evaluate",
    observer: RunObserver = NOBODY,
    *,
    states: bool = False,
) -> Run:
    """Run the stages up to `until`, skipping those that are complete. Raises what the stages raise (RomaError).

    `states`: whoever follows reads the activations, as training and evaluation do.
    """
    assert until in STAGES
    started = time.monotonic()
    planned = locate(setup)
    wanted = STAGES[: STAGES.index(until) + 1]
    if states or any(not planned[name].complete for name in ("finetune", "evaluate") if name in wanted):
        bring_back(planned["extract"])
    # A comparison of methods goes up to the neighborhoods, unobserved: that is no start of this run.
    if observer is not NOBODY or STAGES.index(until) >= STAGES.index("finetune"):
        setup.store.begin(run_identity(planned))
    observer.started(planned)
    stages: dict[str, Stage] = {}
    for name in wanted:
        skipped = planned[name].complete
        if skipped:
            planned[name].verify()
        else:
            observer.stage_started(planned[name])
        stages[name] = stage = _stage(name, setup, stages, progress, runners, observer)
        progress.say(
            f"{name}: {'already complete' if skipped else 'done'} ({stage.manifest()['seconds']:.1f} s)  {stage.path}"
        )
        mixed = mixed_devices(name, stage.manifest()["devices"])
        if mixed:
            progress.say(f"note: {mixed}")
        if (other := stage.other_versions()) is not None:
            progress.say(f"note: {other}")
        if name == "questions":
            for line in describe_sources(sources_of(stage)):
                progress.say(line)
        if name == "neighbors":
            progress.say(describe(stage.manifest()["facts"]))
        observer.stage_finished(stage)
    save_config(stages[until], setup.config)
    summary = summarise_run(setup, stages, time.monotonic() - started) if "evaluate" in stages else {}
    observer.finished()
    return Run(setup, stages, summary)


def revisit(setup: Setup, progress: Progress) -> Run:
    """A run whose evaluation is complete, its report written where there is none. Raises ArtifactError."""
    planned = locate(setup)
    missing = [name for name in STAGES[:-1] if not planned[name].complete]
    if missing:
        raise ArtifactError(
            f"the run of this configuration is not finished in {setup.store.root} (missing: {', '.join(missing)}). Give the options "
            "that it was started with, or run it: `roma-ray run` (on Ray) or `roma-ray local`."
        )
    return run(setup, progress, until="report")


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
    later = STAGES[STAGES.index(last) + 1 :]
    return (planned[last].path / CONFIG).exists() and not any(planned[name].path.exists() for name in later)


def _stage(
    name: str, setup: Setup, done: Mapping[str, Stage], progress: Progress, runners: Runners, observer: RunObserver
) -> Stage:
    if name == "questions":
        return prepare(setup, progress)
    questions = done["questions"]
    if name == "extract":
        return extract(setup, questions, runners.extract, progress)
    if name == "embed":
        return embed(setup, questions, runners.embed, progress)
    if name == "neighbors":
        return runners.call(neighbors, setup, questions, done["extract"], done["embed"], progress=progress)
    if name == "finetune":
        return tune(
            setup, questions, done["extract"], done["neighbors"], runners.finetune, progress, on_epoch=observer.epoch
        )
    if name == "evaluate":
        inputs = (done["extract"], done["embed"], done["neighbors"], done["finetune"])
        return runners.call(evaluate, setup, questions, *inputs, progress=progress)
    return report(setup, done, progress, oracle_answers(setup, done))
