"""The finetune stage on Ray Train: the loop of engine/training.py on one or more workers, to the same bits.

No DDP: the loop gathers the micro-batches' gradient sums itself. The checkpoint is the loop's own file in the stage's folder,
written by the first worker, so a restarted group, or a later run, takes it up whatever Ray Train remembers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from roma_ray.cluster.chain_plans import ChainPlan, plan_chains
from roma_ray.cluster.environment import quiet_libraries
from roma_ray.cluster.failures import explain, packed, unpacked
from roma_ray.cluster.head_actors import head_over
from roma_ray.cluster.live import FILE, LiveReader, LiveWriter
from roma_ray.cluster.placement import Need
from roma_ray.cluster.ray_cluster import Cluster, on_loopback, place_of_runs
from roma_ray.cluster.starting import Starting
from roma_ray.cluster.worth import share_of, trained_here
from roma_ray.engine.checkpoint import checkpoint_step
from roma_ray.engine.devices import device_kind
from roma_ray.engine.model_spec import set_threads
from roma_ray.engine.runners import Trainer
from roma_ray.errors import RomaError
from roma_ray.moe.head_chain import Chain
from roma_ray.moe.slices import Slice
from roma_ray.stages.finetuning import CHECKPOINT, EPOCHS, TrainJob
from roma_ray.store.artifacts import Stage, note_device, note_start
from roma_ray.store.files import exists, for_libraries, read_bytes, remove, remove_folder, write_bytes
from roma_ray.store.logs import whole_lines
from roma_ray.store.scratch import scratch_folder

RUNS = ".train"
_POLL_SECONDS = 0.2
# Of a run's micro-batches: a worker takes longer to start than a small model to do so many.
_MICRO_BATCHES_OF_A_WORKER = 50


def finetune_on_ray(cluster: Cluster, device: str) -> Trainer:
    """A trainer that runs the job's workers on the cluster. It raises RomaError."""

    def train(job: TrainJob, report: Callable[[dict[str, Any]], None], advance: Callable[[int, str], None]) -> None:
        folder, token = job.stage.path, uuid.uuid4().hex[:12]
        if not exists(folder / CHECKPOINT):
            remove(folder / FILE)
        live = LiveReader(folder, token, report, advance)
        done, questions = questions_before(job), questions_of(job) * job.settings.epochs
        ended, left = trained_here(cluster, job, device, live.tell, advance, done=done, questions=questions)
        if not ended:
            _on_workers(cluster, job, device, live, left)
        for line in whole_lines(folder / EPOCHS)[0]:
            live.tell(json.loads(line))
        remove(folder / FILE)

    return train


def _on_workers(cluster: Cluster, job: TrainJob, device: str, live: LiveReader, left: float | None) -> None:
    """Train on workers; `left` seconds are left for one process, where that was measured. Raises RomaError."""
    cluster.connect()
    began, wanted = time.monotonic(), cluster.config.ray.finetune_workers
    at_most, slices = most_workers(job, wanted, left), job.settings.chain
    plan = None
    if slices is None:
        workers, need = cluster.place("finetune", wanted, at_most, device)
    else:
        plan = plan_chains(cluster, "finetune", job.model, slices, None, at_most, device, first=job.setup.cut)
        # Each training worker holds the last slice of a chain of its own.
        workers, need = plan.copies, plan.needs[-1]
    folder = job.stage.path
    cluster.say(f"finetune: {f'{workers} worker(s)' if plan is None else plan}, {device}")
    failures = _follow(lambda: _fit(cluster, job, workers, live.token, need, plan), live, folder, cluster.say)
    if live.up is not None:
        note_start(folder, {"workers": live.up - began})
    remove_folder(place_of_runs(folder) / RUNS)
    if failures:
        raise unpacked(failures, "finetune", folder)
    if live.first is not None:
        seconds = time.monotonic() - began
        # At most: workers also wait for one another.
        busy = workers * (time.monotonic() - live.first)
        cluster.compare("finetune", seconds, live.first - began, busy)


