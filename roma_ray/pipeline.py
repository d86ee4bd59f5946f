"""The order of the stages, and nothing else. What runs where is the caller's choice."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from roma_ray.artifacts import Stage, write_atomically
from roma_ray.engine.embedding import embed
from roma_ray.engine.extraction import extract
from roma_ray.engine.finetuning import Trainer, train_here, tune
from roma_ray.engine.neighborhoods import describe, neighbors
from roma_ray.engine.prepare import prepare
from roma_ray.engine.progress import Progress
from roma_ray.engine.setup import Setup
from roma_ray.engine.work import Executor, serial
from roma_ray.evaluation.paired import evaluate
from roma_ray.evaluation.summary import summarise_run

STAGES = ("questions", "extract", "embed", "neighbors", "finetune", "evaluate")


@dataclass(frozen=True)
class Runners:
    """Where the heavy stages run: in this process, or on a cluster."""

    extract: Executor = serial
    embed: Executor = serial
    finetune: Trainer = train_here


LOCAL = Runners()


@dataclass(frozen=True)
class Run:
    """A finished run."""

    setup: Setup
    stages: Mapping[str, Stage]
    summary: dict[str, Any]


def run(setup: Setup, progress: Progress, runners: Runners = LOCAL, until: str = "evaluate") -> Run:
    """Run the stages up to `until`, skipping those that are complete. Raises what the stages raise (RomaError)."""
    assert until in STAGES
    started = time.monotonic()
    stages: dict[str, Stage] = {}
    for name in STAGES[: STAGES.index(until) + 1]:
        clock = time.monotonic()
        stages[name] = stage = _stage(name, setup, stages, progress, runners)
        skipped = time.monotonic() - clock < stage.manifest().get("seconds", 0.0) / 2
        progress.say(
            f"{name}: {'already complete' if skipped else 'done'} ({stage.manifest()['seconds']:.1f} s)  {stage.path}"
        )
        if name == "neighbors":
            progress.say(describe(stage.manifest()["facts"]))
    last = stages[until]
    resolved = setup.config.to_yaml()
    write_atomically(last.path / ".config.yaml", lambda aside: aside.write_text(resolved) and None)
    summary = summarise_run(setup, stages, time.monotonic() - started) if until == "evaluate" else {}
    return Run(setup, stages, summary)


def _stage(name: str, setup: Setup, done: Mapping[str, Stage], progress: Progress, runners: Runners) -> Stage:
    if name == "questions":
        return prepare(setup, progress)
    questions = done["questions"]
    if name == "extract":
        return extract(setup, questions, runners.extract, progress)
    if name == "embed":
        return embed(setup, questions, runners.embed, progress)
    if name == "neighbors":
        return neighbors(setup, questions, done["extract"], done["embed"], progress)
    if name == "finetune":
        return tune(setup, questions, done["extract"], done["neighbors"], runners.finetune, progress)
    return evaluate(setup, questions, done["extract"], done["embed"], done["neighbors"], done["finetune"], progress)
