"""A worker of planned batches: an actor that opens a work at its first batch, does the batches it is handed, and tells what it did.

Imports nothing heavy: a work's libraries come with the work, and not before the worker has said so.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from roma_ray.cluster.environment import quiet_libraries
from roma_ray.cluster.failures import packed
from roma_ray.cluster.starting import IMPORTS, MODEL
from roma_ray.errors import StorageError, WorkerError
from roma_ray.store.files import remove
from roma_ray.store.logs import append_line, whole_lines
from roma_ray.store.uploads import in_background

if TYPE_CHECKING:
    from roma_ray.engine.held_slices import HeldSlices
    from roma_ray.engine.work import Report

ATTEMPTS = ".attempts"
STANDS, OPENED, REPORTS, FAILURE = "stands", "opened", "reports", "failure"
"""What a worker tells: where it stands, seconds of its opening, finished batches, why it gives up."""
_OPEN = "open"
# Deaths of a worker on one batch: after so many the rows are tried one by one, and after as many more the run ends.
_DEATHS = 2
# Short batches are told of together, so that they cost the driver little.
_SECONDS_BETWEEN_REPORTS = 1.0

Told = tuple[str, Any]


@runtime_checkable
class Separable(Protocol):
    """An opened work whose batches can be run without some of their rows."""

    def rows(self, batch: int) -> Sequence[int]:
        """The rows of a batch."""

    def probe(self, row: int) -> None:
        """Run one row alone, keeping nothing."""

    def __call__(self, batch: int, excluded: frozenset[int] = frozenset()) -> Report:
        """Do a batch; `excluded` rows are set aside."""


@dataclass(frozen=True)
class Order:
    """A work as its workers get it."""

    name: str
    stage: str
    """Whose settings say how many workers there are."""
    folder: str
    token: str
    """Names this run of the driver's over the work."""
    work: bytes
    """Pickled: its libraries are imported where it is opened."""
    threads: int


@dataclass(frozen=True)
class Left:
    """What a call that ended with its worker has left in its journal."""

    done: Sequence[Mapping[str, Any]]
    """Reports of batches whose files are there."""
    batch: int | None
    """The one that was under way."""
    lines: tuple[str, ...]
    """What was noted of it."""
    opening: bool
    """Whether the work was being opened instead."""


class Journal:
    """What was begun and done in one call: lines in a file of the stage's folder, so that they outlive the process."""

    def __init__(self, order: Order, call: str) -> None:
        self.path = Path(order.folder) / ATTEMPTS / order.token / call

    def add(self, line: str) -> None:
        """Note the start or the end of something. Raises StorageError."""
        append_line(self.path, line)

    def done(self, report: Report) -> None:
        """A batch is done, its files are there. Raises StorageError."""
        self.add(f"done {json.dumps(asdict(report))}")

    def read(self) -> Left:
        """What is left after the worker's death. Raises OSError."""
        done: list[dict[str, Any]] = []
        batch: int | None = None
        lines: tuple[str, ...] = ()
        opening = False
        for line in whole_lines(self.path)[0]:
            word, _, rest = line.partition(" ")
            if word == "done":
                done.append(json.loads(rest))
                batch, lines = None, ()
            elif word != _OPEN:
                batch, lines = int(rest.split(" ")[0]), (*lines, line)
            opening = word == _OPEN
        return Left(done, batch, lines, opening)

    def close(self) -> None:
        """All is done and told."""
        # Who removes the folder at the end of the work takes along what could not be removed here.
        with contextlib.suppress(OSError, StorageError):
            remove(self.path)


