"""Keeping MLflow in step with artifacts: what it lacks is written, nothing twice, and an outage stops nothing.

A parent run with its children, found again by tags. What they are, and what is told of each, is a subclass's matter: a name for
each of them, `status` by name, and `_waiting` for those of which MLflow may lack something.
"""

from __future__ import annotations

import contextlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from roma_ray.borders.addresses import hide, mask
from roma_ray.config.schema import Config
from roma_ray.engine.progress import Progress
from roma_ray.errors import ArtifactError
from roma_ray.store.artifacts import Stage, Store
from roma_ray.tracking import run_records
from roma_ray.tracking.backend import (
    NOTE,
    PARENT,
    SOURCE,
    Backend,
    OwnFault,
    Refused,
    RunState,
    Unavailable,
    one_at_a_time,
)
from roma_ray.tracking.mlflow import Mlflow

# While MLflow is down, a try costs up to a minute; between stages and epochs it is tried no more often than this.
RETRY_SECONDS = 60.0
FINGERPRINT, REUSED, MADE_IN = "roma.fingerprint", "roma.reused", "roma.made_in"
_DELIVERED, _ERROR = "roma.delivered", "roma.error"


class Delivery(ABC):
    """A parent run and its children in a tracker, closed at the end of a `with` block, whatever the end is.

    No method raises for MLflow's sake.
    """

    backend: type[Backend] = Mlflow
    parent: str
    """The parent's name among the runs."""
    identity_tag: str
    name_tag: str
    later = "the next run of the same command"
    """What delivers later what could not be delivered now."""

    def __init__(self, config: Config, store: Store, progress: Progress) -> None:
        self.config, self.store, self.progress = config, store, progress
        self.uri = self.backend.address(config, store)
        self.status: dict[str, str] = {}
        self.failure = ""
        self._identity = ""
        self._client: Backend | None = None
        self._runs: dict[str, RunState] = {}
        self._steps: dict[tuple[str, str], set[int]] = {}
        self._waiting: dict[str, None] = {}
        self._told: set[str] = set()
        self._absent: list[str] = []
        self._down_since: float | None = None
        self._stop_monitor: Callable[[], None] | None = None
        self._working = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.failed(error)
        self.close()

    # What a subclass says of its runs.

    @abstractmethod
    def _title(self, name: str) -> str:
        """A run's name in MLflow."""

    def _tags(self, name: str) -> Mapping[str, str]:
        """Tags that a run has from its beginning, beside those by which it is found."""
        return {}

    @abstractmethod
    def _start(self, name: str) -> int:
        """When a run began."""

    @abstractmethod
    def _end(self, name: str, run: RunState) -> int:
        """When a run ended."""

    @abstractmethod
    def _receipt(self, name: str) -> str:
        """What, once noted on a run, says that all of it is there; empty for what is not complete."""

    def _error(self, name: str) -> str:
        """What went wrong with a run that failed or was stopped."""
        return self.failure

    @abstractmethod
    def _write(self, name: str, run: RunState) -> None:
        """Write what MLflow lacks of a run. Raises Unavailable, and ArtifactError or OSError where a file of ours is damaged."""

    # What holds for all of them.

    @property
    def lacking(self) -> list[str]:
        """The runs of which MLflow has not got all."""
        return list(self._waiting)

    @property
    def _where(self) -> str:
        return f"{self.backend.title} at {mask(self.uri)}"

    def failed(self, error: BaseException) -> None:
        """The work ends early; what was at work ends with it."""
        self.failure = f"{type(error).__name__}: {error}"[:500]
        known = self._runs.get(self.parent)
        if self.parent not in self.status and known is not None and known.status == "RUNNING":
            self.status[self.parent] = "RUNNING"
        for name in [n for n, status in self.status.items() if status == "RUNNING"]:
            self.status[name] = "FAILED" if isinstance(error, Exception) else "KILLED"
            self._waiting[name] = None

    def close(self) -> None:
        """Deliver what is left, stop the monitor, and say where it is, or what could not be delivered."""
        self._unwatch()
        self._deliver(patient=True)
        title = self.backend.title
        if self._waiting and self._down_since is not None:
            self.progress.say(
                f"{self._where} still lacks: {', '.join(self._waiting)}. Nothing is lost: it is delivered by {self.later}, once "
                f"{title} is back."
            )
        elif self._waiting:
            self.progress.say(f"{self._where} still lacks: {', '.join(self._waiting)}.")
        elif self._client is not None and self.parent in self._runs:
            self.progress.say(f"{title}: {self._client.place(self._runs[self.parent])}")

    def _deliver(self, *names: str, patient: bool = False) -> None:
        """Bring MLflow up to date on these runs and all that wait; while it is down, only now and then."""
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
                    whole = self._project(name)
                except Refused as error:
                    self._tell(name, f"{self._where} does not take all of `{name}`: {error}")
                else:
                    if whole:
                        del self._waiting[name]
            self._watch_machine()
        except Unavailable as error:
            self._unwatch()
            self._client, self._runs, self._steps = None, {}, {}
            if not was_down:
                self.progress.say(
                    f"{self._where} cannot be used ({error}). The run goes on; what it records is kept and "
                    "delivered later."
                )
            self._down_since = time.monotonic()
            return
        self._down_since = None
        if was_down:
            self.progress.say(f"{self.backend.title} is back: what was recorded meanwhile is delivered")

    def _tell(self, name: str, text: str) -> None:
        """Tell once of a run what is amiss with it; the others go on."""
        if name not in self._told:
            self.progress.say(text)
            self._told.add(name)

    def _connect(self) -> None:
        if self._client is not None:
            return
        with one_at_a_time(self.store):
            self._client = self.backend.connect(self.config, self.store)
            for run in self._client.runs(self.identity_tag, self._identity):
                # Of duplicates that two drivers made at once, the oldest is kept up to date.
                self._runs.setdefault(run.tags.get(self.name_tag, self.parent), run)
            self._run_of(self.parent)

    @property
    def client(self) -> Backend:
        """The connection, within a delivery."""
        assert self._client is not None
        return self._client

    def _run_of(self, name: str) -> RunState:
        """The MLflow run of that name, made where there is none. Raises Unavailable."""
        if name not in self._runs:
            tags = {self.identity_tag: self._identity, self.name_tag: name, SOURCE: "roma-ray"}
            if name != self.parent:
                tags[PARENT] = self._runs[self.parent].id
            tags |= self._tags(name)
            self._runs[name] = self.client.create(self._title(name), tags, self._start(name))
        return self._runs[name]

    def _project(self, name: str) -> bool:
        """Write what MLflow lacks of that run, and its state; whether that is all. Raises Unavailable."""
        run, wanted, receipt = self._run_of(name), self.status.get(name), self._receipt(name)
        if receipt and run.tags.get(_DELIVERED) == receipt and run.status == wanted:
            return True
        if wanted == "RUNNING" and run.status != "RUNNING":
            self.client.set_status(run, "RUNNING")
        self._absent = []
        try:
            self._write(name, run)
        except (ArtifactError, OSError, json.JSONDecodeError) as error:
            self._absent.append(str(error))
        if self._absent:
            self._tell(
                name,
                f"`{name}` is not whole here, so {self.backend.title} does not get all of it: {'; '.join(self._absent)}",
            )
        if wanted not in (None, "RUNNING"):
            self._close_run(name, run, "" if self._absent else receipt)
        return not self._absent

    def _close_run(self, name: str, run: RunState, receipt: str) -> None:
        wanted = self.status[name]
        failure = hide(self._error(name), self.uri) if wanted in ("FAILED", "KILLED") else ""
        noted = ({_DELIVERED: receipt} if receipt else {}) | ({_ERROR: failure} if failure else {})
        self.client.log(run, tags=noted)
        if not failure and _ERROR in run.tags:
            self.client.remove_tag(run, _ERROR)
        self.client.set_status(run, wanted, self._end(name, run))

    def _upload(self, run: RunState, path: Path, folder: str | None = None) -> None:
        """Store a file or folder; one that is not there is noted, and the others go on. Raises Unavailable."""
        try:
            self.client.upload(run, path, folder)
        except OwnFault as error:
            self._absent.append(str(error))

    def _log_params(self, run: RunState, wanted: Mapping[str, str]) -> None:
        """Parameters are written once: MLflow refuses another value, and settings outside the identity may differ."""
        self.client.log(run, params={key: value for key, value in wanted.items() if key not in run.params})

    def _log_tags(self, run: RunState, wanted: Mapping[str, str]) -> None:
        """Write the tags that are not there yet, or have another value."""
        self.client.log(run, tags={key: value for key, value in wanted.items() if run.tags.get(key) != value})

    def _log_metrics(self, run: RunState, wanted: Sequence[Any]) -> None:
        """Write the values at steps that are not there yet."""
        missing = []
        for value in wanted:
            if value.step == 0:
                there = value.key in run.metrics
            else:
                place = (run.id, value.key)
                if place not in self._steps:
                    self._steps[place] = self.client.steps(run, value.key) if value.key in run.metrics else set()
                there = value.step in self._steps[place]
            if not there:
                missing.append(value)
        self.client.log(run, metrics=missing)
        for value in missing:
            self._steps.setdefault((run.id, value.key), set()).add(value.step)

    def _begun(self) -> int | None:
        """When this work was first started, in milliseconds since 1970; None where that is not known."""
        noted = self.store.begun(self._identity)
        return None if noted is None else round(1000 * noted)

    def _reused(self, stage: Stage) -> bool:
        """Whether a complete stage was there before this work was first started."""
        begun = self._begun()
        # Manifests note whole seconds.
        return begun is not None and stage.complete and run_records.finish_time(stage) + 1000 <= begun

    def _mark_reused(self, run: RunState, stage: Stage) -> None:
        """Tag a run whose work is an earlier one's, and name that one's MLflow run where it has any. Raises Unavailable."""
        if REUSED in run.tags or not self._reused(stage):
            return
        mine = {known.id for known in self._runs.values()}
        found = [
            other
            for tag in (FINGERPRINT, f"roma.stage.{stage.name}")
            for other in self.client.runs(tag, stage.fingerprint)
            if other.id not in mine and REUSED not in other.tags
        ]
        tags = {REUSED: "true"}
        if found:
            link = f"[{found[0].id}]({self.client.page(found[0])})"
            tags |= {MADE_IN: found[0].id, NOTE: f"Reused: made in run {link}."}
        self.client.log(run, tags=tags)

    def _watch_machine(self) -> None:
        wanted = self._working and self.config.tracking.system_metrics and self.status.get(self.parent) == "RUNNING"
        if self._client is not None and wanted and self._stop_monitor is None:
            self._stop_monitor = self._client.monitor(self._runs[self.parent])

    def _unwatch(self) -> None:
        if self._stop_monitor is not None:
            # Where MLflow is away, the delivery itself tells.
            with contextlib.suppress(Unavailable):
                self._stop_monitor()
            self._stop_monitor = None
