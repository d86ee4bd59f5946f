"""The faults, each against the undisturbed run's files; this file holds those of workers, nodes and drivers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from tests.chaos.benchmarks import in_benchmarks
from tests.chaos.buckets import STORMS, far, killed_at_random, refused, storm
from tests.chaos.memory import FILLED, killed_for_memory
from tests.chaos.scene import BEGUN, Scene
from tests.chaos.simulated import PATIENCE
from tests.chaos.storage import artifacts_damaged, storage_full, storage_read_only
from tests.chaos.sweeps import in_a_trial, sweep_driver_killed
from tests.chaos.tracking import tracking_server_gone

# The titles of a stage's workers.
TITLES = {"extract": "BatchWorker", "embed": "BatchWorker", "finetune": "RayTrainWorker", "evaluate": "BatchWorker"}
# Of chains of slices: the section that asks for them, and the titles of their actors.
CHAINS = {"extract": ("extraction", "SliceActor"), "finetune": ("finetune", "HeadActor")}
CHAINED = ("worker killed", "node removed", "driver killed")


def worker_killed(stage: str, scene: Scene) -> None:
    """kill -9 of one worker in the middle of a stage."""
    storage = scene.storage(stage)
    driver = scene.start(storage, stage)
    driver.wait_until(scene.begun(storage, stage))
    _, victim = driver.wait_until(lambda: scene.nodes.processes(TITLES[stage]))[0]
    os.kill(victim, 9)
    driver.end()
    scene.same(storage, stage)


def node_removed(stage: str, scene: Scene) -> None:
    """A node with workers of the stage goes away; another takes its place."""
    storage = scene.storage(stage)
    driver = scene.start(storage, stage)
    driver.wait_until(scene.begun(storage, stage))
    victim, _ = driver.wait_until(lambda: scene.nodes.processes(TITLES[stage]))[0]
    scene.nodes.remove(victim)
    scene.nodes.add()
    driver.end()
    scene.same(storage, stage)


def outlive_the_lease(scene: Scene) -> None:
    """In a bucket a dead driver's stage is refused until its lease has expired."""
    if scene.root is not None:
        time.sleep(float(scene.nodes.environment["ROMA_RAY_LEASE_SECONDS"]))


def driver_killed(stage: str, scene: Scene) -> None:
    """kill -9 of the driver in a stage, and the same command again."""
    storage = scene.storage(stage)
    first = scene.start(storage, stage)
    first.wait_until(scene.begun(storage, stage))
    first.kill()
    outlive_the_lease(scene)
    scene.start(storage, stage).end()
    scene.same(storage, stage)


def in_a_chain(stage: str, what: str, scene: Scene) -> None:
    """A slice's actor is killed, its node removed, or the driver killed, while two chains of two slices work."""
    section, title = CHAINS[stage]
    divided = getattr(scene.config, section).model_copy(update={"chain": 2})
    ray = scene.config.ray.model_copy(update={f"{stage}_workers": 4})
    storage = scene.storage(stage)
    scene = replace(scene, config=scene.config.model_copy(update={section: divided, "ray": ray}))
    driver = scene.start(storage, stage)
    driver.wait_until(scene.begun(storage, stage))
    if what == "driver killed":
        driver.kill()
        outlive_the_lease(scene)
        driver = scene.start(storage, stage)
    else:
        node, pid = driver.wait_until(lambda: scene.nodes.processes(title))[0]
        if what == "worker killed":
            os.kill(pid, 9)
        else:
            scene.nodes.remove(node)
            scene.nodes.add()
    driver.end()
    scene.same(storage, stage)


def two_drivers(scene: Scene) -> None:
    """Two drivers on one run: one refuses and names the other, which ends as if alone."""
    storage = scene.storage()
    drivers = [scene.start(storage, "extract") for _ in range(2)]
    codes = [driver.process.wait(timeout=PATIENCE) for driver in drivers]
    assert sorted(codes) == [0, 1], "\n".join(driver.said for driver in drivers)
    winner, refused = drivers[codes.index(0)], drivers[codes.index(1)]
    assert f"pid {winner.process.pid}" in refused.said, refused.said
    scene.same(storage, "extract")


@dataclass(frozen=True)
class Fault:
    """One line of the table."""

    name: str
    run: Callable[[Scene], None]


FAULTS = (
    *(Fault(f"worker killed in {stage}", partial(worker_killed, stage)) for stage in TITLES),
    Fault("worker killed in evaluate --tasks", partial(in_benchmarks, "worker killed")),
    *(Fault(f"{what} in a chain", partial(in_a_chain, "extract", what)) for what in CHAINED),
    *(Fault(f"{what} in a chain that trains", partial(in_a_chain, "finetune", what)) for what in CHAINED),
    *(Fault(f"node removed in {stage}", partial(node_removed, stage)) for stage in TITLES),
    Fault("node removed in evaluate --tasks", partial(in_benchmarks, "node removed")),
    *(Fault(f"driver killed in {stage}", partial(driver_killed, stage)) for stage in BEGUN),
    Fault("driver killed in evaluate --tasks", partial(in_benchmarks, "driver killed")),
    *(
        Fault(f"{what} in a trial", partial(in_a_trial, what))
        for what in ("worker killed", "node removed", "driver killed")
    ),
    *(Fault(f"worker killed for memory in {stage}", partial(killed_for_memory, stage)) for stage in FILLED),
    Fault("sweep's driver killed", sweep_driver_killed),
    Fault("storage full", storage_full),
    Fault("storage read-only", storage_read_only),
    Fault("MLflow server gone a minute", tracking_server_gone),
    *(Fault(f"artifacts {how}", partial(artifacts_damaged, how)) for how in ("corrupted", "truncated")),
    Fault("two drivers on one run", two_drivers),
    *(Fault(f"worker killed in {stage}, bucket", far(partial(worker_killed, stage))) for stage in TITLES),
    *(Fault(f"node removed in {stage}, bucket", far(partial(node_removed, stage))) for stage in TITLES),
    *(Fault(f"driver killed in {stage}, bucket", far(partial(driver_killed, stage))) for stage in BEGUN),
    *(Fault(f"{what} in a chain, bucket", far(partial(in_a_chain, "extract", what))) for what in CHAINED),
    Fault("two drivers on one run, bucket", far(two_drivers)),
    *(Fault(f"bucket: {what}", partial(storm, what)) for what in STORMS),
    *(Fault(f"bucket: forbidden in {stage}", partial(refused, "forbidden", stage)) for stage in BEGUN),
    Fault("bucket: credentials expired in extract", partial(refused, "expired", "extract")),
    Fault("bucket: driver killed at random", killed_at_random),
)
