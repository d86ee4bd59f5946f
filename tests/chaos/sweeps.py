"""Faults in a sweep: its driver, its trials, their nodes."""

from __future__ import annotations

import json
import os

import yaml

from roma_ray.store.artifacts import MANIFEST
from tests.chaos.scene import Scene
from tests.chaos.simulated import Driver


def sweep_driver_killed(scene: Scene) -> None:
    """kill -9 of `roma-ray tune` in a trial's training; the same command goes on, with several workers a trial."""
    storage = scene.storage("finetune")
    base = scene.config.model_copy(update={"storage": str(storage)}).model_dump(mode="json")
    file = scene.folder / f"space-{storage.name}.yaml"
    one = {"epochs": {"setting": "finetune.epochs", "values": [1]}}
    file.write_text(yaml.safe_dump({"base": base, "one_at_a_time": one, "max_concurrent": 1}))
    words = ["tune", "--space", str(file), "--address", scene.nodes.address, "--set", "tracking.enabled=false"]
    log = scene.folder / f"sweep-{storage.name}.log"
    first = Driver([*words, "--set", "ray.finetune_workers=1"], scene.nodes.environment, log)
    first.wait_until(scene.begun(storage, "finetune"))
    first.kill()
    before = {path: path.stat().st_mtime_ns for path in storage.glob(f"*/*/{MANIFEST}")}
    Driver(words, scene.nodes.environment, log).end()
    assert all(path.stat().st_mtime_ns == when for path, when in before.items()), "a finished stage was done again"
    assert len(list((storage / "evaluate").glob(f"*/{MANIFEST}"))) == 2
    scene.same(storage, "finetune")


def in_a_trial(what: str, scene: Scene) -> None:
    """A worker, its node or the driver goes in a trial of a sweep: the same trials, once each, with a single run's bits."""
    storage = scene.storage("finetune")
    tracking = scene.config.tracking.model_copy(update={"enabled": False})
    base = scene.config.model_copy(update={"storage": str(storage), "tracking": tracking}).model_dump(mode="json")
    base["ray"]["finetune_workers"] = None
    rates = {"setting": "finetune.learning_rate", "values": [0.005, 0.02]}
    space, summary = scene.folder / f"space-{storage.name}.yaml", scene.folder / f"sweep-{storage.name}.json"
    space.write_text(yaml.safe_dump({"name": "chaos", "base": base, "one_at_a_time": {"rate": rates}}))
    words = ["tune", "--space", str(space), "--address", scene.nodes.address, "--summary", str(summary)]

    def start() -> Driver:
        scene.count += 1
        return Driver(words, scene.nodes.environment, scene.folder / f"driver-{scene.count}.log")

    driver = start()
    driver.wait_until(lambda: any((storage / "finetune").glob("*/checkpoint.safetensors")))
    node, worker = driver.wait_until(lambda: scene.nodes.processes("ImplicitFunc"))[0]
    if what == "driver killed":
        driver.kill()
        driver = start()
    elif what == "node removed":
        scene.nodes.remove(node)
        scene.nodes.add()
    else:
        os.kill(worker, 9)
    driver.end()
    trials = json.loads(summary.read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["done"] * 3
    assert len({trial["name"] for trial in trials}) == 3
    assert len(list((storage / "finetune").glob(f"*/{MANIFEST}"))) == 3
    scene.same(storage, "finetune")
