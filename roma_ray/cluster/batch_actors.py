"""Planned batches on Ray Data: a pool of actors, each with one loaded model, that write their batches' files themselves.

Ray Data restarts an actor that dies and hands it the same batch again, for ever. So each attempt leaves a mark on the
storage: a batch that killed its worker twice is searched for the rows that do it, and those are set aside.
"""

from __future__ import annotations

import json
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from roma_ray.cluster.environment import quiet_data, quiet_libraries
from roma_ray.cluster.failures import explained, packed, unpacked
from roma_ray.cluster.placement import Need
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.cluster.starting import IMPORTS, MODEL, READY, Roll, Starting
from roma_ray.cluster.worth import begun_here, share_of
from roma_ray.engine.model_spec import set_threads
from roma_ray.engine.work import Executor, Report, Work
from roma_ray.errors import WorkerError
from roma_ray.store.artifacts import unwritable
from roma_ray.store.buckets import is_object
from roma_ray.store.files import remove, remove_folder
from roma_ray.store.logs import append_line, whole_lines
from roma_ray.store.uploads import in_background

ATTEMPTS = ".attempts"
_ROLL = "roll"
# Deaths of a worker on one batch: after so many the rows are tried one by one, and after as many more the run ends.
_DEATHS = 2
_OPENINGS = 3
# Of an actor's batches. On a file system nothing is gained by two calls at a time.
_ONE_BY_ONE: dict[str, Any] = {"max_tasks_in_flight_per_actor": 2}
_AT_ONCE = {**_ONE_BY_ONE, "max_concurrent_calls_per_actor": 2, "enable_true_multi_threading": True}


@runtime_checkable
class Separable(Protocol):
    """An opened work whose batches can be run without some of their rows."""

    def rows(self, batch: int) -> Sequence[int]:
        """The rows of a batch."""

    def probe(self, row: int) -> None:
        """Run one row alone, keeping nothing."""

    def __call__(self, batch: int, excluded: frozenset[int] = frozenset()) -> Report:
        """Do a batch; `excluded` rows are set aside."""


class Marks:
    """What was begun on a batch in this run of the driver: lines in a file, so that they outlive the process."""

    def __init__(self, folder: str, token: str, batch: int) -> None:
        self.path = Path(folder) / ATTEMPTS / token / f"{batch:06d}"
        self.lines = whole_lines(self.path)[0]

    def add(self, line: str) -> None:
        """Note the start or the end of something. Raises StorageError."""
        append_line(self.path, line)
        self.lines.append(line)

    def unfinished(self, begun: str, ended: str) -> int:
        """How often `begun` was noted without `ended`."""
        return self.lines.count(begun) - self.lines.count(ended)

    def clear(self) -> None:
        """The batch is done. Raises StorageError."""
        try:
            remove(self.path)
        except OSError as error:
            raise unwritable(self.path, error) from error


