"""One stage by itself, and the jobs of finished runs, for tests that look at a part of the pipeline."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from roma_ray.engine.progress import Progress, Silence
from roma_ray.engine.runners import LOCAL, Runners
from roma_ray.engine.setup import Setup
from roma_ray.engine.steps import Step, complete, locate
from roma_ray.runs.pipeline import Run
from roma_ray.stages.finetuning import TrainJob
from roma_ray.store.artifacts import Stage


def made(step: Step, setup: Setup, runners: Runners = LOCAL, progress: Progress | None = None) -> Stage:
    """The stage of this step, whose inputs are there."""
    return complete(step, step.job(setup, locate(step, setup)), runners, progress or Silence())


def with_settings(setup: Setup, section: str, **changes: Any) -> Setup:
    """The set-up with other settings of one section, and all else as resolved."""
    settings = getattr(setup.config, section).model_copy(update=changes)
    return dataclasses.replace(setup, config=setup.config.model_copy(update={section: settings}))


def train_job(run: Run, folder: Path | None = None, **changes: Any) -> TrainJob:
    """The finetuning of a run, in its own or an empty folder, with other settings."""
    stage = run.stages["finetune"]
    if folder is not None:
        (folder / stage.fingerprint).mkdir(parents=True)
        stage = Stage(folder / stage.fingerprint, stage.name, {})
    return TrainJob(with_settings(run.setup, "finetune", **changes), run.stages, stage)
