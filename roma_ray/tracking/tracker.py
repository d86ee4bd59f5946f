"""Follows a pipeline and keeps MLflow in step with its artifacts.

One rule serves live metrics, outages, resumes and repeated runs alike: what MLflow lacks of what the artifacts hold is
written, and nothing is written twice. So an unreachable server only leaves work to do at the next chance: the next stage, the
end of the run, the next run, or `roma-ray track`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from roma_ray.artifacts import Stage, fingerprint
from roma_ray.engine.finetuning import ADAPTER
from roma_ray.engine.progress import Progress
from roma_ray.engine.setup import Setup
from roma_ray.tracking import records
from roma_ray.tracking.client import RunState
from roma_ray.tracking.delivery import Delivery

PIPELINE = "pipeline"
_DELIVERED, _ERROR = "roma.delivered", "roma.error"


class _Finished(Protocol):
    @property
    def summary(self) -> dict[str, Any]: ...


class Tracker(Delivery):
    """An observer of one pipeline run. Its methods never raise for MLflow's sake."""

    parent, identity_tag, name_tag = PIPELINE, "roma.run", "roma.stage"
    later = "the next run of the same command, or by `roma-ray track` with the same configuration"

    def __init__(self, setup: Setup, progress: Progress) -> None:
        super().__init__(setup, progress)
        self.planned: dict[str, Stage] = {}
        self.failure = ""

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
        from roma_ray.moe.exporting import export_routers

        assert self._client is not None
        merged = self.setup.store.root / ".merged" / stage.fingerprint
        try:
            shutil.rmtree(merged, ignore_errors=True)
            export_routers(stage.path / ADAPTER, merged, form="merged", base=self.setup.model.path)
            self._client.upload(run, merged, "model")
        finally:
            shutil.rmtree(merged, ignore_errors=True)


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
