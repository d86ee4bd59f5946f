"""The only file that imports MLflow: what the tracker needs of it, with one exception for everything that can fail."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from roma_ray.text import printable

T = TypeVar("T")

# MLflow's defaults wait for minutes; a run must not. A user's own setting wins.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "GIT_PYTHON_REFRESH": "quiet",
}
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "PERMISSION_DENIED", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}
# Makes the UI open the view of training runs, not the one of language-model traces.
_KIND = {"mlflow.experimentKind": "custom_model_development"}
_METRICS_A_CALL = 1000
_PLAIN_A_CALL = 100


class Unavailable(Exception):
    """MLflow could not be reached or refused; the text says why. Never leaves the tracker."""


class Refused(Unavailable):
    """MLflow answered, and will not take this; other things it may take."""


@dataclass(frozen=True)
class Value:
    """One value of a metric; `time` in milliseconds since 1970."""

    key: str
    value: float
    step: int
    time: int


@dataclass(frozen=True)
class Input:
    """A data set that a run used."""

    name: str
    digest: str
    source: str
    context: str


@dataclass
class RunState:
    """What MLflow holds of a run; times in milliseconds."""

    id: str
    start: int
    status: str
    tags: dict[str, str]
    params: set[str]
    metrics: set[str]


class Client:
    """A connection to one experiment. Every method raises Unavailable and nothing else."""

    def __init__(self, uri: str, experiment: str, artifacts: Path) -> None:
        """Connect, making database and experiment where they are missing; `artifacts` is used without a server."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with _translated():
            database = sqlite_file(uri)
            if database is not None:
                _write_ahead(database)
            from mlflow import MlflowClient

            # Failures reach the user through the tracker, once.
            for library in ("mlflow", "alembic", "urllib3.connectionpool"):
                logging.getLogger(library).setLevel(logging.CRITICAL)
            self.uri = uri
            self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            self.experiment_id = self._experiment(experiment, None if uri.startswith("http") else artifacts)

    def _experiment(self, name: str, artifacts: Path | None) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            # Without a server MLflow would put artifacts into a folder relative to this process.
            location = artifacts.absolute().as_uri() if artifacts else None
            return str(self._client.create_experiment(name, artifact_location=location, tags=_KIND))
        if found.lifecycle_stage == "deleted":
            raise Unavailable(f"its experiment {name!r} was deleted; restore it, or set tracking.experiment")
        if not found.experiment_id:
            raise Unavailable("what answers there is no MLflow server")
        return str(found.experiment_id)

    def runs(self, tag: str, value: str) -> list[RunState]:
        """The experiment's runs that have this tag, oldest first."""
        with _translated():
            found, token = [], None
            while True:
                page = self._client.search_runs(
                    [self.experiment_id],
                    filter_string=f"tags.`{tag}` = '{value}'",
                    order_by=["attributes.start_time ASC"],
                    max_results=1000,
                    page_token=token,
                )
                found += page
                token = page.token
                if not token:
                    break
            return [_state(r) for r in found]

    def run(self, id: str) -> RunState:
        """The run of this id."""
        with _translated():
            return _state(self._client.get_run(id))

    def create(self, name: str, tags: Mapping[str, str], start: int) -> RunState:
        """A new run."""
        with _translated():
            run = self._client.create_run(self.experiment_id, start_time=start, tags=dict(tags), run_name=name)
            return RunState(run.info.run_id, run.info.start_time, run.info.status, dict(run.data.tags), set(), set())

    def log(
        self,
        run: RunState,
        *,
        metrics: Sequence[Value] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Write metrics, parameters and tags; `run` is kept up to date."""
        from mlflow.entities import Metric, Param, RunTag

        with _translated():
            for block in _blocks(metrics, _METRICS_A_CALL):
                self._client.log_batch(run.id, metrics=[Metric(m.key, m.value, m.time, m.step) for m in block])
                run.metrics |= {m.key for m in block}
            for some in _blocks(list((params or {}).items()), _PLAIN_A_CALL):
                self._client.log_batch(run.id, params=[Param(key, value) for key, value in some])
                run.params |= {key for key, _ in some}
            for some in _blocks(list((tags or {}).items()), _PLAIN_A_CALL):
                self._client.log_batch(run.id, tags=[RunTag(key, value) for key, value in some])
                run.tags |= dict(some)

    def steps(self, run: RunState, key: str) -> set[int]:
        """The steps at which a metric has a value."""
        with _translated():
            return {m.step for m in self._client.get_metric_history(run.id, key)}

    def add_inputs(self, run: RunState, inputs: Sequence[Input]) -> None:
        """Name the data sets that a run used; those already named are kept as they are."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        with _translated():
            entries = [
                DatasetInput(
                    Dataset(name=i.name, digest=i.digest, source_type="local", source=i.source),
                    tags=[InputTag("mlflow.data.context", i.context)],
                )
                for i in inputs
            ]
            self._client.log_inputs(run.id, datasets=entries)

    def upload(self, run: RunState, path: Path, folder: str | None = None) -> None:
        """Store a file, or a folder's content, among the run's artifacts."""
        with _translated():
            if path.is_dir():
                self._client.log_artifacts(run.id, str(path), folder)
            else:
                self._client.log_artifact(run.id, str(path), folder)

    def set_status(self, run: RunState, status: str, end: int | None = None) -> None:
        """RUNNING, or FINISHED, FAILED or KILLED with the time of the end."""
        with _translated():
            if status == "RUNNING":
                self._client.update_run(run.id, status=status)
            else:
                self._client.set_terminated(run.id, status, end)
            run.status = status

    def rename(self, run: RunState, name: str) -> None:
        """Give a run another name."""
        with _translated():
            self._client.update_run(run.id, name=name)

    def remove_tag(self, run: RunState, key: str) -> None:
        """Take a tag off a run."""
        with _translated():
            self._client.delete_tag(run.id, key)
            del run.tags[key]

    def monitor(self, run: RunState) -> Any:
        """Start recording the machine's load, going on where an earlier process ended; `.finish()` stops it."""
        with _translated():
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            monitor = SystemMetricsMonitor(run.id, resume_logging=True, tracking_uri=self.uri)
            monitor.start()
            return monitor


def _state(run: Any) -> RunState:
    info, data = run.info, run.data
    return RunState(info.run_id, info.start_time, info.status, dict(data.tags), set(data.params), set(data.metrics))


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn what MLflow, its HTTP client and its database raise into Unavailable."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    # ImportError: a database without its driver; ValueError: an address that is none.
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, ImportError, ValueError) as error:
        refused = getattr(error, "error_code", None) in _REFUSALS
        raise (Refused if refused else Unavailable)(_reason(error)) from error


def _blocks(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _reason(error: Exception) -> str:
    """The innermost cause in one line: MLflow and urllib3 wrap a refused connection five times."""
    text = printable(" ".join(str(error).split()), 300)
    for known in ("Connection refused", "timed out", "Name or service not known", "No route to host"):
        if known in text:
            return known.lower()
    return text


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite address, else None."""
    scheme, separator, path = uri.partition(":///")
    return Path(path.partition("?")[0]) if separator and scheme.startswith("sqlite") and path else None


def _write_ahead(database: Path) -> None:
    """Put the database in write-ahead mode, which is kept in the file: readers (the UI) and writers then do not wait."""
    database.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(database, timeout=20)) as connection:
        connection.execute("PRAGMA journal_mode=wal")


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Hold a file lock: two drivers that start together must not both make the database or the same run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = open(path, "a")  # noqa: SIM115 - closed below
    except OSError as error:
        raise Unavailable(f"cannot write {path}: {error.strerror or error}") from error
    with stream:
        with contextlib.suppress(OSError):
            # Some network file systems have no locks; a single driver is then the user's promise.
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
