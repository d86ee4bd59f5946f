"""A sweep from end to end: shared stages once, then the trials, then what they say together."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from roma_ray.ablations.plan import Plan, Planned, describe
from roma_ray.ablations.space import Space, Trial
from roma_ray.ablations.trial import TrialWork, closing, here, with_train
from roma_ray.ablations.tuning import Do, Event, make_room, tune_search, tune_trials
from roma_ray.cluster.failures import unpacked
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.cluster.ray_runners import ray_runners
from roma_ray.engine.progress import Progress
from roma_ray.engine.runners import LOCAL, Runners
from roma_ray.engine.setup import save_config
from roma_ray.engine.steps import Step, complete, order
from roma_ray.errors import ArtifactError, RomaError
from roma_ray.stages.extraction import EXTRACT, bring_back
from roma_ray.stages.neighborhoods import NEIGHBORS
from roma_ray.stages.preparation import QUESTIONS
from roma_ray.store.artifacts import CONFIG, MEMBERS, Stage, write_json, write_text
from roma_ray.store.files import exists
from roma_ray.store.logs import append_line, whole_lines

VERSION = 2
SPACE = "space.yaml"
# What became of trials whose stages do not say it: stopped ones, failed ones, and what optuna drew.
LEDGER = ".trials.jsonl"
WAITING, RUNNING, DONE, STOPPED, FAILED = "waiting", "running", "done", "stopped", "failed"


@dataclass
class State:
    """How a trial stands."""

    planned: Planned
    state: str = WAITING
    epoch: int = 0
    validation_accuracy: float | None = None
    test_difference: float | None = None
    error: str = ""
    began: float | None = None
    seconds: float | None = None
    """Of this call; None for what an earlier one did."""
    values: Mapping[str, Any] | None = None
    """What optuna drew."""

    @property
    def trial(self) -> Trial:
        return self.planned.trial


class SweepObserver:
    """Hears of a sweep as it goes; what it does with that must not raise and changes no result. This one tells nobody."""

    def started(self, sweep: Sweep) -> None:
        """Before any trial, all shared work done."""

    def changed(self, sweep: Sweep, state: State) -> None:
        """A trial started, ended an epoch, or ended."""

    def finished(self, sweep: Sweep) -> None:
        """Nothing runs any more; the report is written."""


@dataclass
class Sweep:
    """A sweep and how its trials stand."""

    plan: Plan
    stage: Stage
    states: dict[str, State] = field(default_factory=dict)

    @property
    def space(self) -> Space:
        return self.plan.space

    def having(self, *states: str) -> list[State]:
        """The trials in one of these states, in the space's order."""
        return [state for state in self.states.values() if state.state in states]

    @property
    def missing_samples(self) -> int:
        """Trials that optuna has still to choose."""
        if self.space.file.search != "optuna":
            return 0
        return self.space.file.samples - sum(state.values is not None for state in self.having(DONE, STOPPED))


def sweep_stage(plan: Plan) -> Stage:
    """Where a sweep's report lives."""
    return plan.store.stage("sweep", {"space": plan.space.identity, "device": plan.device}, {}, VERSION)


def open_sweep(plan: Plan) -> Sweep:
    """A sweep as its artifacts tell. Raises ArtifactError, ConfigError."""
    sweep = Sweep(plan, sweep_stage(plan))
    for planned in plan.trials:
        sweep.states[planned.trial.id] = State(planned)
    for line in _ledger(sweep.stage):
        if line.get("values") is not None and line["trial"] not in sweep.states:
            sweep.states[line["trial"]] = State(drawn(plan, line["values"], line.get("place")), values=line["values"])
        if line["trial"] in sweep.states:
            state = sweep.states[line["trial"]]
            # A failed trial is tried again by the next run of the command; a stopped one is finished with.
            state.state = STOPPED if line["state"] == STOPPED else WAITING
            state.epoch, state.validation_accuracy = line["epoch"], line["validation_accuracy"]
            state.error = line["error"]
    for state in sweep.states.values():
        if state.planned.complete:
            tuned, judged = (state.planned.stages[name] for name in ("finetune", "evaluate"))
            try:
                tuned.verify()
                judged.verify()
            except ArtifactError as error:
                state.state, state.error = FAILED, str(error)
            else:
                _close(state, closing(tuned, judged))
    return sweep


def other_versions(sweep: Sweep) -> list[str]:
    """A sentence for each kind of finished trial that other library versions made, with how many there are."""
    stages = [state.planned.stages[name] for state in sweep.having(DONE) for name in ("finetune", "evaluate")]
    counts = Counter(other for stage in stages if (other := stage.other_versions()) is not None)
    return [f"{count} finished trial(s): {other}" for other, count in counts.items()]