class BatchWorker:
    """The actor. Between works it stays, with its imports; a work's model goes before the next one's is loaded."""

    def __init__(self, kept_seconds: int = 0) -> None:
        """`kept_seconds`: end by itself after so long without a call, where it outlives its driver; 0: it does not."""
        quiet_libraries()
        self.claimed, self.busy, self.used = True, 0, time.monotonic()
        self.counting = threading.Lock()
        if kept_seconds:
            threading.Thread(target=self._end_when_idle, args=(kept_seconds,), name="idle", daemon=True).start()
        self.token = ""
        self.do: Callable[[int], Report] | None = None
        self.held: HeldSlices | None = None
        # Of a storage in a bucket two calls run at a time: one batch is put while the next is computed.
        self.computing = threading.Lock()
        self.told = 0.0

    def _end_when_idle(self, seconds: float) -> None:
        while self.busy or time.monotonic() - self.used < seconds:
            time.sleep(min(1.0, seconds / 4))
        os._exit(0)

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Inside the block it does not idle, however the block ends. Two calls may begin or end at the same time."""
        with self.counting:
            self.busy += 1
        try:
            yield
        finally:
            with self.counting:
                self.used, self.busy = time.monotonic(), self.busy - 1

    def claim(self, until: float) -> bool:
        """Be another run's from now on, if it is nobody's; not after `until` (`time.time`), when who asks has given up."""
        if self.claimed or time.time() > until:
            return False
        self.claimed, self.used = True, time.monotonic()
        if self.held is not None and not self.held.told_by_content:
            self.do, self.token = None, ""
            self.held.release()
        return True

    def free(self) -> None:
        """The run is over."""
        self.claimed, self.used = False, time.monotonic()

    def up(self) -> None:
        """Returns once the process runs."""

    def warm(self, module: str, threads: int) -> None:
        """Import a work's libraries before the work is there."""
        from roma_ray.engine.model_spec import set_threads

        with self._at_work():
            set_threads(threads)
            importlib.import_module(module)

    def run(self, order: Order, call: str, batches: Sequence[int], before: Sequence[str] = ()) -> Iterator[Told]:
        """Do batches; tells what is done as it is done. `before`: the lines that earlier attempts on the first of them left."""
        with self._at_work():
            yield from self._run(order, call, batches, before)

    def _run(self, order: Order, call: str, batches: Sequence[int], before: Sequence[str]) -> Iterator[Told]:
        journal, reports = Journal(order, call), list[dict[str, Any]]()
        failure: dict[str, str] | None = None
        try:
            with self.computing:
                yield from self._opened(order, journal)
            for batch in batches:
                reports.append(asdict(self._done(order, journal, batch, before)))
                before = ()
                if time.monotonic() - self.told >= _SECONDS_BETWEEN_REPORTS:
                    yield REPORTS, reports
                    reports, self.told = [], time.monotonic()
        except Exception as error:  # noqa: BLE001 - the border of the process; the driver raises it
            failure = packed(error)
            # Who knows in what state it left the model.
            self.do, self.token, self.held = None, "", None
        if reports:
            yield REPORTS, reports
        if failure is not None:
            yield FAILURE, failure
        journal.close()

    def _opened(self, order: Order, journal: Journal) -> Iterator[Told]:
        if self.token == order.token:
            return
        journal.add(_OPEN)
        yield STANDS, IMPORTS
        began = time.monotonic()
        work = pickle.loads(order.work)
        from roma_ray.engine.model_spec import set_threads

        set_threads(order.threads)
        imported = time.monotonic()
        yield STANDS, MODEL
        # Never two models in memory: what this work does not need goes before it loads.
        self.do, self.token = None, ""
        if self.held is None:
            from roma_ray.engine.held_slices import HeldSlices

            self.held = HeldSlices()
        # A work without a model comes before one that may want what is held.
        loads = getattr(work, "loads_model", True)
        with self.held.opening(getattr(work, "model", None)) if loads else contextlib.nullcontext():
            self.do = work.open()
        self.token = order.token
        yield OPENED, {IMPORTS: imported - began, MODEL: time.monotonic() - imported}

    def _done(self, order: Order, journal: Journal, batch: int, before: Sequence[str]) -> Report:
        from roma_ray.engine.model_spec import set_threads

        with self.computing:
            # A setting of the thread, and results depend on it.
            set_threads(order.threads)
            assert self.do is not None
            with in_background() as uploads:
                report = self._attempt(order, self.do, batch, journal, list(before))
        uploads.wait()
        journal.done(report)
        return report

    def _attempt(
        self, order: Order, do: Callable[[int], Report], batch: int, journal: Journal, before: list[str]
    ) -> Report:
        deaths = before.count(f"batch {batch}")
        if deaths >= 2 * _DEATHS or (deaths >= _DEATHS and not isinstance(do, Separable)):
            raise WorkerError(
                f"{order.name}: batch {batch} killed its worker {deaths} times and no single question is to blame; most "
                f"likely memory ran out. Use fewer workers on a node (ray.{order.stage}_workers), nodes with more memory, or smaller "
                "batches (extraction.batch_tokens, embedding.batch_size, evaluation.batch_tokens)."
            )
        excluded: frozenset[int] = frozenset()
        if deaths >= _DEATHS:
            assert isinstance(do, Separable)
            excluded = _guilty(do, batch, journal, before)
        journal.add(f"batch {batch}")
        return do(batch, excluded) if isinstance(do, Separable) else do(batch)


def _guilty(do: Separable, batch: int, journal: Journal, before: list[str]) -> frozenset[int]:
    """The rows that kill a worker when they run alone; found over as many lives of workers as there are such rows."""
    rows = do.rows(batch)
    for row in rows:
        if f"probe {batch} {row}" not in before:
            journal.add(f"probe {batch} {row}")
            do.probe(row)
            journal.add(f"lives {batch} {row}")
    return frozenset(row for row in rows if f"probe {batch} {row}" in before and f"lives {batch} {row}" not in before)
