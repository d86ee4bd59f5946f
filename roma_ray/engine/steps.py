"""A stage of the method as data, and the frame that every stage is made in.

A `Step` says what a stage is called, what it is made of, which settings decide it, and which function fills it; it stands
beside that function. Steps name the steps they are made of, so the last one holds the graph: who wants an order, a place or
the work itself walks it from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from roma_ray.engine.devices import device_kind
from roma_ray.engine.progress import Progress
from roma_ray.engine.runners import Runners
from roma_ray.engine.setup import Setup
from roma_ray.engine.work import Job
from roma_ray.store.artifacts import Stage, note_device

Facts = dict[str, Any]
"""Counts and results that a manifest keeps."""


def _nothing(*_: Any) -> Any:
    return ()


def _no_others(setup: Setup, stages: Mapping[str, Stage]) -> Mapping[str, Stage]:
    return {}


@dataclass(frozen=True, eq=False)
class Step:
    """What a stage is, independent of any run."""

    name: str
    version: int
    """Raised by whoever changes what the stage writes."""
    inputs: tuple[Step, ...]
    """Whose stages it is made of; `do` may also read what these are made of."""
    identity: Callable[[Setup], dict[str, Any]]
    """The settings that decide the stage's content, and no others. It reads no more than names, sizes and digests."""
    do: Callable[[Job, Runners, Progress], Facts]
    """Fills the stage's folder; goes on from what an earlier attempt left there."""
    others: Callable[[Setup, Mapping[str, Stage]], Mapping[str, Stage]] = _no_others
    """Further stages it is made of, that only a run's settings or its storage tell, by the name that its identity has for them."""
    accept: Callable[[Job, Runners], object] = _nothing
    """Raises where a complete stage is not to be used after all."""
    device: str | None = None
    """Of a stage that one process makes, wherever the device is: `cpu`, or `model` for the model's. None: the driver directs
    workers, who note their own."""
    reads_states: bool = False
    """Whether it reads the extraction's activations, which may have been removed to free their space."""
    lines: Callable[[Stage], Iterable[str]] = _nothing
    """What every run says of the finished stage."""
    shown: tuple[tuple[str, str | None], ...] = ()
    """Small files worth keeping where runs are tracked, each with a folder there."""

    def at(self, setup: Setup, stages: Mapping[str, Stage]) -> Stage:
        """Where the stage lives, made of these `stages` (by name); changes nothing on disk."""
        made_of = {step.name: stages[step.name] for step in self.inputs} | dict(self.others(setup, stages))
        inputs = {name: stage.fingerprint for name, stage in made_of.items()}
        return setup.store.stage(self.name, self.identity(setup), inputs, self.version)

    def job(self, setup: Setup, stages: Mapping[str, Stage]) -> Job:
        """The work of filling it, with the places of all that it is made of."""
        below = {step.name: stages[step.name] for step in order(self)[:-1]} | dict(self.others(setup, stages))
        return Job(setup, below, stages.get(self.name) or self.at(setup, stages))


def order(step: Step) -> tuple[Step, ...]:
    """The steps up to this one, each after those that it is made of."""
    found: dict[str, Step] = {}
    for each in step.inputs:
        found.update((earlier.name, earlier) for earlier in order(each) if earlier.name not in found)
    return (*found.values(), step)


def locate(step: Step, setup: Setup, known: Mapping[str, Stage] | None = None) -> dict[str, Stage]:
    """Where each stage up to this step lives, whether or not it ran yet, by name in their order.

    `known`: places that are at hand already. Raises QuestionError when a question file is gone.
    """
    stages: dict[str, Stage] = {}
    for each in order(step):
        stages[each.name] = (known or {}).get(each.name) or each.at(setup, stages)
    return stages


def complete(step: Step, job: Job, runners: Runners, progress: Progress, *, verify: bool = True) -> Stage:
    """The job's stage, filled now where it is not complete. Raises what the step raises, ArtifactError, BusyError, StorageError.

    `verify`: compare what is complete with its digests; who has just done so may leave it out.
    """
    stage = job.stage
    if stage.reusable:
        if verify:
            stage.verify()
        step.accept(job, runners)
    elif step.device is None:
        _fill(step, job, runners, progress)
    else:
        runners.call(step.name, _fill, step, job, runners.alone, progress=progress)
    return stage


def _fill(step: Step, job: Job, runners: Runners, progress: Progress) -> None:
    def do() -> Facts:
        if step.device is not None:
            note_device(job.folder, device_kind(job.setup.model.device if step.device == "model" else step.device))
        return step.do(job, runners, progress)

    make(job.stage, do)


def make(stage: Stage, do: Callable[[], Facts | None], *, verify: bool = False, since: float | None = None) -> Stage:
    """The stage, made by `do` where it is not complete: under its lock, timed, the manifest last.

    `do` returns the manifest's facts; None leaves the stage unfinished. `verify`: compare a complete one with its digests.
    `since`: when its work began (`time.monotonic`), where that was before. Raises what `do` raises, ArtifactError, BusyError,
    StorageError.
    """
    if stage.reusable:
        if verify:
            stage.verify()
        return stage
    started = time.monotonic() if since is None else since
    with stage.exclusive():
        # Another process may have finished it since.
        if not stage.complete and (facts := do()) is not None:
            stage.finish(facts=facts, seconds=time.monotonic() - started)
    return stage
