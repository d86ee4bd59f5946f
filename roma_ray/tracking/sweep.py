"""A sweep in MLflow: a parent run, and a child run a trial, whose parameters differ only where the trials do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roma_ray.artifacts import Stage
from roma_ray.engine.finetuning import ADAPTER, EPOCHS, STEPS
from roma_ray.engine.progress import Progress
from roma_ray.engine.setup import Setup
from roma_ray.evaluation.paired import SUMMARY
from roma_ray.tracking import records
from roma_ray.tracking.client import RunState, Value
from roma_ray.tracking.delivery import Delivery

SWEEP = "sweep"
# What a trial's state is called in MLflow.
_STATUS = {"running": "RUNNING", "done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


@dataclass(frozen=True)
class TrialRun:
    """What MLflow is told of a trial."""

    id: str
    name: str
    setup: Setup
    stages: Mapping[str, Stage]
    factors: Sequence[tuple[str, str]]
    centre: bool
    state: str
    epoch: int
    error: str


class SweepTracker(Delivery):
    """Follows one sweep. Its methods never raise for MLflow's sake."""

    parent, identity_tag, name_tag = SWEEP, "roma.sweep", "roma.trial"

    def __init__(self, setup: Setup, progress: Progress, name: str, identity: str) -> None:
        """`setup` is the centre's; `identity` makes two sweeps the same."""
        super().__init__(setup.config, setup.store, progress)
        self.name, self._identity = name, identity
        self.trials: dict[str, TrialRun] = {}
        self.report: Path | None = None
        self._facts: dict[str, float] = {}

    def started(self, trials: Sequence[TrialRun]) -> None:
        """Before any trial of this run of the command."""
        self._working = True
        self.status[SWEEP] = "RUNNING"
        self.trials = {trial.id: trial for trial in trials}
        for trial in trials:
            if trial.state in _STATUS:
                self.status[trial.id] = _STATUS[trial.state]
        self._deliver(SWEEP, *(trial.id for trial in trials if trial.state in ("done", "stopped")))

    def changed(self, trial: TrialRun) -> None:
        """A trial started, ended an epoch, or ended."""
        self.trials[trial.id] = trial
        if trial.state in _STATUS:
            self.status[trial.id] = _STATUS[trial.state]
            self._deliver(trial.id)

    def finished(self, report: Path | None, facts: Mapping[str, float], failure: str) -> None:
        """Nothing runs any more; `facts` are the sweep's own figures, `failure` says what went wrong."""
        self._working = False
        self.report, self._facts, self.failure = report, dict(facts), failure
        self.status[SWEEP] = "FAILED" if failure else "FINISHED"
        self._waiting[SWEEP] = None

    def _title(self, name: str) -> str:
        return self.name if name == SWEEP else self.trials[name].name

    def _start(self, name: str) -> int:
        if name == SWEEP:
            return self._begun() or records.now()
        tuned, evaluation = self.trials[name].stages["finetune"], self.trials[name].stages["evaluate"]
        return records.start_time(tuned if self._reused(evaluation) or not self._reused(tuned) else evaluation)

    def _end(self, name: str, run: RunState) -> int:
        evaluation = self.trials[name].stages["evaluate"] if name in self.trials else None
        if evaluation is None or not evaluation.complete:
            return records.now()
        return max(records.finish_time(evaluation), run.start + records.duration(evaluation))

    def _receipt(self, name: str) -> str:
        evaluation = self.trials[name].stages["evaluate"] if name in self.trials else None
        return str(evaluation.manifest()["finished"]) if evaluation is not None and evaluation.complete else ""

    def _error(self, name: str) -> str:
        return self.failure if name == SWEEP else self.trials[name].error[:500]

    def _write(self, name: str, run: RunState) -> None:
        if name == SWEEP:
            self._write_sweep(run)
        else:
            self._write_trial(run, self.trials[name])

    def _write_sweep(self, run: RunState) -> None:
        everywhere = [set(records.parameters(trial.setup.config).items()) for trial in self.trials.values()]
        # What all trials have in common is the sweep's; what differs is theirs alone.
        self._log_params(run, dict(sorted(set.intersection(*everywhere))) if everywhere else {})
        tags = {"roma.model": self.config.model.path, "roma.storage": str(self.store.root)}
        self._log_tags(run, tags | records.git_tags())
        at = records.now()
        self._log_metrics(run, [Value(key, value, 0, at) for key, value in self._facts.items()])
        if self.report is not None and self.status.get(SWEEP) != "RUNNING":
            for part in ("report.html", "report.md"):
                self._upload(run, self.report.parent / part)
            for part in ("figures", "tables"):
                # Not every space has something to draw.
                if (self.report.parent / part).exists():
                    self._upload(run, self.report.parent / part, part)

    def _write_trial(self, run: RunState, trial: TrialRun) -> None:
        tuned, evaluation = trial.stages["finetune"], trial.stages["evaluate"]
        self._mark_reused(run, evaluation)
        self._log_params(run, records.parameters(trial.setup.config))
        tags = {f"factor.{factor}": level for factor, level in trial.factors} | {
            "roma.factor": ", ".join(factor for factor, _ in trial.factors) if not trial.centre else "centre",
            "roma.level": ", ".join(level for _, level in trial.factors) if not trial.centre else "centre",
            "roma.centre": "yes" if trial.centre else "no",
            **{f"roma.stage.{name}": stage.fingerprint for name, stage in trial.stages.items()},
        }
        values: list[Any] = records.stage_metrics(tuned)
        if evaluation.complete:
            tags["roma.evaluation_pin"] = evaluation.manifest()["facts"]["pin"]
            values += records.stage_metrics(evaluation)
        self._log_tags(run, tags)
        self._log_metrics(run, _once(values))
        if evaluation.complete:
            for path, folder in (
                (tuned.path / ADAPTER, "adapter"),
                (tuned.path / EPOCHS, None),
                (tuned.path / STEPS, None),
                (evaluation.path / SUMMARY, None),
            ):
                self._upload(run, path, folder)


def _once(values: Sequence[Value]) -> list[Value]:
    """One value a key and step: both stages have their `seconds`, of which the finetuning's stands for the trial."""
    found: dict[tuple[str, int], Value] = {}
    for value in values:
        found.setdefault((value.key, value.step), value)
    return list(found.values())