def most_workers(job: TrainJob, wanted: int | None, left: float | None) -> int:
    """How many workers have something to do: as many as a step has micro-batches, and each more than to start."""
    micro = math.ceil(job.settings.batch_size / job.settings.micro_batch_size)
    if wanted is not None:
        return micro
    steps = math.ceil(questions_of(job) / job.settings.batch_size) * job.settings.epochs
    return max(1, min(micro, share_of(left) or steps * micro // _MICRO_BATCHES_OF_A_WORKER))


def _follow(fit: Callable[[], Any], live: LiveReader, folder: Path, say: Callable[[str], None]) -> Any:
    """Run `fit` in a thread and pass progress on until it ends; its value. Raises RomaError for what it raises."""
    outcome: list[Any] = []
    failed: list[BaseException] = []

    def target() -> None:
        try:
            outcome.append(fit())
        except BaseException as error:  # noqa: BLE001 - crosses to the driver's thread, which raises it
            failed.append(error)

    thread = threading.Thread(target=target, name="ray-train", daemon=True)
    thread.start()
    with Starting("finetune", lambda: live.stands, say) as starting:
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            live.poll()
            if live.first is not None:
                starting.over()
    live.poll()
    if failed:
        if isinstance(failed[0], RomaError):
            raise failed[0]
        raise explain(failed[0], "finetune", folder) from None
    return outcome[0]


def _fit(
    cluster: Cluster, job: TrainJob, workers: int, token: str, need: Need, plan: ChainPlan | None
) -> list[dict[str, str]] | None:
    """Train on the cluster; the workers' expected failures, where there were any."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from roma_ray.cluster.rendezvous import OneMachine

    settings = cluster.config.ray
    result = TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "token": token, "plan": plan},
        torch_config=OneMachine() if on_loopback() else None,
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=need.gpus > 0,
            # The kind of GPU is one of these resources; Train's own `accelerator_type` would be the same.
            resources_per_worker=need.resources(),
            label_selector=dict(need.labels) or None,
            placement_strategy="PACK",
        ),
        run_config=RunConfig(
            # A fresh name each time: the job resumes from its own checkpoint, not from Ray Train's state.
            name=f"finetune-{job.stage.path.name}-{token}",
            storage_path=for_libraries(place_of_runs(job.stage.path) / RUNS),
            # Bounds deaths during training, and before it, where Ray Train by itself would try without end.
            failure_config=FailureConfig(
                max_failures=settings.max_failures, controller_failure_limit=settings.max_failures
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    ).fit()
    failures: list[dict[str, str]] | None = result.return_value
    return failures


def train_worker(settings: dict[str, Any]) -> list[dict[str, str]] | None:
    """What each worker runs: the job, with its progress written for the driver. Returns expected failures."""
    import ray.train
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    from roma_ray.cluster.world import PeerFailed, TorchWorld

    quiet_libraries()
    job: TrainJob = settings["job"]
    if get_context().get_world_rank() == 0:
        LiveWriter.note_up(job.folder, settings["token"])
    set_threads(job.model.threads)
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    note_device(job.folder, device_kind(device.type))
    world = TorchWorld(device)
    first = world.rank == 0
    failure: dict[str, str] | None = None
    with scratch_folder() as scratch:
        try:
            mine = share_checkpoint(job, world, scratch)
            live = LiveWriter(job.folder, settings["token"], questions_before(job)) if first else None

            def report(record: dict[str, Any]) -> None:
                if live:
                    live.epoch(record)
                # `ray.train.report` waits for all workers, so none may call it after another has failed.
                world.agree()
                ray.train.report(record)

            with _head(job, settings["plan"]) as head:
                mine.run(world, report, live.advance if live else lambda count, note: None, head)
            world.agree()
            return None
        except PeerFailed:
            pass
        except RomaError as error:
            # Expected failures are returned: raising one would restart the workers, which would fail in the same way.
            failure = packed(error)
            world.fail()
    return [found for found in world.collect(failure) if found]


def _head(job: TrainJob, plan: ChainPlan | None) -> AbstractContextManager[Slice | Chain | None]:
    """The head in slices where that is planned; None leaves it to the job to load it whole."""
    if plan is None:
        return nullcontext()
    return head_over(plan, job.model, job.setup.config, name="finetune", folder=job.folder)


def share_checkpoint(job: TrainJob, world: Any, scratch: Path) -> TrainJob:
    """The job with the first worker's checkpoint in sight: file systems may show another worker an older state of it."""
    path = job.stage.path / CHECKPOINT
    content: bytes | None = world.from_first(read_bytes(path) if world.rank == 0 and exists(path) else None)
    if world.rank == 0:
        return job
    if content is not None:
        write_bytes(scratch / CHECKPOINT, content)
    return dataclasses.replace(job, stage=Stage(scratch, job.name, {}))


def questions_of(job: TrainJob) -> int:
    """Questions of an epoch."""
    return int(job.stages["neighbors"].manifest()["facts"]["training"])


def questions_before(job: TrainJob) -> int:
    """Questions that the checkpoint's steps have trained on; 0 without one."""
    step = checkpoint_step(job.stage.path / CHECKPOINT)
    rows = questions_of(job)
    epochs, steps = divmod(step, math.ceil(rows / job.settings.batch_size))
    return epochs * rows + min(rows, steps * job.settings.batch_size)
