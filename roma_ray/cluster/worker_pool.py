"""The workers of planned batches: processes that stay from one work to the next, for as long as nothing else needs their place.

On a cluster that stands they may outlive the run, where that is asked for (`ray.keep_workers_seconds`): then they are named
actors of their own, which a later run of the same code claims, and which end by themselves when they have idled for so long.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import roma_ray
from roma_ray.cluster.batch_worker import BatchWorker
from roma_ray.cluster.environment import forwarded
from roma_ray.cluster.placement import Need
from roma_ray.store.artifacts import fingerprint

NAMESPACE = "roma-ray-workers"
# A worker that does not answer for so long is at work for another run.
_SECONDS_TO_CLAIM = 2.0


@dataclass(eq=False)
class Worker:
    """An actor and the place that it was started for."""

    need: Need
    calls_at_once: int
    kept_seconds: int = 0
    """How long it may idle after the run; 0: it ends with the run."""
    actor: Any = field(default=None)

    def __post_init__(self) -> None:
        if self.actor is None:
            self.start()

    @property
    def kind(self) -> str:
        """Begins the names of the workers that can stand for this one: of the same user, environment, place and code."""
        place = [asdict(self.need), self.calls_at_once, self.kept_seconds]
        return f"{owner()}-{fingerprint([place, code_digest()])}"

    def start(self) -> None:
        """Start the process, once its node has room."""
        import ray

        options: dict[str, Any] = {name: value for name, value in self.need.options().items() if value is not None}
        if self.kept_seconds:
            name = f"{self.kind}-{uuid.uuid4().hex[:12]}"
            options |= {"lifetime": "detached", "namespace": NAMESPACE, "name": name}
        # One that dies is replaced by the driver, which knows what it was at.
        options |= {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": self.calls_at_once}
        self.actor = ray.remote(BatchWorker).options(**options).remote(self.kept_seconds)

    def end(self) -> None:
        """End the process, whatever it does."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self.actor)


class WorkerPool:
    """Lends workers to one work at a time and keeps them for the next."""

    def __init__(self, kept_seconds: int = 0) -> None:
        """`kept_seconds`: how long the workers wait for another run after this one."""
        self.kept_seconds = kept_seconds
        self._idle: list[Worker] = []

    def __len__(self) -> int:
        return len(self._idle)

    def lend(self, need: Need, count: int, calls_at_once: int, *, more_to_come: bool = False) -> list[Worker]:
        """So many workers, kept ones first, then those that an earlier run left. Whoever is not fit, or not needed, ends: they hold
        CPUs, GPUs and memory. `more_to_come`: the next work needs such workers too, so those that are fit stay.
        """
        alike = [w for w in self._idle if w.need == need and w.calls_at_once == calls_at_once]
        fit, left = alike[:count], alike[count:] if more_to_come else []
        for worker in self._idle:
            if worker not in [*fit, *left]:
                worker.end()
        self._idle = left
        if self.kept_seconds and len(fit) < count:
            kind = Worker(need, calls_at_once, self.kept_seconds, actor=NAMESPACE).kind
            for name, actor in _claimed().items():
                worker = Worker(need, calls_at_once, self.kept_seconds, actor)
                if name.startswith(kind) and len(fit) < count:
                    fit.append(worker)
                else:
                    worker.end()
        return fit + [Worker(need, calls_at_once, self.kept_seconds) for _ in range(count - len(fit))]

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
        """End all that are kept, by this run or by an earlier one: something else needs their place."""
        import ray

        for worker in self._idle:
            worker.end()
        self._idle = []
        for actor in _claimed().values() if self.kept_seconds else ():
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor)

    def close(self) -> None:
        """The run ends: its workers end, or wait for another one."""
        import ray

        if self.kept_seconds and self._idle:
            # Heard before this process is gone.
            with contextlib.suppress(ray.exceptions.RayError):
                ray.wait([worker.actor.free.remote() for worker in self._idle], num_returns=len(self._idle), timeout=5)
            self._idle = []
        for worker in self._idle:
            worker.end()
        self._idle = []


def owner() -> str:
    """Begins the names of all workers that a user's runs of one environment leave."""
    return fingerprint([os.getuid(), forwarded()])


def _claimed() -> dict[str, Any]:
    """The idle workers that earlier runs of this user left, by name: this run's from now on."""
    import ray

    named = [n["name"] for n in ray.util.list_named_actors(all_namespaces=True) if n["namespace"] == NAMESPACE]
    claims: dict[Any, tuple[str, Any]] = {}
    for name in named:
        # It may have ended since.
        with contextlib.suppress(ValueError, ray.exceptions.RayError):
            if name.startswith(owner()):
                actor = ray.get_actor(name, NAMESPACE)
                claims[actor.claim.remote(time.time() + _SECONDS_TO_CLAIM)] = (name, actor)
    answered = ray.wait(list(claims), num_returns=len(claims), timeout=_SECONDS_TO_CLAIM)[0] if claims else []
    found = {}
    for claim in answered:
        with contextlib.suppress(ray.exceptions.RayError):
            if ray.get(claim):
                name, actor = claims[claim]
                found[name] = actor
    return found


@lru_cache(maxsize=1)
def code_digest() -> str:
    """What tells this package's code from another version's, or another checkout's."""
    folder = Path(roma_ray.__file__).parent
    return fingerprint({str(f.relative_to(folder)): f.read_text() for f in sorted(folder.rglob("*.py"))})
