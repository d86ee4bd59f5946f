"""MLflow as a backend of the tracker, and the only file that imports it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from roma_ray.borders.addresses import HIDDEN, hide, mask
from roma_ray.borders.text import printable
from roma_ray.config.schema import Config
from roma_ray.errors import ConfigError
from roma_ray.store.artifacts import Store
from roma_ray.store.buckets import is_object
from roma_ray.store.files import for_libraries, local_tree
from roma_ray.tracking.backend import (
    COMMIT,
    NAME,
    NOTE,
    PARENT,
    SOURCE,
    USER,
    Backend,
    Input,
    MetricValue,
    OwnFault,
    Refused,
    RunState,
    Unavailable,
)
from roma_ray.tracking.deadline import Late, within

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
# What a file that says what a model is must name: who can load it.
_FLAVOR = {"roma_ray": {"adapter": "adapter_model.safetensors", "loader": "peft"}}
# Ours -> MLflow's.
_TAGS = {
    NAME: "mlflow.runName",
    PARENT: "mlflow.parentRunId",
    NOTE: "mlflow.note.content",
    SOURCE: "mlflow.source.name",
    COMMIT: "mlflow.source.git.commit",
    USER: "mlflow.user",
}
_OURS = {theirs: ours for ours, theirs in _TAGS.items()}
_REQUESTS_A_CALL = 3
_LEAST_BYTES_A_SECOND = 50_000
_METRICS_A_CALL = 1000
_PLAIN_A_CALL = 100


class Mlflow(Backend):
    """A connection to one experiment."""

    title = "MLflow"

    @staticmethod
    def address(config: Config, store: Store) -> str:
        """The configuration's, else $MLFLOW_TRACKING_URI, else a database in the storage; files made absolute."""
        uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None and store.in_bucket:
            raise ConfigError(
                f"MLflow's database cannot lie in {store.root}: set tracking.uri (or $MLFLOW_TRACKING_URI) to a server, "
                "http://..., or to a file here, sqlite:////path/mlflow.db; or run without MLflow: --set tracking.enabled=false"
            )
        if uri is None:
            return f"sqlite:///{store.root / 'mlflow.db'}"
        scheme, separator, path = uri.partition(":///")
        if separator and scheme.startswith("sqlite") and path:
            return f"{scheme}:///{Path(path).expanduser().absolute()}"
        return uri

    @classmethod
    def connect(cls, config: Config, store: Store) -> Self:
        uri = cls.address(config, store)
        database = sqlite_file(uri)
        root = database.parent if store.in_bucket and database else store.root
        return cls(uri, config.tracking.experiment, root / "mlflow-artifacts")

    @staticmethod
    def shown_as_table(file: str) -> Mapping[str, str]:
        # By this tag MLflow's interface lets it be filtered and joined with other runs'.
        return {"mlflow.loggedArtifacts": json.dumps([{"path": file, "type": "table"}])}

    def __init__(self, uri: str, experiment: str, artifacts: Path) -> None:
        """Connect, making database and experiment where they are missing; `artifacts` is used without a server."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.uri, self._lock = uri, threading.Lock()
        with self._translated():
            database = sqlite_file(uri)
            if database is not None:
                _write_ahead(database)
            from mlflow import MlflowClient

            # Failures reach the user through the tracker, once.
            for library in ("mlflow", "alembic", "sqlalchemy", "urllib3"):
                logging.getLogger(library).setLevel(logging.CRITICAL)
            # A file answers or is locked, for which SQLite has a bound of its own.
            self._patience = _patience() if database is None else None
        self._client = self._ask(MlflowClient, tracking_uri=uri, registry_uri=uri)
        self.experiment_id = self._experiment(experiment, None if uri.startswith("http") else artifacts)

    def _ask(self, call: Callable[..., T], *arguments: Any, sent: float = 0.0, **named: Any) -> T:
        """Call MLflow, no longer than its settings allow and `sent` seconds for what is sent. Raises Unavailable."""
        with self._translated():
            if self._patience is None:
                return call(*arguments, **named)
            return within(self._patience + sent, partial(call, *arguments, **named), self._lock)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what MLflow, its HTTP client and its database raise into Unavailable."""
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except Late as error:
            raise Unavailable(f"no whole answer within {self._patience:.0f} s") from error
        # ImportError: a database without its driver; ValueError: an address that is none.
        except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, ImportError, ValueError) as error:
            refused = getattr(error, "error_code", None) in _REFUSALS
            # No cause: its text may hold the address with the password.
            raise (Refused if refused else Unavailable)(_reason(error, self.uri)) from None

    def _experiment(self, name: str, artifacts: Path | None) -> str:
        found = self._ask(self._client.get_experiment_by_name, name)
        if found is None:
            # Without a server MLflow would put artifacts into a folder relative to this process.
            location = artifacts and (
                for_libraries(artifacts) if is_object(artifacts) else artifacts.absolute().as_uri()
            )
            return str(self._ask(self._client.create_experiment, name, artifact_location=location, tags=_KIND))
        if found.lifecycle_stage == "deleted":
            raise Unavailable(f"its experiment {name!r} was deleted; restore it, or set tracking.experiment")
        if not found.experiment_id:
            raise Unavailable("what answers there is no MLflow server")
        return str(found.experiment_id)

    def place(self, run: RunState | None = None) -> str:
        page = self.page(run)
        if self.uri.startswith("http"):
            root = mask(self.uri).replace(f"{HIDDEN}@", "").rstrip("/")
            return f"{root}/{page}"
        return f"`mlflow ui --backend-store-uri {mask(self.uri)}`, then http://127.0.0.1:5000/{page}"

    def page(self, run: RunState | None = None) -> str:
        return f"#/experiments/{self.experiment_id}/runs" + (f"/{run.id}" if run else "")

    def runs(self, tag: str, value: str) -> list[RunState]:
        found, token = [], None
        while True:
            page = self._ask(
                self._client.search_runs,
                [self.experiment_id],
                filter_string=f"tags.`{tag}` = '{value}'",
                order_by=["attributes.start_time ASC"],
                max_results=1000,
                page_token=token,
            )
            found += page
            token = page.token
            if not token:
                return [_state(r) for r in found]

    def run(self, id: str) -> RunState:
        return _state(self._ask(self._client.get_run, id))

    def create(self, name: str, tags: Mapping[str, str], start: int) -> RunState:
        make = self._client.create_run
        theirs = {_TAGS.get(key, key): value for key, value in tags.items()}
        return _state(self._ask(make, self.experiment_id, start_time=start, tags=theirs, run_name=name))

    def log(
        self,
        run: RunState,
        *,
        metrics: Sequence[MetricValue] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        write = self._client.log_batch
        for block in _blocks(metrics, _METRICS_A_CALL):
            self._ask(write, run.id, metrics=[Metric(m.key, m.value, m.time, m.step) for m in block])
            run.metrics |= {m.key for m in block}
        for some in _blocks(list((params or {}).items()), _PLAIN_A_CALL):
            self._ask(write, run.id, params=[Param(key, value) for key, value in some])
            run.params |= {key for key, _ in some}
        for some in _blocks(list((tags or {}).items()), _PLAIN_A_CALL):
            self._ask(write, run.id, tags=[RunTag(_TAGS.get(key, key), value) for key, value in some])
            run.tags |= dict(some)

    def steps(self, run: RunState, key: str) -> set[int]:
        return {m.step for m in self._ask(self._client.get_metric_history, run.id, key)}

    def add_inputs(self, run: RunState, inputs: Sequence[Input]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        entries = [
            DatasetInput(
                Dataset(name=i.name, digest=i.digest, source_type="local", source=i.source),
                tags=[InputTag("mlflow.data.context", i.context)],
            )
            for i in inputs
        ]
        self._ask(self._client.log_inputs, run.id, datasets=entries)

    def upload(self, run: RunState, path: Path, folder: str | None = None) -> None:
        path = _here(path)
        call = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        self._ask(call, run.id, str(path), folder, sent=_sending(path))

    def log_model(self, run: RunState, name: str, folder: Path, params: Mapping[str, str]) -> str:
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus
        from mlflow.models import Model

        folder = _here(folder)
        sent, client = _sending(folder), self._client
        plain = re.sub(r"[/:.%\"']", "-", name)
        make = partial(
            client.create_logged_model, self.experiment_id, source_run_id=run.id, model_type="router adapter"
        )
        model = self._ask(make, name=plain, params=dict(params))
        self._ask(client.log_model_artifacts, model.model_id, str(folder), sent=sent)
        with tempfile.TemporaryDirectory() as aside:
            # What the registry asks of a model: a file that says what it is.
            Model(model_uuid=model.model_id, model_id=model.model_id, run_id=run.id, flavors=_FLAVOR).save(
                f"{aside}/MLmodel"
            )
            self._ask(client.log_model_artifact, model.model_id, f"{aside}/MLmodel")
        self._ask(client.finalize_logged_model, model.model_id, LoggedModelStatus.READY)
        self._ask(client.log_outputs, run.id, [LoggedModelOutput(model.model_id, 0)])
        return str(model.model_id)

    def register(self, run: RunState, model: str, name: str) -> str:
        if not self._ask(self._client.search_registered_models, f"name = '{name}'"):
            self._ask(self._client.create_registered_model, name)
        # Without a server MLflow would look the model up at its process-wide address, which is not this one.
        served = self.uri.startswith("http")
        source = f"models:/{model}" if served else self._ask(self._client.get_logged_model, model).artifact_location
        make = partial(self._client.create_model_version, await_creation_for=0)
        return str(self._ask(make, name, source, run.id, model_id=model).version)

    def set_status(self, run: RunState, status: str, end: int | None = None) -> None:
        if status == "RUNNING":
            self._ask(self._client.update_run, run.id, status=status)
        else:
            self._ask(self._client.set_terminated, run.id, status, end)
        run.status = status

    def rename(self, run: RunState, name: str) -> None:
        self._ask(self._client.update_run, run.id, name=name)
        run.tags[NAME] = name

    def remove_tag(self, run: RunState, key: str) -> None:
        self._ask(self._client.delete_tag, run.id, _TAGS.get(key, key))
        del run.tags[key]

    def monitor(self, run: RunState) -> Callable[[], None]:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = self._ask(SystemMetricsMonitor, run.id, resume_logging=True, tracking_uri=self.uri)
        monitor.start()
        return partial(self._ask, monitor.finish)


def _state(run: Any) -> RunState:
    info, data = run.info, run.data
    tags = {_OURS.get(key, key): value for key, value in data.tags.items()}
    return RunState(info.run_id, info.start_time, info.status, tags, set(data.params), set(data.metrics))


def _blocks(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _reason(error: Exception, uri: str) -> str:
    """The innermost cause in one line, without secrets: MLflow and urllib3 wrap a refused connection five times."""
    text = " ".join(hide(str(error), uri).split())
    for known in ("Connection refused", "timed out", "Name or service not known", "No route to host"):
        if known in text:
            return known.lower()
    return printable(text, 300)


def _patience() -> float:
    """Seconds within which MLflow's own settings end a request (a time-out a try, waits between), for a few in one call."""
    from mlflow import environment_variables as settings

    tries = settings.MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()
    waits = settings.MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR.get() * (2**tries - 1)
    return float(_REQUESTS_A_CALL * ((tries + 1) * settings.MLFLOW_HTTP_REQUEST_TIMEOUT.get() + waits))


def _here(path: Path) -> Path:
    """A file or folder of the storage as one of this machine. Raises OwnFault where it is not there."""
    try:
        return local_tree(path)
    except FileNotFoundError as error:
        raise OwnFault(f"{error}") from None


def _sending(path: Path) -> float:
    """Seconds that sending a file or folder may take on a slow line. Raises OwnFault where it cannot be read."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    for file in (path, *files):
        if not os.access(file, os.R_OK):
            raise OwnFault(f"{file} is missing or cannot be read")
    return sum(1 + file.stat().st_size / _LEAST_BYTES_A_SECOND for file in files)


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite address, else None."""
    scheme, separator, path = uri.partition(":///")
    return Path(path.partition("?")[0]) if separator and scheme.startswith("sqlite") and path else None


def _write_ahead(database: Path) -> None:
    """Put the database in write-ahead mode, which is kept in the file: readers (the UI) and writers then do not wait."""
    database.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(database, timeout=20)) as connection:
        connection.execute("PRAGMA journal_mode=wal")
