"""Faults of a storage in a bucket: the network's, the cloud's, and those of workers, nodes and drivers that use it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from roma_ray.store.artifacts import Stage
from tests.bucket import Request, every
from tests.chaos.scene import Scene, names_up_to
from tests.chaos.simulated import PATIENCE, Driver

# Longer than a lease: what a killed driver held is free by then.
_EXPIRED_SECONDS = 11.5
_MOMENTS = 20

STORMS = {
    "slow": every("slow", 7),
    "reset": every("reset", 7, lambda request: request.method == "PUT"),
    "cut": every("cut", 7, lambda request: request.method == "GET"),
    "lost": every("lost", 7, lambda request: request.method == "PUT"),
    "stale": lambda request: "stale" if request.lists else None,
}


def far(fault: Callable[[Scene], None]) -> Callable[[Scene], None]:
    """The fault where the storage is a bucket."""
    return lambda scene: fault(scene.far)


def storm(what: str, scene: Scene) -> None:
    """A whole run on the cluster through a network, or a cloud, that does this now and then."""
    scene = scene.far
    assert scene.proxy is not None
    storage = scene.storage()
    scene.proxy.rule = STORMS[what]
    scene.start(storage, "evaluate").end()
    assert scene.proxy.told, "nothing happened"
    scene.proxy.reset()
    if what == "stale":
        # A manifest may lack a file that a late list did not show; none that it names is another.
        for name in names_up_to("evaluate"):
            expected = scene.reference.stages[name]
            files = Stage(scene.place(storage, name), name, expected.identity).manifest()["files"]
            known = expected.manifest()["files"]
            assert all(known[file] == fact for file, fact in files.items() if file != "config.yaml")
    else:
        scene.same(storage, "evaluate")


def refused(what: str, stage: str, scene: Scene) -> None:
    """Credentials that end in a stage: one error, and the same command goes on with new ones."""
    scene = scene.far
    assert scene.proxy is not None
    storage, seen = scene.storage(stage), []

    def later(request: Request) -> str | None:
        seen.append(f"/{stage}/" in request.key and "/." not in request.key)
        return what if sum(seen) > 4 else None

    scene.proxy.rule = later
    driver = scene.start(storage, stage)
    driver.end(1)
    assert "same command again" in driver.said.replace("\n", " "), driver.said
    assert "Traceback" not in driver.said, driver.said
    scene.proxy.reset()
    time.sleep(_EXPIRED_SECONDS)
    scene.start(storage, stage).end()
    scene.same(storage, stage)


def killed_at_random(scene: Scene) -> None:
    """kill -9 of a driver of its own machine at twenty random moments, each time the same command again."""
    scene = scene.far
    moments, first = random.Random(0), scene.storage()
    began = time.monotonic()
    _alone(scene, first).end()
    whole = time.monotonic() - began
    for _ in range(_MOMENTS):
        storage = scene.storage()
        driver = _alone(scene, storage)
        time.sleep(moments.uniform(0.2, 1.0) * whole)
        driver.kill()
        limit = time.monotonic() + PATIENCE
        while (again := _alone(scene, storage)).process.wait(timeout=PATIENCE):
            assert "lease expires in" in again.said, again.said
            assert time.monotonic() < limit, again.said
        scene.same(storage, "evaluate")


def _alone(scene: Scene, storage: object) -> Driver:
    """`roma-ray local` as a process."""
    words = ["local", "--config", str(scene.settings(storage))]  # type: ignore[arg-type]
    return Driver(words, scene.nodes.environment, scene.folder / f"local-{time.monotonic_ns()}.log")
