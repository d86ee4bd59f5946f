"""Keeping MLflow in step with artifacts: what it lacks is written, nothing twice, and an outage stops nothing.

A parent run with its children, found again by tags. What they are, and what is told of each, is a subclass's matter.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from roma_ray.addresses import mask
from roma_ray.engine.progress import Progress
from roma_ray.engine.setup import Setup
from roma_ray.tracking import records
from roma_ray.tracking.client import Client, Refused, RunState, Unavailable, one_at_a_time

# While MLflow is down, a try costs up to some 20 s; between stages and epochs it is tried no more often than this.
RETRY_SECONDS = 60.0


class Delivery:
    """A parent run and its children in MLflow. No method raises for MLflow's sake."""

    parent: str
    """The parent's name among the runs."""
    identity_tag: str
    name_tag: str
    later = "the next run of the same command"
    """What delivers later what could not be delivered now."""

    def __init__(self, setup: Setup, progress: Progress) -> None:
        self.setup, self.progress = setup, progress
        self.uri = records.tracking_uri(setup)
        self.status: dict[str, str] = {}
        self._identity = ""
        self._client: Client | None = None
        self._runs: dict[str, RunState] = {}
        self._steps: dict[tuple[str, str], set[int]] = {}
        self._waiting: dict[str, None] = {}
        self._refused: set[str] = set()
        self._down_since: float | None = None
        self._monitor: Any = None
        self._working = False

    def _run_of(self, name: str) -> RunState:
        """The MLflow run of that name, made where there is none. Raises Unavailable."""
        raise NotImplementedError

    def _project(self, name: str) -> None:
        """Write what MLflow lacks of that run. Raises Unavailable."""
        raise NotImplementedError

    def close(self) -> None:
        """Deliver what is left, stop the monitor, and say what could not be delivered."""
        self._stop_monitor()
        self._deliver(patient=True)
        if self._waiting:
            self.progress.say(
                f"MLflow at {mask(self.uri)} still lacks: {', '.join(self._waiting)}. Nothing is lost: it is delivered by "
                f"{self.later}, once MLflow is back."
            )
        elif self.parent in self._runs:
            self.progress.say(f"MLflow: run {self._runs[self.parent].id} at {mask(self.uri)}")

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
                    f"MLflow at {mask(self.uri)} cannot be used ({error}). The run goes on; what it records is kept and "
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
            self.progress.say(f"MLflow at {mask(self.uri)} does not take all of `{name}`: {error}")
            self._refused.add(name)

    def _connect(self) -> None:
        if self._client is not None:
            return
        store = self.setup.store.root
        with one_at_a_time(store / ".tracking.lock"):
            self._client = Client(self.uri, self.setup.config.tracking.experiment, store / "mlflow-artifacts")
            for run in self._client.runs(self.identity_tag, self._identity):
                # Of duplicates that two drivers made at once, the oldest is kept up to date.
                self._runs.setdefault(run.tags.get(self.name_tag, self.parent), run)
            self._run_of(self.parent)

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
        wanted = (
            self._working and self.setup.config.tracking.system_metrics and self.status.get(self.parent) == "RUNNING"
        )
        if self._client is not None and wanted and self._monitor is None:
            self._monitor = self._client.monitor(self._runs[self.parent])

    def _stop_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
