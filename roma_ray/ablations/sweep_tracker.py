"""A sweep in the tracker: a parent run, and a child run a trial, whose parameters differ only where the trials do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from roma_ray.ablations.plan import Plan
from roma_ray.ablations.sweep import FAILED, STOPPED, State, Sweep, SweepObserver
from roma_ray.ablations.sweep_report import PAGE
from roma_ray.ablations.sweep_results import read_findings
from roma_ray.engine.progress import Progress
from roma_ray.stages.finetuning import ADAPTER, EPOCHS, STEPS
from roma_ray.stages.paired_evaluation import SUMMARY
from roma_ray.store.artifacts import Stage
from roma_ray.store.files import exists
from roma_ray.tracking import run_records
from roma_ray.tracking.backend import MetricValue, RunState
from roma_ray.tracking.delivery import Delivery

SWEEP = "sweep"
# What a trial's state is called in MLflow.
_STATUS = {"running": "RUNNING", "done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class SweepTracker(Delivery, SweepObserver):
    """Follows one sweep. Its methods never raise for MLflow's sake."""

    parent, identity_tag, name_tag = SWEEP, "roma.sweep", "roma.trial"

    def __init__(self, plan: Plan, progress: Progress) -> None:
        super().__init__(plan.trials[0].setup.config, plan.store, progress)
        self.name, self._identity = plan.space.file.name, plan.space.identity
        self.trials: dict[str, State] = {}
        self.sweep: Sweep | None = None

    def started(self, sweep: Sweep) -> None:
        """Before any trial of this run of the command."""
        self._working = True
        self.trials, self.status[SWEEP] = sweep.states, "RUNNING"
        for id, state in sweep.states.items():
            if state.state in _STATUS:
                self.status[id] = _STATUS[state.state]
        self._deliver(SWEEP, *(id for id, state in sweep.states.items() if state.state in ("done", "stopped")))

    def changed(self, sweep: Sweep, state: State) -> None:
        """A trial started, ended an epoch, or ended."""
        if state.state in _STATUS:
            self.status[state.trial.id] = _STATUS[state.state]
            self._deliver(state.trial.id)

    def finished(self, sweep: Sweep) -> None:
        """Nothing runs any more."""
        self._working, self.sweep = False, sweep
        failed = sweep.having(FAILED)
        names = ", ".join(state.trial.name for state in failed)
        self.failure = f"{len(failed)} trial(s) failed: {names}"[:500] if failed else ""
        self.status[SWEEP] = "FAILED" if failed else "FINISHED"
        self._waiting[SWEEP] = None

    def _title(self, name: str) -> str:
        return self.name if name == SWEEP else self.trials[name].trial.name

    def _start(self, name: str) -> int:
        if name == SWEEP:
            return self._begun() or run_records.now()
        tuned, evaluation = _stages(self.trials[name])
        return run_records.start_time(tuned if self._reused(evaluation) or not self._reused(tuned) else evaluation)

    def _end(self, name: str, run: RunState) -> int:
        evaluation = _stages(self.trials[name])[1] if name in self.trials else None
        if evaluation is None or not evaluation.complete:
            return run_records.now()
        return max(run_records.finish_time(evaluation), run.start + run_records.duration(evaluation))

    def _receipt(self, name: str) -> str:
        evaluation = _stages(self.trials[name])[1] if name in self.trials else None
        return str(evaluation.manifest()["finished"]) if evaluation is not None and evaluation.complete else ""

    def _error(self, name: str) -> str:
        return self.failure if name == SWEEP else self.trials[name].error[:500]

    def _write(self, name: str, run: RunState) -> None:
        if name == SWEEP:
            self._write_sweep(run)
        else:
            self._write_trial(run, self.trials[name])

    def _write_sweep(self, run: RunState) -> None:
        configs = [state.planned.setup.config for state in self.trials.values()]
        everywhere = [set(run_records.parameters(config).items()) for config in configs]
        # What all trials have in common is the sweep's; what differs is theirs alone.
        self._log_params(run, dict(sorted(set.intersection(*everywhere))) if everywhere else {})
        tags = {"roma.model": self.config.model.path, "roma.storage": str(self.store.root)}
        self._log_tags(run, tags | run_records.git_tags())
        if self.sweep is None:
            return
        at, folder = run_records.now(), self.sweep.stage.path
        self._log_metrics(run, [MetricValue(key, value, 0, at) for key, value in _facts(self.sweep).items()])
        if exists(folder / PAGE) and self.status.get(SWEEP) != "RUNNING":
            for part in ("report.html", "report.md"):
                self._upload(run, folder / part)
            for part in ("figures", "tables"):
                # Not every space has something to draw.
                if exists(folder / part):
                    self._upload(run, folder / part, part)

    def _write_trial(self, run: RunState, state: State) -> None:
        trial, (tuned, evaluation) = state.trial, _stages(state)
        self._mark_reused(run, evaluation)
        self._log_params(run, run_records.parameters(state.planned.setup.config))
        tags = {f"factor.{factor}": level for factor, level in trial.factors} | {
            "roma.factor": ", ".join(factor for factor, _ in trial.factors) if not trial.centre else "centre",
            "roma.level": ", ".join(level for _, level in trial.factors) if not trial.centre else "centre",
            "roma.centre": "yes" if trial.centre else "no",
            **{f"roma.stage.{name}": stage.fingerprint for name, stage in state.planned.stages.items()},
        }
        values: list[Any] = run_records.stage_metrics(tuned)
        if evaluation.complete:
            tags["roma.evaluation_pin"] = evaluation.manifest()["facts"]["pin"]
            values += run_records.stage_metrics(evaluation)
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


def _once(values: Sequence[MetricValue]) -> list[MetricValue]:
    """One value a key and step: both stages have their `seconds`, of which the finetuning's stands for the trial."""
    found: dict[tuple[str, int], MetricValue] = {}
    for value in values:
        found.setdefault((value.key, value.step), value)
    return list(found.values())


def _stages(state: State) -> tuple[Stage, Stage]:
    """A trial's own: finetuning and evaluation."""
    return state.planned.stages["finetune"], state.planned.stages["evaluate"]


def _facts(sweep: Sweep) -> Mapping[str, float]:
    """The sweep's own figures. Those of an unfinished one would change, and MLflow keeps what it has."""
    if not sweep.stage.complete:
        return {}
    findings = read_findings(sweep)
    facts = {"trials": float(len(sweep.states)), "trials_stopped": float(len(sweep.having(STOPPED)))}
    if findings is not None:
        best = findings.results[0]
        validation = findings.first.base_validation
        facts |= {"best/validation_accuracy": best.validation.mean, "best/test_accuracy": best.accuracy.mean}
        facts |= {"base/test_accuracy": findings.base.mean, "base/validation_accuracy": validation.mean}
        if findings.centre is not None:
            facts["centre/test_accuracy"] = findings.centre.accuracy.mean
            gain = findings.centre.gain.plain()
            facts |= {f"centre/gain/{key}": value for key, value in gain.items() if value is not None}
    return facts