class BatchWorker:
    """The actor: opens the work at its first batch, then does the batches it is given."""

    def __init__(self, folder: str, work: bytes, token: str, threads: int) -> None:
        """`work` is pickled: its libraries are imported here, and not before this worker can say so."""
        quiet_libraries()
        self.roll = Roll(Path(folder) / ATTEMPTS / token / _ROLL)
        self.roll.note(IMPORTS)
        self.work: Work = pickle.loads(work)
        self.token, self.threads = token, threads
        self.do: Callable[[int], Report] | None = None
        self.computing = threading.Lock()

    def __call__(self, item: dict[str, Any]) -> dict[str, list[Any]]:
        """Do one batch; its report and, where it failed, why: a list of one value a column."""
        batch = int(item["item"][0])
        report, failure = Report(batch, 0, 0, 0, 0.0), ""
        try:
            report = self._do(batch)
        except Exception as error:  # noqa: BLE001 - the border of the process; the driver raises it
            failure = json.dumps(packed(error))
        return {**{name: [value] for name, value in asdict(report).items()}, "failure": [failure]}

    def _do(self, batch: int) -> Report:
        """Do one batch. Of a storage in a bucket two calls run at a time: one batch is put while the next is computed."""
        marks = Marks(self.work.folder, self.token, batch)
        with self.computing:
            # A setting of the thread, and results depend on it.
            set_threads(self.threads)
            if self.do is None:
                self.do = self._open(marks)
            with in_background() as uploads:
                report = self._attempt(self.do, batch, marks)
        uploads.wait()
        marks.clear()
        return report

    def _open(self, marks: Marks) -> Callable[[int], Report]:
        if marks.unfinished("open", "opened") >= _OPENINGS:
            raise WorkerError(
                f"{self.work.name}: loading the model killed its worker {_OPENINGS} times; most likely memory ran out. Use nodes "
                f"with more memory, or fewer workers on a node (ray.{self.work.name}_workers, ray.gpus_per_worker)."
            )
        marks.add("open")
        self.roll.note(MODEL)
        opened = self.work.open()
        self.roll.note(READY)
        marks.add("opened")
        return opened

    def _attempt(self, do: Callable[[int], Report], batch: int, marks: Marks) -> Report:
        deaths = marks.lines.count("batch")
        if deaths >= 2 * _DEATHS or (deaths >= _DEATHS and not isinstance(do, Separable)):
            raise WorkerError(
                f"{self.work.name}: batch {batch} killed its worker {deaths} times and no single question is to blame; most "
                "likely memory ran out. Lower extraction.batch_tokens (or embedding.batch_size, evaluation.batch_tokens), or use "
                f"fewer workers on a node (ray.{self.work.name}_workers)."
            )
        excluded: frozenset[int] = frozenset()
        if deaths >= _DEATHS:
            assert isinstance(do, Separable)
            excluded = self._guilty(do, batch, marks)
        marks.add("batch")
        return do(batch, excluded) if isinstance(do, Separable) else do(batch)

    def _guilty(self, do: Separable, batch: int, marks: Marks) -> frozenset[int]:
        """The rows that kill a worker when they run alone; found over as many lives of this actor as there are such rows."""
        rows = do.rows(batch)
        for row in rows:
            if f"row {row}" not in marks.lines:
                marks.add(f"row {row}")
                do.probe(row)
                marks.add(f"row {row} lives")
        return frozenset(row for row in rows if marks.unfinished(f"row {row}", f"row {row} lives"))


def ray_executor(cluster: Cluster, stage: str, device: str) -> Executor:
    """An executor that spreads a stage's batches over the cluster, where that is worth it. It raises RomaError."""

    def execute(work: Work, batches: Sequence[int], left: float | None) -> Iterator[Report]:
        began, first, busy = time.monotonic(), None, 0.0
        cluster.connect()
        wanted = getattr(cluster.config.ray, f"{stage}_workers")
        at_most = len(batches) if wanted else min(len(batches), share_of(left) or len(batches))
        workers, need = cluster.place(stage, wanted, at_most, device)
        token = uuid.uuid4().hex[:12]
        roll = Roll(Path(work.folder) / ATTEMPTS / token / _ROLL)
        cluster.say(f"{stage}: {len(batches)} batches on {workers} worker(s), {device}")
        with explained(stage, work.folder), Starting(stage, lambda: roll.stands(workers), cluster.say) as starting:
            for report in _stream(cluster, work, batches, workers, token, need):
                starting.over()
                busy += report.seconds
                first = first or time.monotonic() - began - report.seconds
                yield report
        remove_folder(Path(work.folder) / ATTEMPTS)
        cluster.compare(stage, time.monotonic() - began, first or 0.0, busy)

    return begun_here(cluster, stage, device, execute)


def _stream(
    cluster: Cluster, work: Work, batches: Sequence[int], workers: int, token: str, need: Need
) -> Iterator[Report]:
    import ray.data
    from ray import cloudpickle

    quiet_data()
    settings = cluster.config.ray
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = 0
    context.execution_no_progress_timeout_s = settings.no_progress_seconds
    # A block a batch: a worker that dies repeats its own batch only, and each report arrives at once.
    numbers = ray.data.from_items([int(b) for b in batches], override_num_blocks=len(batches))
    reports = numbers.map_batches(
        BatchWorker,
        fn_constructor_args=(work.folder, cloudpickle.dumps(work), token, cluster.config.threads),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=workers, **_AT_ONCE if is_object(work.folder) else _ONE_BY_ONE),
        **need.options(),
    )
    for row in reports.iter_rows():
        if row["failure"]:
            raise unpacked([json.loads(row["failure"])], work.name, work.folder)
        yield Report(int(row["batch"]), int(row["rows"]), int(row["tokens"]), int(row["errors"]), float(row["seconds"]))
