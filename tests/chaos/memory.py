"""Faults of memory: Ray's own monitor ends a worker because its machine is nearly full."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

from tests.chaos.scene import Scene
from tests.chaos.simulated import PATIENCE, Driver

# What a driver, Ray and its workers may take beside what is in use when they start, and what this process allocates at most.
_OWN, _HOARD, _STEP = 7 << 29, 2 << 30, 64 << 20
FILLED = {"extract": "BatchWorker", "embed": "BatchWorker", "finetune": "RayTrainWorker", "a trial": "ImplicitFunc"}


def killed_for_memory(stage: str, scene: Scene) -> None:
    """The machine fills up while a stage's workers, or a trial's, are at work; once one is killed there is room again."""
    name = "finetune" if stage == "a trial" else stage
    storage = scene.storage(name)
    driver = _tune(scene, storage) if stage == "a trial" else _run(scene, storage, stage)
    driver.wait_until(scene.begun(storage, name))
    fill_until_one_is_killed(driver, FILLED[stage])
    driver.end()
    # Nothing but the monitor's own record tells such a death from a worker's end.
    session = next((Path(scene.nodes.environment["RAY_TMPDIR"]) / "ray").glob(f"session_*_{driver.process.pid}"))
    assert FILLED[stage] in killed_by_the_monitor(session), "the monitor has killed no worker of this stage"
    scene.same(storage, name)


def killed_by_the_monitor(session: Path) -> str:
    """The names of the tasks whose workers the memory monitor has ended in a session of Ray's, one a line."""
    events = session / "logs" / "events" / "event_RAYLET.log"
    chosen = events.read_text(errors="replace").split("Selected to kill")[1:] if events.exists() else []
    found = [re.search("task name=([^,]*)", part) for part in chosen]
    return "\n".join(match[1] for match in found if match)


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


def fill_until_one_is_killed(driver: Driver, title: str) -> None:
    """Allocate, at most two GiB, until a worker is gone; then give it back. Workers stand still meanwhile, so that none ends."""
    held = driver.wait_until(lambda: _pids(driver, title))
    _signal(held, signal.SIGSTOP)
    hoard: list[bytes] = []
    limit = time.monotonic() + PATIENCE / 4
    try:
        while held <= _pids(driver, title):
            assert driver.process.poll() is None, f"the driver ended before the fault:\n{driver.said[-3000:]}"
            assert time.monotonic() < limit, "no worker was killed: more memory is free than this may fill"
            if len(hoard) * _STEP < _HOARD:
                hoard.append(b"\1" * _STEP)
            time.sleep(0.02)
    finally:
        hoard.clear()
        _signal(held, signal.SIGCONT)


def _signal(pids: set[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
