"""The tracking server goes away and comes back."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.chaos.scene import Scene
from tests.chaos.simulated import Driver

SERVER_SECONDS = 60


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
