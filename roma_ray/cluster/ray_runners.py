"""Where the pipeline's stages run when there is a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from roma_ray.cluster.batch_actors import calls_at_once, ray_executor
from roma_ray.cluster.chain_actors import chain_executor
from roma_ray.cluster.failures import explained
from roma_ray.cluster.head_actors import ChainHeads
from roma_ray.cluster.ray_baselines import baselines_on_ray
from roma_ray.cluster.ray_cluster import Cluster, open_cluster
from roma_ray.cluster.ray_training import finetune_on_ray
from roma_ray.config.schema import Config
from roma_ray.engine.expert_backends import measure_backends
from roma_ray.engine.heads import FRESH, Heads
from roma_ray.engine.model_spec import ModelSpec
from roma_ray.engine.progress import Progress, Silence
from roma_ray.engine.runners import LOCAL, Runners
from roma_ray.engine.setup import Setup, resolve
from roma_ray.engine.work import Executor, Report, Work, one_by_one, serial
from roma_ray.stages.answer_work import Answerer, AnswerWork
from roma_ray.store.artifacts import Store

LOCAL_ADDRESS = "local"
# Started before it is known how many batches there are.
_EXPECTED_WORKERS = 64


@dataclass(frozen=True)
class Place:
    """Where a command's work runs: this process, or a Ray cluster."""

    runners: Runners
    judge: Executor
    """Answers benchmarks' requests."""
    device: str | None = None
    """What the workers have; None: what this process finds."""
    measure: Callable[[ModelSpec], dict[str, Any]] | None = None
    """Measures the experts backends there, for `resolve`."""
    cluster: Cluster | None = None
    """None: this process."""

    def setup(self, config: Config) -> Setup:
        """The configuration resolved for what runs here, its storage looked at. Raises ModelError, StorageError."""
        setup = resolve(config, device=self.device, measure=self.measure)
        setup.store.check()
        return setup


@contextmanager
def open_place(config: Config, address: str | None, progress: Progress) -> Iterator[Place]:
    """This process where the address is `local`, else a cluster for as long as the block runs. Raises WorkerError."""
    if address == LOCAL_ADDRESS:
        yield Place(LOCAL, serial)
        return
    with open_cluster(config, address, progress.say) as cluster:
        device = cluster.device()
        yield Place(
            ray_runners(cluster, device),
            ray_executor(cluster, "evaluate", device),
            device,
            measure_near(cluster, device, progress),
            cluster,
        )


def ray_runners(cluster: Cluster, device: str) -> Runners:
    """The cluster's runners for workers on `device`, the one that `Setup` was resolved with."""
    near = near_device(cluster, device)
    divided = None if cluster.config.finetune.chain is None else ChainHeads(cluster.config, device, cluster)
    return Runners(
        # The workers that extract next: they begin with their libraries in memory.
        encode=ray_executor(cluster, "extract", device),
        extract=ray_executor(cluster, "extract", device),
        chain=chain_executor(cluster, device),
        embed=ray_executor(cluster, "embed", device),
        search=ray_executor(cluster, "evaluate", device),
        finetune=finetune_on_ray(cluster, device),
        call=near,
        evaluate=ray_executor(cluster, "evaluate", device)
        if divided is None
        else answers_by_chain(divided, batches_near(cluster, device)),
        heads=divided or FRESH,
        baselines=baselines_on_ray(cluster, device),
        expect=expecting(cluster, device),
    )


_LIBRARIES = {"extract": "roma_ray.engine.extractor", "embed": "roma_ray.stages.embedding"}
"""The module of a stage's work."""


def expecting(cluster: Cluster, device: str) -> Callable[[str], None]:
    """Starts a stage's workers on a cluster that stands, so that they import their libraries while the driver reads questions."""

    def expect(stage: str) -> None:
        settings = cluster.config.ray
        # A cluster of our own starts where its workers pay; nodes that must be waited for are asked for by number; a chain's workers
        # are no pool's.
        divided = stage == "extract" and cluster.config.extraction.chain is not None
        if cluster.own or settings.wait_seconds or divided:
            return
        wanted = getattr(settings, f"{stage}_workers")
        count, need = cluster.place(stage, wanted, wanted or _EXPECTED_WORKERS, device, kept=True)
        cluster.pool.warm(need, count, calls_at_once(cluster.config.storage), _LIBRARIES[stage], cluster.config.threads)

    return expect


def answers_by_chain(heads: Heads, near: Callable[..., Iterator[Report]]) -> Executor:
    """An executor of an evaluation's answers by one head in slices; its last slice is where the device is."""

    def execute(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        assert isinstance(work, AnswerWork)
        if batches:
            yield from near("evaluate", answered_by, work, list(batches), heads)

    return execute


def answered_by(work: AnswerWork, batches: Sequence[int], heads: Heads) -> Iterator[Report]:
    """Answer parts with a head that is lent."""
    with heads.lend(work.model, work.setup.cut) as head:
        yield from one_by_one(Answerer(work, head), batches)


def measure_near(cluster: Cluster, device: str, progress: Progress) -> Callable[[ModelSpec], dict[str, Any]]:
    """Measures the experts backends where the workers run, for `resolve`."""

    def measure(spec: ModelSpec) -> dict[str, Any]:
        found: dict[str, Any] = near_device(cluster, device)(
            "measure_backends", measure_backends, spec, progress=progress
        )
        return found

    return measure


def near_device(cluster: Cluster, device: str) -> Callable[..., Any]:
    """Calls a function here when this machine has the device, else in a task of the cluster that has it."""

    def call(name: str, function: Callable[..., Any], *arguments: Any, progress: Any) -> Any:
        if (options := _elsewhere(cluster, device)) is None:
            return function(*arguments, progress=progress)
        import ray

        progress.say(f"{name} runs on a GPU of the cluster")
        task = ray.remote(**options)(_task)
        with explained(name, Store(cluster.config.storage).root, "evaluate"):
            return ray.get(task.remote(function, arguments))

    return call


def batches_near(cluster: Cluster, device: str) -> Callable[..., Iterator[Report]]:
    """Calls a function that does batches where `near_device` would; each is told of as it is done."""

    def reports(name: str, function: Callable[..., Iterator[Report]], *arguments: Any) -> Iterator[Report]:
        if (options := _elsewhere(cluster, device)) is None:
            yield from function(*arguments)
            return
        import ray

        task = ray.remote(**options, num_returns="streaming")(function)
        with explained(name, Store(cluster.config.storage).root, "evaluate"):
            for report in task.remote(*arguments):
                yield ray.get(report)

    return reports


def _elsewhere(cluster: Cluster, device: str) -> dict[str, Any] | None:
    """Options of a task for work of one process; None where this process does it. Raises ConfigError."""
    import torch

    # A head in slices needs as many GPUs as Ray knows to be free, and this process's own is not counted.
    divided = cluster.config.finetune.chain is not None
    # What runs now needs none of their models, and perhaps their memory.
    cluster.pool.release()
    if device == "cpu" or (torch.cuda.is_available() and not divided):
        return None
    cluster.connect()
    _, need = cluster.place("evaluate", None, 1, device)
    options = {key: value for key, value in need.options().items() if value is not None}
    # The places of a dead one's chain go with the driver's job: another try would wait for them.
    return {**options, "max_retries": 0} if divided else options


def in_one_process(cluster: Cluster, device: str) -> Executor:
    """Does batches one after another, here when this machine has the device, else in a task of the cluster that has it."""
    near = batches_near(cluster, device)

    def execute(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        if batches:
            yield from near(work.name, serial, work, list(batches))

    return execute


def _task(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(*arguments, progress=Silence())
