"""The baselines on Ray: every method a task of its own, so that a method that kills its worker ends no other.

What a method does at each question by itself comes before that, in tasks of planned parts (`baselines/method_parts.py`): the
method's own task then finds what it would have done. Everything is resumable, trial by trial and part by part, so a task that
Ray repeats goes on where its worker died.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from roma_ray.baselines.bench import Bench
from roma_ray.baselines.method_parts import missing_parts, read_parts
from roma_ray.baselines.method_registry import METHODS
from roma_ray.baselines.method_runs import MethodsWork, note_failure
from roma_ray.cluster.environment import quiet_libraries
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.engine.work import Executor, Report, Work
from roma_ray.errors import WorkerError

# The bench that this worker holds open, and for which work.
_opened: dict[str, Bench] = {}
# What is begun first: plans, which open the way for others; the parts of a method that is to train on them; the methods,
# which take longest; and then the parts that nothing waits for.
_PLAN, _BEFORE, _METHOD, _PART = range(4)
# More parts than any cluster has workers.
_MANY = 1 << 20


@dataclass(frozen=True, order=True)
class Task:
    """A plan of parts, a part, or a method."""

    rank: int
    batch: int
    """The method's number."""
    seed: int = 0
    """Which of its seeds, of a plan or a part."""
    part: int = 0


def baselines_on_ray(cluster: Cluster, device: str) -> Executor:
    """Methods as tasks on the cluster; GPUs where `device` is `cuda`."""

    def execute(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        assert isinstance(work, MethodsWork)
        if not batches:
            return
        cluster.connect()
        import ray
        from ray.exceptions import RayError

        settings = cluster.config.ray
        queue = Queue(work, batches)
        # How many parts there will be is not known before they are planned.
        workers, need = cluster.place("baselines", settings.baselines_workers, queue.at_most, device)
        cluster.say(f"baselines: {len(batches)} method(s) on {workers} worker(s), {device}")
        options = {name: value for name, value in need.options().items() if value is not None}
        remote = ray.remote(**options, max_retries=settings.max_failures)(run_one)
        running: dict[Any, Task] = {}
        while queue.waiting or running:
            while queue.waiting and len(running) < workers:
                task = queue.take()
                running[remote.remote(work, task)] = task
            ready, _ = ray.wait(list(running), num_returns=1)
            task = running.pop(ready[0])
            try:
                report = ray.get(ready[0])
            except RayError as error:
                report = _died(work, task, error)
            yield from queue.done(task, report)

    return execute


class Queue:
    """The tasks of some methods that can be begun: a method's own once its parts are there."""

    def __init__(self, work: MethodsWork, batches: Sequence[int]) -> None:
        self.work = work
        self.waiting: list[Task] = []
        self.open: dict[int, int] = {}
        """Plans and parts of each method that have not ended."""
        for batch in batches:
            seeds = len(work.ahead(batch))
            self.open[batch] = seeds
            for seed in range(seeds):
                self._add(Task(_PLAN, batch, seed))
            if not seeds:
                self._add(Task(_METHOD, batch))

    @property
    def at_most(self) -> int:
        """How many workers may have something to do at a time."""
        return _MANY if any(self.open.values()) else len(self.waiting)

    def take(self) -> Task:
        """The next task."""
        return heapq.heappop(self.waiting)

    def done(self, task: Task, report: Report) -> Iterator[Report]:
        """Hear of a task's end; the method's report where that ends the method. A part that fails ends its method."""
        if task.rank == _METHOD or (report.errors and task.batch in self.open):
            self.open.pop(task.batch, None)
            self.waiting = [other for other in self.waiting if other.batch != task.batch]
            heapq.heapify(self.waiting)
            yield report
        elif task.batch in self.open:
            if task.rank == _PLAN:
                self._plan(task, report.rows)
            self.open[task.batch] -= 1
            if not self.open[task.batch]:
                self._add(Task(_METHOD, task.batch))

    def _plan(self, task: Task, left: int) -> None:
        """The parts that a plan has left to do."""
        if left:
            stage = self.work.ahead(task.batch)[task.seed]
            rank = _BEFORE if METHODS[self.work.methods[task.batch]].works_on == "train" else _PART
            for part in missing_parts(stage, len(read_parts(stage))):
                self.open[task.batch] += 1
                self._add(Task(rank, task.batch, task.seed, part))

    def _add(self, task: Task) -> None:
        heapq.heappush(self.waiting, task)


def run_one(work: MethodsWork, task: Task) -> Report:
    """What a worker does: one task. The bench stays open for the worker's next one."""
    quiet_libraries()
    if work.identity not in _opened:
        _opened.clear()
        _opened[work.identity] = work.bench()
    bench = _opened[work.identity]
    if task.rank == _METHOD:
        return work.run(bench, task.batch)
    if task.rank == _PLAN:
        return work.plan(bench, task.batch, task.seed)
    return work.part(bench, task.batch, task.seed, task.part)


def _died(work: MethodsWork, task: Task, error: Any) -> Report:
    """Record a dead worker: it could not write its own failure, so the driver does."""
    first_line = str(error).strip().splitlines()[0]
    told = WorkerError(
        f"its worker died or could not start ({first_line}). Most likely memory ran out: lower extraction.batch_tokens or "
        "baselines.micro_batch_size, or use fewer workers (ray.baselines_workers)."
    )
    note_failure(work.next_stage(task.batch) if task.rank == _METHOD else work.ahead(task.batch)[task.seed], told)
    return Report(task.batch, 0, 0, 1, 0.0)
