"""What a run's start is made of on a standing cluster: python benchmarks/starting.py [--json FILE] [--command extract]

Starts a head with `ray start` on this machine's loopback address, with its own folder and port, then runs the embedded default
against it, each time into an empty storage: the seconds from the command to each line that it says, and the parts of its start.
The gate is the second run's: from the command to the first batch that a worker has done.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import Bench, machine, options, table

REPOSITORY = Path(__file__).resolve().parents[1]
# What is said when a part of the start is over.
_SAID = {
    "the cluster answers": re.compile(r"^ray [0-9.]+: "),
    "questions are there": re.compile(r"^questions: done"),
    "workers are asked for": re.compile(r"^extract: \d+ batches on "),
    "the first batch is done": re.compile(r"^extract: [0-9.]+ s to start: (.*)$"),
}
_PART = re.compile(r"([a-z ]+?) ([0-9.]+)(?:, |$)")


def environment(folder: Path) -> dict[str, str]:
    """Of the cluster and of the runs: their own files, a token of their own."""
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": str(folder)}
    settings |= {"HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "ROMA_RAY_STORAGE")} | settings


@contextmanager
def standing(folder: Path, env: dict[str, str]) -> Iterator[str]:
    """The address of a cluster for as long as the block runs. Its processes end with the one that holds them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    words = ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2"]
    words += ["--include-dashboard=false", f"--temp-dir={folder}"]
    with open(folder / "head.log", "wb") as log:
        head = subprocess.Popen(words, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        limit = time.monotonic() + 120
        while "To connect to this Ray cluster" not in (folder / "head.log").read_text() and time.monotonic() < limit:
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait()


def timed_run(address: str, storage: Path, command: str, kept: int, env: dict[str, str]) -> dict[str, Any]:
    """Seconds of a run from its command on: when each thing was said, the parts of the extraction's start, and all of it."""
    words = [sys.executable, "-m", "roma_ray", command, "--storage", str(storage), "--address", address]
    words += ["--set", f"ray.keep_workers_seconds={kept}"] if kept else []
    words += ["--summary", str(storage.with_suffix(".json"))]
    began, found, said = time.monotonic(), dict[str, Any](), []
    process = subprocess.Popen(words, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        for name, pattern in _SAID.items():
            if (match := pattern.match(line)) and name not in found:
                found[name] = time.monotonic() - began
                if match.groups():
                    found["parts"] = {part.strip(): float(seconds) for part, seconds in _PART.findall(match[1])}
    if process.wait():
        raise SystemExit("".join(said))
    return {**found, "all": time.monotonic() - began}


def main() -> int:
    """Start the cluster, run twice, print."""

    def more(parser: Any) -> None:
        parser.add_argument("--command", default="extract", help="run: all stages")
        parser.add_argument("--kept", type=int, default=0, help="seconds that workers wait for the next run")
        parser.add_argument("--runs", type=int, default=2)

    chosen = options(__doc__, more)
    bench = Bench("starting")
    with tempfile.TemporaryDirectory(prefix="rr-", dir="/tmp", ignore_cleanup_errors=True) as place:
        folder = Path(place)
        env = environment(folder)
        with standing(folder, env) as address:
            for number in range(chosen.runs):
                bench.figures[f"run {number + 1}"] = timed_run(
                    address, folder / f"storage{number}", chosen.command, chosen.kept, env
                )
    runs = list(bench.figures.values())
    parts = list(runs[0]["parts"])
    rows = [[f"until {name}", *(f"{run[name]:.1f}" for run in runs)] for name in _SAID if name in runs[0]]
    rows += [[f"of the workers' start: {part}", *(f"{run['parts'][part]:.1f}" for run in runs)] for part in parts]
    rows.append(["all of the command", *(f"{run['all']:.1f}" for run in runs)])
    print(f"{machine()}\n`roma-ray {chosen.command}` on a standing cluster\n")
    table(["seconds", *bench.figures], rows)
    bench.gate("second run, command to first batch, s", runs[1]["the first batch is done"], "at most", 10.0, "")
    return bench.finish(chosen.json)


if __name__ == "__main__":
    sys.exit(main())
