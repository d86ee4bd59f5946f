"""The faults, each against the undisturbed run's files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from roma_ray.artifacts import MANIFEST, Stage
from roma_ray.config import Config
from roma_ray.errors import ArtifactError
from roma_ray.pipeline import STAGES, Run
from tests.chaos.simulated import PATIENCE, Driver, Nodes

# What is there as soon as a stage has begun to do what a fault may interrupt, and its workers' titles.
BEGUN = {
    "extract": "batches/*.parquet",
    "embed": "batches/*.parquet",
    "finetune": "checkpoint.safetensors",
    "evaluate": ".lock",
}
TITLES = {"extract": "MapWorker", "embed": "MapWorker", "finetune": "RayTrainWorker"}
SERVER_SECONDS = 60


@dataclass
class Scene:
    """What faults happen to: a cluster, a configuration and its undisturbed run."""

    nodes: Nodes
    config: Config
    reference: Run
    folder: Path
    count: int = 0
    notes: list[str] = field(default_factory=list)

    def storage(self, until: str | None = None) -> Path:
        """A fresh storage; with the undisturbed run's stages before `until` in it, to save their time."""
        self.count += 1
        storage = self.folder / f"storage-{self.count}"
        for name in STAGES[: STAGES.index(until)] if until else ():
            stage = self.reference.stages[name]
            shutil.copytree(stage.path, storage / name / stage.fingerprint)
        return storage

    def place(self, storage: Path, stage: str) -> Path:
        """Where a stage lies in a storage."""
        return storage / stage / self.reference.stages[stage].fingerprint

    def begun(self, storage: Path, stage: str) -> Callable[[], bool]:
        """Whether a stage is at work; it fails when the stage is over before the fault could happen."""
        folder = self.place(storage, stage)

        def ready() -> bool:
            assert not (folder / MANIFEST).exists(), f"{stage} was over before the fault"
            return any(folder.glob(BEGUN[stage]))

        return ready

    def start(self, storage: Path, until: str, *words: str, uri: str | None = None) -> Driver:
        """A driver that runs up to a stage on the cluster (or the whole method as `local`); tracked where there is a server."""
        tracking = self.config.tracking.model_copy(
            update={"enabled": uri is not None, "uri": uri, "system_metrics": False}
        )
        config = self.config.model_copy(update={"storage": str(storage), "tracking": tracking})
        file = self.folder / f"config-{storage.name}.yaml"
        file.write_text(config.to_yaml())
        where = ["local"] if until == "local" else [until, "--address", self.nodes.address]
        self.count += 1
        log = self.folder / f"driver-{self.count}.log"
        return Driver([*where, "--config", str(file), *words], self.nodes.environment, log)

    def same(self, storage: Path, until: str) -> None:
        """Every file of the undisturbed run up to a stage is here to the bit, so its rows once each, and no other file."""
        for name in STAGES[: STAGES.index(until) + 1]:
            expected = self.reference.stages[name]
            got = Stage(self.place(storage, name), name, expected.identity)
            got.verify()
            files, known = got.manifest()["files"], expected.manifest()["files"]
            differing = sorted(f for f in {*files, *known} if files.get(f) != known.get(f) and f != "config.yaml")
            assert not differing, f"{name}: {differing[:3]} differ"


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


def driver_killed(stage: str, scene: Scene) -> None:
    """kill -9 of the driver in a stage, and the same command again."""
    storage = scene.storage(stage)
    first = scene.start(storage, stage)
    first.wait_until(scene.begun(storage, stage))
    first.kill()
    scene.start(storage, stage).end()
    scene.same(storage, stage)


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


@contextmanager
def small_disk(scene: Scene, size: str) -> Iterator[Path]:
    """A file system in memory (needs the right to mount); its options can be changed by `remount`."""
    scene.count += 1
    place = scene.folder / f"disk-{scene.count}"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def storage_full(scene: Scene) -> None:
    """No room left in extraction: a message and exit code 1; with room again the same command goes on."""
    with small_disk(scene, "64m") as place:
        storage, ballast = place / "s", place / "ballast"
        driver = scene.start(storage, "extract")
        driver.wait_until(scene.begun(storage, "extract"))
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))
        driver.end(1)
        assert "No space left on device" in driver.said
        assert "finished work is kept" in driver.said
        assert "Traceback (most recent" not in driver.said
        ballast.unlink()
        scene.start(storage, "extract").end()
        scene.same(storage, "extract")


def storage_read_only(scene: Scene) -> None:
    """The storage turns read-only in extraction: a message and exit code 1; writable again, the same command goes on."""
    with small_disk(scene, "64m") as place:
        storage = place / "s"
        driver = scene.start(storage, "extract")
        driver.wait_until(scene.begun(storage, "extract"))
        # A second, read-only mount over the first, which the driver's open lock keeps from changing itself.
        subprocess.run(["mount", "--bind", str(place), str(place)], check=True)
        remount(place, "bind,ro")
        driver.end(1)
        assert "Read-only file system" in driver.said
        assert "Traceback (most recent" not in driver.said
        again = scene.start(storage, "extract")
        again.end(1)
        assert "Read-only file system" in again.said
        subprocess.run(["umount", "--lazy", str(place)], check=True)
        scene.start(storage, "extract").end()
        scene.same(storage, "extract")


