"""Faults of memory: Ray's own monitor ends a worker because its machine is nearly full."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml

from tests.chaos.scene import Scene
from tests.chaos.simulated import PATIENCE, Driver

# What a driver, Ray and three workers take at most, and what this process then allocates at most.
_OWN, _HOARD, _STEP = 4 << 30, 2 << 30, 64 << 20
FILLED = {"extract": "MapWorker", "embed": "MapWorker", "finetune": "RayTrainWorker", "a trial": "ImplicitFunc"}


def killed_for_memory(stage: str, scene: Scene) -> None:
    """The machine fills up while a stage's workers, or trials', are at work; once one is killed there is room again."""
    storage = scene.storage("finetune" if stage == "a trial" else stage)
    driver = _tune(scene, storage) if stage == "a trial" else _run(scene, storage, stage)
    name = "finetune" if stage == "a trial" else stage
    driver.wait_until(scene.begun(storage, name))
    fill_until(driver, lambda: _pids(driver, FILLED[stage]))
    driver.end()
    scene.same(storage, name)


def _settings(scene: Scene) -> dict[str, str]:
    """The environment of a driver whose own cluster ends workers a little above what is in use now."""
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + _OWN) / memory.total
    assert threshold < 0.9, "not enough memory is free to provoke this without harm"
    settings = {"RAY_memory_usage_threshold": f"{threshold:.4f}", "RAY_memory_monitor_refresh_ms": "50"}
    return {**scene.nodes.environment, **settings}


def _run(scene: Scene, storage: Path, stage: str) -> Driver:
    scene.count += 1
    words = [stage, "--address", "new", "--config", str(scene.settings(storage))]
    return Driver(words, _settings(scene), scene.folder / f"driver-{scene.count}.log")


def _tune(scene: Scene, storage: Path) -> Driver:
    scene.count += 1
    base = scene.config.model_copy(
        update={"storage": str(storage), "tracking": scene.config.tracking.model_copy(update={"enabled": False})}
    ).model_dump(mode="json")
    base["ray"]["finetune_workers"] = None
    rates = {"setting": "finetune.learning_rate", "values": [0.005]}
    space = scene.folder / f"space-{storage.name}.yaml"
    space.write_text(yaml.safe_dump({"name": "chaos", "base": base, "one_at_a_time": {"rate": rates}}))
    words = ["tune", "--space", str(space), "--address", "new"]
    return Driver(words, _settings(scene), scene.folder / f"driver-{scene.count}.log")


def _pids(driver: Driver, title: str) -> set[int]:
    """The workers of a driver's own cluster in whose title the text stands."""
    found = set()
    for process in psutil.Process(driver.process.pid).children(recursive=True):
        try:
            name = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if name.startswith("ray::") and title in name:
            found.add(process.pid)
    return found


def fill_until(driver: Driver, workers: Callable[[], set[int]]) -> None:
    """Allocate, at most two GiB, until one of the workers is gone; then give all of it back."""
    before = driver.wait_until(workers)
    hoard: list[bytes] = []
    limit = time.monotonic() + PATIENCE
    while not before - workers():
        assert driver.process.poll() is None, f"the driver ended before the fault:\n{driver.said[-3000:]}"
        assert time.monotonic() < limit, "no worker was killed"
        before |= workers()
        if len(hoard) * _STEP < _HOARD:
            hoard.append(b"\1" * _STEP)
        time.sleep(0.02)
