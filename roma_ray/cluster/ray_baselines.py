"""The baselines on Ray: every method a task of its own, so that a method that kills its worker ends no other.

A method's stage is resumable trial by trial, so a task that Ray repeats goes on where its worker died.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from roma_ray.baselines.method_runs import MethodsWork, note_failure
from roma_ray.cluster.environment import quiet_libraries
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.engine.work import Executor, Report, Work
from roma_ray.errors import WorkerError

# The bench that this worker holds open, and for which work.
_opened: dict[str, Callable[[int], Report]] = {}


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
        workers, need = cluster.place("baselines", settings.baselines_workers, len(batches), device)
        cluster.say(f"baselines: {len(batches)} method(s) on {workers} worker(s), {device}")
        options = {name: value for name, value in need.options().items() if value is not None}
        task = ray.remote(**options, max_retries=settings.max_failures)(run_one)
        waiting = list(batches)
        running: dict[Any, int] = {}
        while waiting or running:
            while waiting and len(running) < workers:
                batch = waiting.pop(0)
                running[task.remote(work, batch)] = batch
            ready, _ = ray.wait(list(running), num_returns=1)
            batch = running.pop(ready[0])
            try:
                yield ray.get(ready[0])
            except RayError as error:
                yield _died(work, batch, error)

    return execute


def run_one(work: MethodsWork, batch: int) -> Report:
    """What a worker does: one method with all its seeds. The bench stays open for the worker's next method."""
    quiet_libraries()
    if work.identity not in _opened:
        _opened.clear()
        _opened[work.identity] = work.open()
    return _opened[work.identity](batch)


def _died(work: MethodsWork, batch: int, error: Any) -> Report:
    """Record a dead worker: it could not write its own failure, so the driver does."""
    first_line = str(error).strip().splitlines()[0]
    told = WorkerError(
        f"its worker died or could not start ({first_line}). Most likely memory ran out: lower extraction.batch_tokens or "
        "baselines.micro_batch_size, or use fewer workers (ray.baselines_workers)."
    )
    note_failure(work.next_stage(batch), told)
    return Report(batch, 0, 0, 1, 0.0)