def drawn(plan: Plan, values: Mapping[str, Any], place: Sequence[Sequence[Any]] | None = None) -> Planned:
    """The trial of values that optuna drew, on the extraction (its cuts and rules) where it began. Raises ConfigError."""
    trial = plan.space.sampled(values)
    setup = plan.beside(trial.config)
    if place is not None:
        began = Planned.on(trial, setup.shared(*place))
        if began.complete or began.stages["extract"].complete:
            return began
    return Planned.on(trial, setup)


def run_sweep(
    plan: Plan,
    cluster: Cluster,
    progress: Progress,
    observers: Sequence[SweepObserver] = (),
    *,
    stop_on_failure: bool = False,
    do: Do | None = None,
) -> Sweep:
    """Do what is missing of a sweep. Failed trials are in its states. Raises RomaError for what is no trial's own fault.

    `do` does a trial in place of `here` or `with_train`.
    """
    for line in describe(plan):
        progress.say(line)
    sweep = open_sweep(plan)
    plan.store.begin(plan.space.identity)
    for line in other_versions(sweep):
        progress.say(f"note: {line}")
    with sweep.stage.exclusive():
        write_text(sweep.stage.path / SPACE, _resolved(plan.space))
        _keep_members(sweep)
        for state in sweep.having(DONE):
            keep_config(state)
        if sweep.having(WAITING, FAILED) or sweep.missing_samples > 0:
            prepare_shared(sweep, ray_runners(cluster, plan.device), progress)
            for observer in observers:
                observer.started(sweep)
            _run_trials(sweep, cluster, _listener(sweep, observers), do, stop_on_failure)
        else:
            for observer in observers:
                observer.started(sweep)
        _keep_members(sweep)
    return sweep


def _keep_members(sweep: Sweep) -> None:
    """Note which evaluations are this sweep's, for who asks what lies in the storage."""
    members = sorted({state.planned.stages["evaluate"].fingerprint for state in sweep.states.values()})
    write_json(sweep.stage.path / MEMBERS, {"stages": members})


def prepare_shared(sweep: Sweep, runners: Runners = LOCAL, progress: Progress | None = None) -> None:
    """Do every stage that trials share, once, and compare those that are there with their digests.

    A stage that fails, or is damaged, takes the trials down that need it, and no others.
    """
    from roma_ray.engine.progress import Silence

    progress = progress or Silence()
    wanted = [state for state in sweep.states.values() if state.state == WAITING]
    # What optuna may draw: it reads these stages too, and no trial of it may be there yet.
    trial = sweep.plan.trials[0].trial
    later = sweep.plan.later if sweep.missing_samples > 0 else ()
    ahead = [State(Planned.on(trial, setup)) for setup in later]
    for step in order(NEIGHBORS):
        done: set[str] = set()
        needing = [*wanted, *ahead] if step is not NEIGHBORS else wanted
        for state in [state for state in needing if state.state == WAITING]:
            planned = state.planned
            stage = planned.stages[step.name]
            if stage.fingerprint in done:
                continue
            done.add(stage.fingerprint)
            try:
                if step is EXTRACT:
                    bring_back(stage)
                fresh = not stage.complete
                # The trials themselves do not look again at what is complete.
                complete(step, step.job(planned.setup, planned.stages), runners, progress)
            except RomaError as error:
                for other in [*wanted, *ahead]:
                    if other.planned.stages[step.name].fingerprint == stage.fingerprint:
                        other.state, other.error = FAILED, f"{step.name}: {error}"
                progress.say(f"{step.name}: {error}")
            else:
                _say_shared(step, state, fresh, progress)


def _say_shared(step: Step, state: State, fresh: bool, progress: Progress) -> None:
    stage = state.planned.stages[step.name]
    if fresh:
        progress.say(f"{step.name}: done ({stage.manifest()['seconds']:.1f} s)  {stage.path}")
    if (other := stage.other_versions()) is not None:
        progress.say(f"note: {other}")
    if step is QUESTIONS and any(s.path is None for s in state.planned.setup.config.questions.sources):
        # Of files the plan has told them.
        for line in step.lines(stage):
            progress.say(line)
    if fresh and step is NEIGHBORS:
        for line in step.lines(stage):
            progress.say(f"{state.trial.name}: {line}")