def _touch_up(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


def artifacts_damaged(how: str, scene: Scene) -> None:
    """One bit, or half, of a stage's largest file, or of its manifest: refused by name; recomputed once it is removed."""
    storage = scene.storage()
    for name, stage in scene.reference.stages.items():
        shutil.copytree(stage.path, storage / name / stage.fingerprint)
    for name, stage in scene.reference.stages.items():
        folder, files = scene.place(storage, name), stage.manifest()["files"]
        for victim in (MANIFEST, max(files, key=lambda f: (files[f]["bytes"], f))):
            good = (folder / victim).read_bytes()
            _touch_up(folder / victim, how)
            with contextlib.suppress(ArtifactError):
                Stage(folder, name, stage.identity).verify()
                raise AssertionError(f"{folder / victim} was believed")
            if victim != MANIFEST and name in ("extract", "finetune"):
                refused = scene.start(storage, "local")
                refused.end(1)
                assert str(folder / victim) in refused.said, refused.said
                shutil.rmtree(folder)
                scene.start(storage, "local").end()
            else:
                (folder / victim).write_bytes(good)
    scene.same(storage, "evaluate")


def two_drivers(scene: Scene) -> None:
    """Two drivers on one run: one refuses and names the other, which ends as if alone."""
    storage = scene.storage()
    drivers = [scene.start(storage, "extract") for _ in range(2)]
    codes = [driver.process.wait(timeout=PATIENCE) for driver in drivers]
    assert sorted(codes) == [0, 1], "\n".join(driver.said for driver in drivers)
    winner, refused = drivers[codes.index(0)], drivers[codes.index(1)]
    assert f"pid {winner.process.pid}" in refused.said, refused.said
    scene.same(storage, "extract")


@contextmanager
def server(scene: Scene, port: int, folder: Path) -> Iterator[Callable[[], None]]:
    """An MLflow server; the value starts it (again) and is to be called before the end of the block if it was stopped."""
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    environment = {**scene.nodes.environment, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    running: list[subprocess.Popen[bytes]] = []

    def stop() -> None:
        while running:
            process = running.pop()
            os.killpg(process.pid, 9)
            process.wait()

    def start() -> None:
        stop()
        with open(folder / "server.log", "ab") as log:
            running.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=folder)
            )
        limit = time.monotonic() + 120
        while not _answers(port):
            assert time.monotonic() < limit, "the MLflow server does not start"
            time.sleep(0.2)

    start.stop = stop  # type: ignore[attr-defined]
    start()
    try:
        yield start
    finally:
        stop()


def _answers(port: int) -> bool:
    from urllib.error import URLError
    from urllib.request import urlopen

    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def tracking_server_gone(scene: Scene) -> None:
    """The MLflow server is gone for a minute: nothing stops, and afterwards it holds what an undisturbed run leaves, once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = scene.folder / "mlflow"
    folder.mkdir()
    uri = f"http://127.0.0.1:{port}"
    with server(scene, port, folder) as again:
        calm = scene.storage("finetune")
        scene.start(calm, "finetune", uri=uri).end()
        expected = _recorded(uri, 1)
        disturbed = scene.storage("finetune")
        driver = scene.start(disturbed, "finetune", "--set", "tracking.experiment=disturbed", uri=uri)
        driver.wait_until(scene.begun(disturbed, "finetune"))
        again.stop()  # type: ignore[attr-defined]
        gone = time.monotonic()
        driver.end()
        scene.same(disturbed, "finetune")
        time.sleep(max(0.0, SERVER_SECONDS - (time.monotonic() - gone)))
        again()
        file = scene.folder / f"config-{disturbed.name}.yaml"
        words = ["track", "--config", str(file), "--set", "tracking.experiment=disturbed"]
        Driver(words, scene.nodes.environment, scene.folder / "track.log").end()
        assert _recorded(uri, 1, "disturbed") == expected


def _recorded(uri: str, parents: int, experiment: str = "roma-ray") -> dict[str, Any]:
    """By run name: status, and every metric's values by step; exactly so many parent runs."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    runs = client.search_runs([found.experiment_id], max_results=1000)
    assert sum("mlflow.parentRunId" not in run.data.tags for run in runs) == parents
    assert len({run.info.run_name for run in runs}) == len(runs), "a run is there twice"
    record = {}
    for run in runs:
        metrics = {
            key: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, key))
            for key in run.data.metrics
            if not any(word in key for word in ("second", "wall", "memory", "per_s"))
        }
        record[run.info.run_name] = (run.info.status, metrics)
    return record


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
    assert [trial["state"] for trial in trials] == [trials[0]["state"]] * 3
    assert len({trial["name"] for trial in trials}) == 3
    assert len(list((storage / "finetune").glob(f"*/{MANIFEST}"))) == 3
    scene.same(storage, "finetune")


@dataclass(frozen=True)
class Fault:
    """One line of the table."""

    name: str
    run: Callable[[Scene], None]


FAULTS = (
    *(Fault(f"worker killed in {stage}", partial(worker_killed, stage)) for stage in TITLES),
    *(Fault(f"node removed in {stage}", partial(node_removed, stage)) for stage in TITLES),
    *(Fault(f"driver killed in {stage}", partial(driver_killed, stage)) for stage in BEGUN),
    *(
        Fault(f"{what} in a trial", partial(in_a_trial, what))
        for what in ("worker killed", "node removed", "driver killed")
    ),
    Fault("sweep's driver killed", sweep_driver_killed),
    Fault("storage full", storage_full),
    Fault("storage read-only", storage_read_only),
    Fault("MLflow server gone a minute", tracking_server_gone),
    *(Fault(f"artifacts {how}", partial(artifacts_damaged, how)) for how in ("corrupted", "truncated")),
    Fault("two drivers on one run", two_drivers),
)
