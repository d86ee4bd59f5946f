"""The workers of planned batches: processes that stay from one work to the next, for as long as nothing else needs their place."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from roma_ray.cluster.batch_worker import BatchWorker
from roma_ray.cluster.placement import Need


@dataclass(eq=False)
class Worker:
    """An actor and the place that it was started for."""

    need: Need
    calls_at_once: int
    actor: Any = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start the process, once its node has room."""
        import ray

        options = {name: value for name, value in self.need.options().items() if value is not None}
        # One that dies is replaced by the driver, which knows what it was at.
        self.actor = (
            ray.remote(BatchWorker)
            .options(**options, max_restarts=0, max_task_retries=0, max_concurrency=self.calls_at_once)
            .remote()
        )

    def end(self) -> None:
        """End the process, whatever it does."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self.actor)


class WorkerPool:
    """Lends workers to one work at a time and keeps them for the next."""

    def __init__(self) -> None:
        self._idle: list[Worker] = []

    def __len__(self) -> int:
        return len(self._idle)

    def lend(self, need: Need, count: int, calls_at_once: int) -> list[Worker]:
        """So many workers, kept ones first. Kept ones that are not fit, or not needed, end, for they hold CPUs, GPUs and memory."""
        fit = [w for w in self._idle if w.need == need and w.calls_at_once == calls_at_once][:count]
        for worker in self._idle:
            if worker not in fit:
                worker.end()
        self._idle = []
        return fit + [Worker(need, calls_at_once) for _ in range(count - len(fit))]

    def warm(self, need: Need, count: int, calls_at_once: int, module: str, threads: int) -> None:
        """Start workers that will be asked for soon; meanwhile they import what the work's module does."""
        workers = self.lend(need, count, calls_at_once)
        for worker in workers:
            worker.actor.warm.remote(module, threads)
        self.keep(workers)

    def keep(self, workers: Sequence[Worker]) -> None:
        """Take back workers that have nothing under way."""
        self._idle += workers

    def release(self) -> None:
        """End all that are kept: something else needs their place."""
        for worker in self._idle:
            worker.end()
        self._idle = []