def _run_trials(
    sweep: Sweep, cluster: Cluster, hear: Callable[[Event], None], do: Do | None, stop_on_failure: bool
) -> None:
    file, plan = sweep.space.file, sweep.plan
    waiting = sweep.having(WAITING)
    if (stop_on_failure and sweep.having(FAILED)) or not (waiting or sweep.missing_samples > 0):
        return
    cluster.connect()
    work: Do = do or (here if (cluster.config.ray.finetune_workers or 1) == 1 else with_train)
    room = make_room(cluster, plan.device, max(len(waiting), sweep.missing_samples), file.max_concurrent)
    cluster.say(f"tune: {room.trials} trial(s) at a time, {plan.device}")
    common: dict[str, Any] = {
        "room": room,
        "folder": sweep.stage.path,
        "scheduler": file.scheduler,
        "epochs": max(state.planned.epochs for state in sweep.states.values()),
        "stop_on_failure": stop_on_failure,
    }
    # Trials of one cut after one another: an actor keeps one head.
    ordered = sorted(waiting, key=lambda state: state.planned.setup.cut)
    works = {s.trial.id: TrialWork(s.trial.id, s.planned.setup, s.planned.stages) for s in ordered}
    tune_trials(cluster, works, work, hear, **common)
    if stop_on_failure and sweep.having(FAILED):
        return
    known = [
        (state.values, state.validation_accuracy or 0.0)
        for state in sweep.having(DONE, STOPPED)
        if state.values is not None
    ]
    tune_search(
        cluster,
        partial(_work_of, plan),
        work,
        hear,
        ranges=file.sample,
        known=known,
        samples=sweep.missing_samples,
        # Drawing goes on where the last run of the command ended, and does not repeat itself.
        seed=sweep.space.centre.seed + len(known),
        **common,
    )


def _work_of(plan: Plan, values: Mapping[str, Any]) -> TrialWork:
    planned = drawn(plan, values)
    return TrialWork(planned.trial.id, planned.setup, planned.stages)


def _listener(sweep: Sweep, observers: Sequence[SweepObserver]) -> Callable[[Event], None]:
    """What keeps the states, the ledger and the observers in step with the trials."""

    def hear(event: Event) -> None:
        if "trial" in event.config:
            state = sweep.states[event.config["trial"]]
        else:
            planned = drawn(sweep.plan, event.config)
            state = sweep.states.setdefault(planned.trial.id, State(planned, values=dict(event.config)))
        _advance(state, event)
        if state.state == DONE:
            keep_config(state)
        if state.state in (STOPPED, FAILED) or (state.values is not None and event.kind == "started"):
            _note(sweep.stage, state)
        for observer in observers:
            observer.changed(sweep, state)

    return hear


def _advance(state: State, event: Event) -> None:
    """Bring a trial's state up to date with what happened."""
    if event.kind in ("started", "restarted"):
        state.state, state.error = RUNNING, ""
        state.began = state.began or time.monotonic()
        return
    if event.kind == "failed":
        folder = state.planned.stages["finetune"].path
        state.state, state.error = FAILED, str(unpacked([_text(event.record)], state.trial.name, folder))
    elif event.kind == "done":
        _close(state, event.record)
    else:
        state.epoch = int(event.record.get("epoch", state.epoch))
        state.validation_accuracy = event.record.get("validation_accuracy", state.validation_accuracy)
        state.state = STOPPED if event.kind == "stopped" else RUNNING
    if state.began is not None and state.state != RUNNING:
        state.seconds = time.monotonic() - state.began


def keep_config(state: State) -> None:
    """A finished trial's configuration beside its evaluation, as a run keeps its own; one that is there stays."""
    evaluation = state.planned.stages["evaluate"]
    if not exists(evaluation.path / CONFIG) and evaluation.complete:
        config = state.planned.setup.config
        save_config(evaluation, config.model_copy(update={"name": f"{config.name}: {state.trial.name}"}))


def _text(record: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(record.get(key, "")) for key in ("kind", "text", "traceback")}


def _close(state: State, record: Mapping[str, Any]) -> None:
    state.state, state.error = DONE, ""
    state.epoch = int(record.get("epoch", 0))
    state.validation_accuracy = record.get("validation_accuracy")
    state.test_difference = record.get("test_difference")


def _ledger(stage: Stage) -> Iterable[dict[str, Any]]:
    for line in whole_lines(stage.path / LEDGER)[0]:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue  # half a line of a killed driver


def _note(stage: Stage, state: State) -> None:
    """Add a line to the ledger. Raises StorageError."""
    line = {
        "trial": state.trial.id,
        "state": state.state,
        "epoch": state.epoch,
        "validation_accuracy": state.validation_accuracy,
        "error": state.error,
        "values": state.values,
        "place": [state.planned.setup.cuts, state.planned.setup.token_rules],
    }
    append_line(stage.path / LEDGER, json.dumps(line))


def _resolved(space: Space) -> str:
    """The sweep for a reader of its folder: the file's settings, the centre, and every trial."""
    import yaml

    content = {
        **space.file.model_dump(mode="json", exclude_defaults=True),
        "base": space.centre.model_dump(mode="json"),
        "set": {},
    }
    trials = "".join(f"#   {trial.id}  {trial.name}\n" for trial in space.trials)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True) + f"# Trials:\n{trials}"
