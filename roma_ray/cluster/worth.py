"""Whether workers pay: short work begins in the driver, and stays there unless what is left is worth starting workers for.

No speed is assumed: the first batches, or steps, are timed where they run. The start-up is measured too: by Ray on two cores
(benchmarks/README.md); a busier machine takes longer for both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.config.ray_settings import PlacementConfig
from roma_ray.engine.model_spec import ModelSpec
from roma_ray.engine.work import Executor, Report, Work, one_by_one, timed_open
from roma_ray.errors import ModelError
from roma_ray.stages.finetuning import TrainJob, train_here
from roma_ray.store.files import local_place

# Ray itself; a stage's workers: processes, imports, the model.
RAY_SECONDS, WORKERS_SECONDS = 6.0, 15.0
# A larger model is not timed in the driver: loading it alone takes as long as starting workers.
_SMALL_BYTES = 1 << 30
_MINILM_BYTES = 91 << 20
# The first training steps are slower than the later ones.
_STEPS_TIMED = 3

ForRest = Callable[[Work, Sequence[int], float | None], Iterator[Report]]
"""Runs batches on workers, given the seconds that one process would need for them, where that was measured."""


def starting(cluster: Cluster) -> float:
    """Seconds until a stage's workers would begin."""
    return WORKERS_SECONDS + (0.0 if cluster.connected else RAY_SECONDS)


def pays(cluster: Cluster, left: float) -> bool:
    """Whether workers should take over what takes one process `left` seconds more: two workers halve it once they have started."""
    return left > 2 * starting(cluster)


def share_of(left: float | None) -> int | None:
    """At most how many workers: each has more to do than to start. None where the work was not measured."""
    return None if left is None else max(1, int(left / WORKERS_SECONDS))


def begins_here(
    cluster: Cluster, stage: str, device: str, model: ModelSpec | str | None, *, loads_model: bool = True
) -> bool:
    """Whether a stage begins in this process: with a small model or none, where no setting speaks of workers, on a cluster of our own;
    an evaluation, which is short, on any.
    """
    import torch

    settings = cluster.config.ray
    asked = getattr(settings, f"{stage}_workers") or getattr(settings, stage) != PlacementConfig()
    streamed = stage == "extract" and cluster.config.extraction.memory_gb is not None
    divided = stage == "finetune" and cluster.config.finetune.chain is not None
    here = cluster.own or stage == "evaluate"
    if asked or not here:
        return False
    if not loads_model:
        return True
    if streamed or divided or not (device == "cpu" or torch.cuda.is_available()):
        return False
    size = _bytes_of(model)
    return size is not None and size <= _SMALL_BYTES


def _bytes_of(model: ModelSpec | str | None) -> int | None:
    """What the weights of a model, or of a sentence-embedding model by name, take; None where that is not known beforehand."""
    if isinstance(model, ModelSpec):
        try:
            return model.weight_bytes()
        except ModelError:
            return None  # a dense one, judged alone
    if model == "minilm":
        return _MINILM_BYTES
    if model is None or not (folder := local_place(model)).is_dir():
        return None
    return sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in (".safetensors", ".bin"))


def begun_here(cluster: Cluster, stage: str, device: str, rest: ForRest) -> Executor:
    """An executor that does batches in this process as long as workers do not pay, and what is left with `rest`."""

    def execute(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        waiting, left = list(batches), None
        loads_model = getattr(work, "loads_model", True)
        if waiting and begins_here(cluster, stage, device, getattr(work, "model", None), loads_model=loads_model):
            cluster.say(f"{work.name}: {len(waiting)} batches, the first ones in this process")
            spent, done, enough = 0.0, 0, False

            def next_ones() -> Iterator[int]:
                while waiting and not enough:
                    yield waiting.pop(0)

            for report in one_by_one(timed_open(work), next_ones()):
                spent, done = spent + report.seconds, done + 1
                yield report
                left = spent / done * len(waiting)
                if waiting and not enough and pays(cluster, left):
                    cluster.say(f"{work.name}: about {left:.0f} s more in one process: starting workers for the rest")
                    enough = True
        if waiting:
            yield from rest(work, waiting, left)

    return execute


class _WorkersPay(Exception):
    """Training here is given up for workers."""


@dataclass
class _Clock:
    """Times training steps in this process and ends them where workers pay."""

    cluster: Cluster
    questions: int
    """Of all epochs."""
    done: int
    steps: int = 0
    left: float | None = None

    def __post_init__(self) -> None:
        self.first, self.began = self.done, time.monotonic()

    def step(self, count: int) -> None:
        """Another step is done. Raises _WorkersPay."""
        self.done += count
        self.steps += 1
        if self.steps == 1:
            self.first, self.began = self.done, time.monotonic()
        elif self.steps == _STEPS_TIMED:
            rate = (time.monotonic() - self.began) / (self.done - self.first)
            self.left = rate * (self.questions - self.done)
            if pays(self.cluster, self.left):
                raise _WorkersPay


def trained_here(
    cluster: Cluster,
    job: TrainJob,
    device: str,
    report: Callable[[dict[str, Any]], None],
    advance: Callable[[int, str], None],
    *,
    done: int,
    questions: int,
) -> tuple[bool, float | None]:
    """Train in this process, unless workers pay: whether it is done, and about how many seconds it would have taken.

    `done` questions of all epochs' `questions` were trained on before. Raises what training raises.
    """
    if not begins_here(cluster, "finetune", device, job.model):
        return False, None
    clock = _Clock(cluster, questions, done)

    def counted(count: int, note: str) -> None:
        advance(count, note)
        clock.step(count)

    cluster.say("finetune: the first steps in this process")
    try:
        train_here(job, report, counted)
    except _WorkersPay:
        cluster.say(f"finetune: about {clock.left:.0f} s more in one process: starting workers")
        # They begin again, at the last checkpoint.
        advance(done - clock.done, "")
        return False, clock.left
    return True, clock.left
