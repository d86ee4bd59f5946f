"""What following a run asks of a tracker: one class to write for another than MLflow (`mlflow.py`), named in `delivery.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from roma_ray.config.schema import Config
from roma_ray.store.artifacts import Store
from roma_ray.store.locks import locked

# Tags that trackers have words of their own for.
NAME, PARENT, NOTE = "name", "parent", "note"
SOURCE, COMMIT, USER = "source", "commit", "user"


class Unavailable(Exception):
    """The tracker could not be reached or refused; the text says why. Never leaves this room."""


class OwnFault(Exception):
    """What it was to be given is missing or damaged here, which is no fault of its; the text says what."""


class Refused(Unavailable):
    """It answered, and will not take this; other things it may take."""


@dataclass(frozen=True)
class MetricValue:
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
    """What the tracker holds of a run; times in milliseconds since 1970. Keys of `tags` are ours."""

    id: str
    start: int
    status: str
    tags: dict[str, str]
    params: set[str]
    metrics: set[str]


class Backend(ABC):
    """A connection to one experiment of a tracker. Every method raises Unavailable and OwnFault and nothing else."""

    title: str
    """What users call it."""

    @staticmethod
    @abstractmethod
    def address(config: Config, store: Store) -> str:
        """Where it is."""

    @classmethod
    @abstractmethod
    def connect(cls, config: Config, store: Store) -> Self:
        """Connect, making the experiment where it is missing."""

    @staticmethod
    def shown_as_table(file: str) -> Mapping[str, str]:
        """Tags by which a file of a run, {columns, data} as JSON, is shown as a table."""
        return {}

    @abstractmethod
    def place(self, run: RunState | None = None) -> str:
        """Where the interface shows a run, or all of them; without a server also the command that starts one."""

    @abstractmethod
    def page(self, run: RunState | None = None) -> str:
        """The place of a run, or of all, within the interface."""

    @abstractmethod
    def runs(self, tag: str, value: str) -> list[RunState]:
        """The experiment's runs that have this tag, oldest first."""

    @abstractmethod
    def run(self, id: str) -> RunState:
        """The run of this id."""

    @abstractmethod
    def create(self, name: str, tags: Mapping[str, str], start: int) -> RunState:
        """A new run."""

    @abstractmethod
    def log(
        self,
        run: RunState,
        *,
        metrics: Sequence[MetricValue] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Write metrics, parameters and tags; `run` is kept up to date."""

    @abstractmethod
    def steps(self, run: RunState, key: str) -> set[int]:
        """The steps at which a metric has a value."""

    @abstractmethod
    def add_inputs(self, run: RunState, inputs: Sequence[Input]) -> None:
        """Name the data sets that a run used; those already named are kept as they are."""

    @abstractmethod
    def upload(self, run: RunState, path: Path, folder: str | None = None) -> None:
        """Store a file, or a folder's content, among the run's artifacts. Raises OwnFault where it is not there."""

    @abstractmethod
    def log_model(self, run: RunState, name: str, folder: Path, params: Mapping[str, str]) -> str:
        """Make the folder a model that the run has put out, with a page of its own; its id. Raises OwnFault."""

    @abstractmethod
    def register(self, run: RunState, model: str, name: str) -> str:
        """Make a model that was logged a version of a registered one, which is made where it is missing; the version."""

    @abstractmethod
    def set_status(self, run: RunState, status: str, end: int | None = None) -> None:
        """RUNNING, or FINISHED, FAILED or KILLED with the time of the end."""

    @abstractmethod
    def rename(self, run: RunState, name: str) -> None:
        """Give a run another name."""

    @abstractmethod
    def remove_tag(self, run: RunState, key: str) -> None:
        """Take a tag off a run."""

    @abstractmethod
    def monitor(self, run: RunState) -> Callable[[], None]:
        """Start recording the machine's load, going on where an earlier process ended; the value stops it (Unavailable)."""


@contextmanager
def one_at_a_time(store: Store) -> Iterator[None]:
    """Two drivers that start together must not both make the database or the same run. Raises Unavailable."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(store.root / ".tracking.lock", wait=True))
        except OSError as error:
            raise Unavailable(f"cannot write in {store.root}: {error.strerror or error}") from error
        yield
