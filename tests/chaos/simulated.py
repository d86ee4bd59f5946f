"""A cluster of several nodes on this machine, closed by a token, whose workers and nodes can be killed."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.bucket import CREDENTIALS

_DROPPED = ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "ROMA_RAY_STORAGE", "MLFLOW_TRACKING_URI")
PATIENCE = 400


def quiet_environment(folder: Path, token: str) -> dict[str, str]:
    """What every process of a simulated cluster runs with; `folder` has a short name, for the paths of sockets."""
    repository = Path(__file__).parents[2]
    path = os.pathsep.join([str(repository), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "HOME": str(folder),
        "ROMA_RAY_SCRATCH": str(folder / "scratch"),
        "ROMA_RAY_LEASE_SECONDS": "10",
        **CREDENTIALS,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
    }
    return {k: v for k, v in os.environ.items() if k not in _DROPPED} | settings


class Nodes:
    """A head without CPUs and worker nodes."""

    def __init__(self, cluster: Any, environment: dict[str, str]) -> None:
        self.cluster, self.environment = cluster, environment
        self.workers: list[Any] = []

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, **arguments: Any) -> Any:
        """Start another node and wait until the cluster has it."""
        settings = {"num_cpus": 4, "object_store_memory": 100 << 20, "include_dashboard": False} | arguments
        node = self.cluster.add_node(**settings)
        self.workers.append(node)
        return node

    def remove(self, node: Any) -> None:
        """Take a node away as a power cut does: its raylet and all its workers are gone at once."""
        self.workers.remove(node)
        doomed = [process.pid for process in self._below(node)]
        self.cluster.remove_node(node, allow_graceful=False)
        for pid in doomed:
            _kill(pid)

    def processes(self, title: str) -> list[tuple[Any, int]]:
        """The (node, pid) of worker processes in whose title the text stands."""
        found = []
        for node in self.workers:
            for process in self._below(node):
                try:
                    name = " ".join(process.cmdline())
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
                if name.startswith("ray::") and title in name:
                    found.append((node, process.pid))
        return found

    def _below(self, node: Any) -> list[psutil.Process]:
        below: list[psutil.Process] = []
        for infos in node.all_processes.values():
            for info in infos:
                try:
                    below += psutil.Process(info.process.pid).children(recursive=True)
                except psutil.NoSuchProcess:
                    continue
        return below


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def simulated_cluster(folder: Path, **head: Any) -> Iterator[Nodes]:
    """The cluster, for as long as the block runs. This process must not use another one."""
    environment = quiet_environment(folder, secrets.token_hex(32))
    os.environ.clear()
    os.environ.update(environment)
    from ray.cluster_utils import Cluster

    settings = {"num_cpus": 0, "object_store_memory": 100 << 20, "include_dashboard": False} | head
    cluster = Cluster(initialize_head=True, head_node_args=settings)
    nodes = Nodes(cluster, environment)
    try:
        yield nodes
    finally:
        cluster.shutdown()


class Driver:
    """A `roma-ray` process of its own."""

    def __init__(self, words: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        with open(log, "wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "roma_ray", *words],
                env=dict(environment),
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until(self, ready: Callable[[], Any]) -> Any:
        """What `ready` gives as soon as that is something; fails when the driver ends before."""
        limit = time.monotonic() + PATIENCE
        while not (found := ready()):
            assert self.process.poll() is None, f"the driver ended before the fault:\n{self.said[-3000:]}"
            assert time.monotonic() < limit, self.said[-3000:]
            time.sleep(0.005)
        return found

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def end(self, code: int = 0) -> None:
        """Wait for the end; the exit code must be this one."""
        try:
            got = self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end after {PATIENCE} s:\n{self.said[-3000:]}") from None
        assert got == code, f"exit code {got} instead of {code}:\n{self.said[-3000:]}"
