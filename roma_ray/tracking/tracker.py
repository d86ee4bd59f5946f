"""Follows a pipeline and keeps MLflow in step with its artifacts.

One rule serves live metrics, outages, resumes and repeated runs alike: what MLflow lacks of what the artifacts hold is
written, and nothing is written twice. So an unreachable server only leaves work to do at the next chance: the next stage, the
end of the run, the next run, or `roma-ray track`.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from roma_ray.artifacts import Stage, fingerprint
from roma_ray.engine.finetuning import ADAPTER
from roma_ray.engine.progress import Progress
from roma_ray.engine.setup import Setup
from roma_ray.tracking import records
from roma_ray.tracking.client import Client, Refused, RunState, Unavailable, one_at_a_time

PIPELINE = "pipeline"
# While MLflow is down, a try costs up to some 20 s; between stages and epochs it is tried no more often than this.
RETRY_SECONDS = 60.0
_DELIVERED, _ERROR = "roma.delivered", "roma.error"


class _Finished(Protocol):
    @property
    def summary(self) -> dict[str, Any]: ...


class Tracker:
    """An observer of one pipeline run. Its methods never raise for MLflow's sake."""

    def __init__(self, setup: Setup, progress: Progress) -> None:
        self.setup, self.progress = setup, progress
        self.uri = records.tracking_uri(setup)
        self.planned: dict[str, Stage] = {}
        self.status: dict[str, str] = {}
        self.failure = ""
        self._identity = ""
        self._client: Client | None = None
        self._runs: dict[str, RunState] = {}
        self._steps: dict[tuple[str, str], set[int]] = {}
        self._waiting: dict[str, None] = {}
        self._refused: set[str] = set()
        self._down_since: float | None = None
        self._monitor: Any = None
        self._working = False

    def started(self, planned: Mapping[str, Stage]) -> None:
        """Before any work."""
        self.planned = dict(planned)
        self._identity = records.pipeline_identity(planned)
        self._deliver(PIPELINE)

    def stage_started(self, stage: Stage) -> None:
        """A stage begins or goes on."""
        self._working = True
        self.status |= {PIPELINE: "RUNNING", stage.name: "RUNNING"}
        self._deliver(PIPELINE, stage.name)

    def epoch(self, stage: Stage) -> None:
        """Another epoch's record is on disk."""
        self._deliver(stage.name)

    def stage_finished(self, stage: Stage) -> None:
        """A stage is complete."""
        self.status[stage.name] = "FINISHED"
        self._deliver(stage.name)

    def finished(self, run: _Finished) -> None:
        """All that was asked for is complete."""
        self.status[PIPELINE] = "FINISHED"
        self._waiting[PIPELINE] = None

    def failed(self, error: BaseException) -> None:
        """The run ends early; the stages that were at work end with it."""
        state = "FAILED" if isinstance(error, Exception) else "KILLED"
        self.failure = f"{type(error).__name__}: {error}"[:500]
        for name in [n for n, status in self.status.items() if status == "RUNNING"]:
            self.status[name] = state
            self._waiting[name] = None

    def close(self) -> None:
        """Deliver what is left, stop the monitor, and say what could not be delivered."""
        self._stop_monitor()
        self._deliver(patient=True)
        if self._waiting:
            self.progress.say(
                f"MLflow at {records.shown(self.uri)} still lacks: {', '.join(self._waiting)}. Nothing is lost: it is delivered by "
                "the next run of the same command, or by `roma-ray track` with the same configuration, once MLflow is back."
            )
        elif PIPELINE in self._runs:
            self.progress.say(f"MLflow: run {self._runs[PIPELINE].id} at {records.shown(self.uri)}")

    def _deliver(self, *names: str, patient: bool = False) -> None:
        """Bring MLflow up to date on these stages and all that wait; while it is down, only now and then."""
        self._waiting |= dict.fromkeys(names)
        if not self._waiting:
            return
        if self._down_since is not None and not patient and time.monotonic() - self._down_since < RETRY_SECONDS:
            return
        was_down = self._down_since is not None
        try:
            self._connect()
            for name in list(self._waiting):
                try:
                    self._project(name)
                except Refused as error:
                    self._say_refused(name, error)
                else:
                    del self._waiting[name]
            self._watch_machine()
        except Unavailable as error:
            self._stop_monitor()
            self._client, self._runs, self._steps = None, {}, {}
            if not was_down:
                self.progress.say(
                    f"MLflow at {records.shown(self.uri)} cannot be used ({error}). The run goes on; what it records is kept and "
                    "delivered later."
                )
            self._down_since = time.monotonic()
            return
        self._down_since = None
        if was_down:
            self.progress.say("MLflow is back: what was recorded meanwhile is delivered")

    def _say_refused(self, name: str, error: Refused) -> None:
        """MLflow takes other things, but not this: tell it once, go on with the others."""
        if name not in self._refused:
            self.progress.say(f"MLflow at {records.shown(self.uri)} does not take all of `{name}`: {error}")
            self._refused.add(name)

    def _connect(self) -> None:
        if self._client is not None:
            return
        store = self.setup.store.root
        with one_at_a_time(store / ".tracking.lock"):
            self._client = Client(self.uri, self.setup.config.tracking.experiment, store / "mlflow-artifacts")
            for run in self._client.runs("roma.run", self._identity):
                # Of duplicates that two drivers made at once, the oldest is kept up to date.
                self._runs.setdefault(run.tags.get("roma.stage", PIPELINE), run)
            self._run_of(PIPELINE)

    def _run_of(self, name: str) -> RunState:
        """The MLflow run of a stage, or of the pipeline, made where there is none."""
        if name in self._runs:
            return self._runs[name]
        assert self._client is not None
        tags = {"roma.run": self._identity, "roma.stage": name, "mlflow.source.name": "roma-ray"}
        if name == PIPELINE:
            tags["roma.fingerprint"] = self._identity
            begun = min((records.start_time(stage) for stage in self.planned.values()), default=records.now())
            run = self._client.create(self.setup.config.name, tags, begun)
        else:
            tags |= {
                "roma.fingerprint": self.planned[name].fingerprint,
                "mlflow.parentRunId": self._runs[PIPELINE].id,
            }
            run = self._client.create(name, tags, records.start_time(self.planned[name]))
        self._runs[name] = run
        return run

    def _project(self, name: str) -> None:
        """Write what MLflow lacks of a stage or of the pipeline. Raises Unavailable."""
        assert self._client is not None
        run = self._run_of(name)
        receipt = self._receipt(name)
        wanted = self.status.get(name)
        if receipt and run.tags.get(_DELIVERED) == receipt and run.status == wanted:
            return
        if wanted == "RUNNING" and run.status != "RUNNING":
            self._client.set_status(run, "RUNNING")
        if name == PIPELINE:
            self._project_pipeline(run)
        else:
            self._project_stage(run, self.planned[name])
        if wanted is not None and wanted != "RUNNING":
            self._client.log(run, tags={_DELIVERED: receipt} if receipt else {_ERROR: self.failure})
            if receipt and _ERROR in run.tags:
                self._client.remove_tag(run, _ERROR)
            self._client.set_status(run, wanted, self._end(name, run))

    def _end(self, name: str, run: RunState) -> int:
        """When a run ended: with its stage, where that is complete, also if MLflow hears of it later."""
        stages = self.planned.values() if name == PIPELINE else [self.planned[name]]
        done = [stage for stage in stages if stage.complete]
        if (self._working and name == PIPELINE) or not done:
            return records.now()
        latest, longest = max(map(records.finish_time, done)), max(map(records.duration, done))
        # Manifests note whole seconds; a short stage must not end before it began.
        return max(latest, run.start + longest)

    def _receipt(self, name: str) -> str:
        """What, once noted on a run, says that all of it is there; empty for what is not complete."""
        if name == PIPELINE:
            if self.status.get(PIPELINE) != "FINISHED":
                return ""
            done = [stage for stage in self.planned.values() if stage.complete]
            return fingerprint({stage.name: [stage.fingerprint, stage.manifest()["finished"]] for stage in done})
        stage = self.planned[name]
        return str(stage.manifest()["finished"]) if stage.complete else ""

    def _project_pipeline(self, run: RunState) -> None:
        assert self._client is not None
        client, config = self._client, self.setup.config
        evaluation, report = self.planned["evaluate"], self.planned["report"]
        if run.tags.get("mlflow.runName") != config.name:
            client.rename(run, config.name)
        self._log_params(run, records.parameters(config))
        tags = records.tags(self.setup, self.planned)
        if report.complete and evaluation.complete:
            tags["mlflow.note.content"] = records.note(report, evaluation)
        client.log(run, tags={key: value for key, value in tags.items() if run.tags.get(key) != value})
        client.add_inputs(run, records.inputs(self.setup, self.planned, PIPELINE))
        if evaluation.complete:
            self._log_metrics(run, records.headline(evaluation))
        if report.complete and self.status.get(PIPELINE) == "FINISHED":
            for part in ("report.html", "report.md", "model_card.md"):
                client.upload(run, report.path / part)
            for part in ("figures", "tables"):
                client.upload(run, report.path / part, part)

    def _project_stage(self, run: RunState, stage: Stage) -> None:
        assert self._client is not None
        self._log_params(run, records.stage_parameters(stage))
        self._log_metrics(run, records.stage_metrics(stage))
        found = records.inputs(self.setup, self.planned, stage.name)
        if found:
            self._client.add_inputs(run, found)
        if stage.complete:
            for path, folder in records.files(stage):
                self._client.upload(run, path, folder)
            if stage.name == "finetune" and self.setup.config.tracking.log_model:
                self._upload_model(run, stage)

    def _upload_model(self, run: RunState, stage: Stage) -> None:
        from roma_ray.moe.checkpoints import export_adapter

        assert self._client is not None
        merged = self.setup.store.root / ".merged" / stage.fingerprint
        try:
            shutil.rmtree(merged, ignore_errors=True)
            export_adapter(stage.path / ADAPTER, merged, form="merged", base=self.setup.model.path)
            self._client.upload(run, merged, "model")
        finally:
            shutil.rmtree(merged, ignore_errors=True)

    def _log_params(self, run: RunState, wanted: Mapping[str, str]) -> None:
        """Parameters are written once: MLflow refuses another value, and settings outside the identity may differ."""
        assert self._client is not None
        self._client.log(run, params={key: value for key, value in wanted.items() if key not in run.params})

    def _log_metrics(self, run: RunState, wanted: list[Any]) -> None:
        """Write the values at steps that are not there yet."""
        assert self._client is not None
        missing = []
        for value in wanted:
            if value.step == 0:
                there = value.key in run.metrics
            else:
                place = (run.id, value.key)
                if place not in self._steps:
                    self._steps[place] = self._client.steps(run, value.key) if value.key in run.metrics else set()
                there = value.step in self._steps[place]
            if not there:
                missing.append(value)
        self._client.log(run, metrics=missing)
        for value in missing:
            self._steps.setdefault((run.id, value.key), set()).add(value.step)

    def _watch_machine(self) -> None:
        wanted = self._working and self.setup.config.tracking.system_metrics and self.status.get(PIPELINE) == "RUNNING"
        if self._client is not None and wanted and self._monitor is None:
            self._monitor = self._client.monitor(self._runs[PIPELINE])

    def _stop_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None


@contextlib.contextmanager
def tracked(setup: Setup, progress: Progress) -> Iterator[Tracker]:
    """A tracker of one pipeline run, closed at its end, whatever the end is."""
    tracker = Tracker(setup, progress)
    try:
        yield tracker
    except BaseException as error:
        tracker.failed(error)
        raise
    finally:
        tracker.close()
