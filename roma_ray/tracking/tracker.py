"""Follows a pipeline and keeps MLflow in step with its artifacts.

One rule serves live metrics, outages, resumes and repeated runs alike: what MLflow lacks of what the artifacts hold is
written, and nothing is written twice. So an unreachable server only leaves work to do at the next chance: the next stage, the
end of the run, the next run, or `roma-ray track`.
"""

from __future__ import annotations

from collections.abc import Mapping

from roma_ray.engine.observers import RunObserver
from roma_ray.engine.progress import Progress
from roma_ray.engine.setup import Setup
from roma_ray.stages.finetuning import ADAPTER
from roma_ray.store.artifacts import Stage, fingerprint, run_identity
from roma_ray.store.files import remove_folder, roomy
from roma_ray.tracking import run_records
from roma_ray.tracking.backend import NAME, NOTE, OwnFault, RunState
from roma_ray.tracking.delivery import FINGERPRINT, Delivery

PIPELINE = "pipeline"
_MODEL, _REGISTERED = "roma.logged_model", "roma.registered"


class Tracker(Delivery, RunObserver):
    """An observer of one pipeline run. Its methods never raise for MLflow's sake."""

    parent, identity_tag, name_tag = PIPELINE, "roma.run", "roma.stage"
    later = "the next run of the same command, or by `roma-ray track` with the same configuration"

    def __init__(self, setup: Setup, progress: Progress) -> None:
        super().__init__(setup.config, setup.store, progress)
        self.setup = setup
        self.planned: dict[str, Stage] = {}

    def started(self, planned: Mapping[str, Stage]) -> None:
        """Before any work."""
        self.planned = dict(planned)
        self._identity = run_identity(planned)
        self._deliver(PIPELINE)

    def stage_started(self, stage: Stage) -> None:
        """A stage begins or goes on."""
        self._working = True
        self.planned[stage.name] = stage
        self.status |= {PIPELINE: "RUNNING", stage.name: "RUNNING"}
        self._deliver(PIPELINE, stage.name)

    def epoch(self, stage: Stage) -> None:
        """Another epoch's record is on disk."""
        self._deliver(stage.name)

    def stage_finished(self, stage: Stage) -> None:
        """A stage is complete."""
        # Where the report lies is known once all that it shows is finished.
        self.planned[stage.name] = stage
        self.status[stage.name] = "FINISHED"
        self._deliver(stage.name)

    def finished(self) -> None:
        """All that was asked for is complete."""
        self.status[PIPELINE] = "FINISHED"
        self._waiting[PIPELINE] = None

    def _title(self, name: str) -> str:
        return self.config.name if name == PIPELINE else name

    def _tags(self, name: str) -> Mapping[str, str]:
        return {FINGERPRINT: self._identity if name == PIPELINE else self.planned[name].fingerprint}

    def _start(self, name: str) -> int:
        if name != PIPELINE:
            return run_records.start_time(self.planned[name])
        # Of a run from before starts were noted, the stages alone tell.
        earliest = min((run_records.start_time(stage) for stage in self.planned.values()), default=run_records.now())
        return self._begun() or earliest

    def _end(self, name: str, run: RunState) -> int:
        """When a run ended: with its stage, where that is complete, also if MLflow hears of it later."""
        stages = list(self.planned.values()) if name == PIPELINE else [self.planned[name]]
        done = [stage for stage in stages if stage.complete and not (name == PIPELINE and self._reused(stage))]
        if (self._working and name == PIPELINE) or not done:
            return run_records.now()
        latest, longest = max(map(run_records.finish_time, done)), max(map(run_records.duration, done))
        # Manifests note whole seconds; a short stage must not end before it began.
        return max(latest, run.start + longest)

    def _receipt(self, name: str) -> str:
        if name == PIPELINE:
            if self.status.get(PIPELINE) != "FINISHED":
                return ""
            done = [stage for stage in self.planned.values() if stage.complete]
            told = {stage.name: [stage.fingerprint, stage.manifest()["finished"]] for stage in done}
            return fingerprint({**told, "register": self.config.tracking.register_model})
        stage = self.planned[name]
        return str(stage.manifest()["finished"]) if stage.complete else ""

    def _write(self, name: str, run: RunState) -> None:
        if name == PIPELINE:
            self._write_pipeline(run)
        else:
            self._write_stage(run, self.planned[name])

    def _write_pipeline(self, run: RunState) -> None:
        client, config = self.client, self.config
        evaluation, report = self.planned["evaluate"], self.planned["report"]
        if run.tags.get(NAME) != config.name:
            client.rename(run, config.name)
        self._log_params(run, run_records.parameters(config))
        tags = run_records.tags(self.setup, self.planned)
        if report.complete and evaluation.complete:
            tags[NOTE] = run_records.note(report, evaluation)
        reused = [name for name, stage in self.planned.items() if self._reused(stage)]
        if reused:
            tags["roma.reused_stages"] = ", ".join(reused)
        self._log_tags(run, tags)
        client.add_inputs(run, run_records.inputs(self.setup, self.planned, PIPELINE))
        if evaluation.complete:
            self._log_metrics(run, run_records.headline(evaluation))
        if report.complete:
            self._log_metrics(run, run_records.added(report))
        if report.complete and self.status.get(PIPELINE) == "FINISHED":
            for part in ("report.html", "report.md", "model_card.md"):
                self._upload(run, report.path / part)
            for part in ("figures", "tables"):
                self._upload(run, report.path / part, part)
        if self.planned["finetune"].complete and self.status.get(PIPELINE) == "FINISHED":
            self._log_adapter(run, self.planned["finetune"])

    def _log_adapter(self, run: RunState, tuned: Stage) -> None:
        """Make the adapter a model of the run, once, and a version of the registered one that is asked for."""
        client, wanted = self.client, self.config.tracking.register_model
        if _MODEL not in run.tags:
            params = {"base_model": self.config.model.path, "finetune": tuned.fingerprint}
            try:
                model = client.log_model(run, self.config.name, tuned.path / ADAPTER, params)
            except OwnFault as error:
                self._absent.append(str(error))
                return
            client.log(run, tags={_MODEL: model})
        if wanted is not None and run.tags.get(_REGISTERED, "").rpartition(" ")[0] != wanted:
            version = client.register(run, run.tags[_MODEL], wanted)
            client.log(run, tags={_REGISTERED: f"{wanted} {version}"})

    def _write_stage(self, run: RunState, stage: Stage) -> None:
        self._mark_reused(run, stage)
        self._log_params(run, run_records.stage_parameters(stage))
        self._log_metrics(run, run_records.stage_metrics(stage))
        found = run_records.inputs(self.setup, self.planned, stage.name)
        if found:
            self.client.add_inputs(run, found)
        if stage.complete:
            for path, folder in run_records.files(stage):
                self._upload(run, path, folder)
            if stage.name == "finetune" and self.config.tracking.log_model:
                self._upload_merged(run, stage)

    def _upload_merged(self, run: RunState, stage: Stage) -> None:
        from roma_ray.moe.exporting import export_routers

        merged = roomy(self.store.root) / ".merged" / stage.fingerprint
        try:
            remove_folder(merged)
            export_routers(stage.path / ADAPTER, merged, form="merged", base=self.setup.model.path)
            self._upload(run, merged, "model")
        finally:
            remove_folder(merged)
