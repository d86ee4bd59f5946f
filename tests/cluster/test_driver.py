"""The command as a user runs it: its own cluster, a killed driver, and a real head with submitted jobs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from roma_ray.config.schema import Config
from roma_ray.runs.pipeline import Run
from roma_ray.store.artifacts import MANIFEST
from tests.cluster.conftest import REPOSITORY
from tests.cluster.support import digests


def write_config(config: Config, path: Path, storage: Path) -> Path:
    """The world's configuration as a file, with a storage of its own."""
    path.write_text(config.model_copy(update={"storage": str(storage)}).to_yaml())
    return path


def same_as(run: Run, storage: Path) -> None:
    """The storage holds that run's files, to the bit."""
    for name, digest in digests(run).items():
        stage, fingerprint, file = name.split("/", 2)
        manifest = json.loads((storage / stage / fingerprint / MANIFEST).read_text())
        assert manifest["files"][file]["sha256"] == digest, name


def start(environment: dict[str, str], config: Path, log: Path, *options: str) -> subprocess.Popen[bytes]:
    """`roma-ray evaluate`, which runs all before it, in a session of its own."""
    with open(log, "wb") as stream:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "roma_ray",
                "evaluate",
                "--config",
                str(config),
                "--address",
                "new",
                *options,
            ],
            env=environment,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )


def kill_when(process: subprocess.Popen[bytes], ready: Callable[[], bool], log: Path) -> None:
    """kill -9 the driver as soon as `ready`; fails when it ends before."""
    limit = time.monotonic() + 400
    while not ready():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < limit, log.read_text()
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def times(storage: Path) -> dict[str, int]:
    """When each complete stage was finished."""
    return {str(p.relative_to(storage)): p.stat().st_mtime_ns for p in storage.glob(f"*/*/{MANIFEST}")}


def test_a_killed_driver(local_run: Run, world: Config, environment: dict[str, str], tmp_path: Path) -> None:
    """kill -9 in finetuning, then to the end: nothing complete is done again, and no bit differs."""
    storage, log = tmp_path / "storage", tmp_path / "log"
    quiet = world.model_copy(update={"tracking": world.tracking.model_copy(update={"enabled": False})})
    config = write_config(quiet, tmp_path / "config.yaml", storage)
    finetune = storage / "finetune" / local_run.stages["finetune"].fingerprint

    def begun() -> bool:
        return (finetune / "checkpoint.safetensors").exists() or (finetune / MANIFEST).exists()

    # First with workers, then without: so few questions are the driver's own work where nothing speaks of workers.
    with_workers = ("--set", "ray.extract_workers=1", "--set", "ray.finetune_workers=2")
    kill_when(start(environment, config, log, *with_workers), begun, log)
    assert "ray 2" in log.read_text()
    before = times(storage)
    assert any(name.startswith("extract/") for name in before)

    last = start(environment, config, log)
    assert last.wait(timeout=400) == 0, log.read_text()
    after = times(storage)
    assert {name: after[name] for name in before} == before
    same_as(local_run, storage)
    # Where the training ended between its checkpoint and the kill, nothing of it was left to do.
    assert any(name.startswith("finetune/") for name in before) or "epoch 1:" in log.read_text()
    assert "ray 2" not in log.read_text()

    repeated = start(environment, config, log, "--summary", str(tmp_path / "summary.json"))
    assert repeated.wait(timeout=120) == 0
    assert times(storage) == after
    # Nothing to do: not even a cluster is started.
    assert "ray 2" not in log.read_text()
    assert json.loads((tmp_path / "summary.json").read_text())["splits"] == local_run.summary["splits"]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def head(environment: dict[str, str], temporary: Path) -> Iterator[dict[str, str]]:
    """`ray start --head` in the repository, as its users do; the environment of a shell that submits jobs to it."""
    port, dashboard, agent, agent_grpc, metrics, client = free_ports(6)
    folder = temporary / "h"
    # As on a real cluster: whoever has no token is refused.
    settings = {**environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    settings |= {"RAY_USAGE_STATS_ENABLED": "0", "HOME": str(temporary)}
    # Nobody is served any more when it ends.
    settings["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    # Jobs run the `python` that the head finds on its PATH, and know nothing of the submitter's.
    settings.pop("PYTHONPATH")
    settings["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    log = temporary / "head.log"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=8"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--dashboard-agent-grpc-port={agent_grpc}", f"--metrics-export-port={metrics}"]
    command += [f"--ray-client-server-port={client}", f"--temp-dir={folder}", "--disable-usage-stats"]
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=settings, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        limit = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < limit, log.read_text()
            time.sleep(0.2)
        yield {**settings, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}", "RAY_PORT": str(port)}
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=40)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def submit(shell: dict[str, str], folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit` with these words after it."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", *words]
    return subprocess.run(command, cwd=folder, env=shell, capture_output=True, text=True, timeout=900, check=False)


def test_submitted_jobs(local_run: Run, world: Config, head: dict[str, str], temporary: Path, tmp_path: Path) -> None:
    """The whole pipeline as a job gives the local bits and exit code 0; a job that fails says why and gives 1.

    So does any command as it is typed, from an uploaded copy of the repository.

    The cluster asks for a token: without it nothing runs, and it is in no file and no log that the job leaves.
    """
    stranger = {k: v for k, v in head.items() if k != "RAY_AUTH_TOKEN"} | {"RAY_AUTH_MODE": "disabled"}
    refused = submit(stranger, tmp_path, "--", "python", "-c", "print('inside')")
    assert refused.returncode != 0
    assert "inside" not in refused.stdout
    # Ray says 401, or that there is no token, depending on what is left in its environment.
    assert re.search("401|token authentication is enabled", refused.stdout + refused.stderr)
    config = write_config(world, tmp_path / "config.yaml", tmp_path / "storage")
    job = ("--", "python", "jobs/full_pipeline.py", "--config", str(config))
    good = submit(head, tmp_path, *job)
    assert good.returncode == 0, good.stdout + good.stderr
    same_as(local_run, tmp_path / "storage")
    assert "accuracy on test questions" in good.stdout
    assert "Traceback" not in good.stdout
    assert list((tmp_path / "storage" / "report").glob("*/report.html"))
    token = head["RAY_AUTH_TOKEN"].encode()
    assert token.decode() not in good.stdout + good.stderr
    assert not [p for p in (tmp_path / "storage").rglob("*") if p.is_file() and token in p.read_bytes()]

    copied = submit(
        head, REPOSITORY, "--working-dir", ".", "--", "roma-ray", "extract", "--address", "auto", "--config", str(config),
        "--set", "extraction.batch_tokens=1024", "--set", "ray.extract_workers=1",
    )  # fmt: skip
    assert copied.returncode == 0, copied.stdout + copied.stderr
    assert len(list((tmp_path / "storage" / "extract").glob(f"*/{MANIFEST}"))) == 2

    bad = submit(head, tmp_path, *job, "--set", "model.path=/there/is/no/model")
    assert bad.returncode == 1
    assert "roma-ray: " in bad.stdout
    assert "Traceback" not in bad.stdout
