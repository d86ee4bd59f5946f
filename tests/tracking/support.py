"""Databases and servers of MLflow, and the browser that looks at them."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from roma_ray.engine.progress import Silence

BROWSERS = ("chromium", "chromium-headless-shell", "google-chrome")


def copied(database: Path, target: Path) -> Path:
    """A copy through SQLite: in write-ahead mode, what was written last is in a second file."""
    with contextlib.closing(sqlite3.connect(database)) as old, contextlib.closing(sqlite3.connect(target)) as new:
        old.backup(new)
    return target


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def served(port: int, folder: Path, database: Path) -> Iterator[None]:
    """A real MLflow server on the loopback interface, which answers."""
    with starting(port, folder, database) as wait:
        wait()
        yield


@contextlib.contextmanager
def starting(port: int, folder: Path, database: Path) -> Iterator[Callable[[], None]]:
    """The same while it starts, which takes seconds; the value waits until it answers."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{database}", "--artifacts-destination", str(folder / "served")]
    # Telemetry is off for all tests; job execution would start processes of its own.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "server.log", "a") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)

    def wait() -> None:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
            assert server.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.2)
        raise AssertionError((folder / "server.log").read_text())

    with ended(server):
        yield wait


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ends a process that leads a group of its own, and all of the group, after the block."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def browser() -> str | None:
    """A Chromium on this machine."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def page(url: str, folder: Path, shows: Callable[[str], bool]) -> str:
    """The document at `url` as HTML once its scripts have drawn what `shows` wants, by a headless Chromium that reaches this
    machine alone. On a busy machine the first looks may come too early."""
    program = browser()
    assert program is not None
    # The budget is the page's own time, in ms, which stands still while it waits for the server.
    command = [program, "--headless", "--dump-dom", "--virtual-time-budget=30000", f"--user-data-dir={folder}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--no-first-run", "--disable-gpu"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
    command += ["--no-sandbox"] if os.getuid() == 0 else []
    html, log = folder.with_suffix(".html"), folder.with_suffix(".log")
    for _ in range(5):
        with open(html, "w") as seen, open(log, "w") as said:
            process = subprocess.Popen([*command, url], stdout=seen, stderr=said, start_new_session=True)
        with ended(process), contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        if shows(html.read_text()):
            return html.read_text()
    raise AssertionError(f"what is looked for is not in {html.read_text()}\n{log.read_text()}")


class Said(Silence):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def about(self, text: str) -> list[str]:
        return [line for line in self.lines if text in line]


def ledger(uri: str) -> dict[str, Any]:
    """All runs of the experiment by stage, with the full history of every metric. Two of one stage are an error."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    experiment = client.get_experiment_by_name("roma-ray")
    assert experiment is not None
    runs: dict[str, Any] = {}
    for found in client.search_runs([experiment.experiment_id]):
        stage = found.data.tags["roma.stage"]
        assert stage not in runs, f"two runs of {stage}"
        history = {key: client.get_metric_history(found.info.run_id, key) for key in found.data.metrics}
        runs[stage] = (found, {key: [(m.step, m.value) for m in values] for key, values in history.items()})
    return runs
