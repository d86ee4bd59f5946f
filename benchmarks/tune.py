"""What a sweep costs beside its trials: no-op trials on Ray Tune, ten trials against one cold run, the embedded grid.

    python benchmarks/tune.py [--json FILE] [--parts noop ten demo]

`noop`: fifty trials that do nothing, through the same path as real ones. `ten`: the wall time of ten trials with one cut from an
empty storage, over that of one `roma-ray run` from an empty storage, both on the embedded default. `demo`: `roma-ray tune` from
an empty storage. Each starts and ends its own Ray. Tracking is on, as by default.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from common import Bench, machine, options, table

_NOOPS = 50


def no_op(work: Any, report: Any) -> dict[str, Any]:
    """A trial's work that is none."""
    return {"epoch": 1, "validation_accuracy": 0.5}


def space_file(folder: Path, trials: int) -> Path:
    """A grid of that many trials, the centre counted, with one cut: they differ by learning rate."""
    path = folder / f"grid-{trials}.yaml"
    rates = [round(1e-4 * (n + 1), 7) for n in range(trials - 1)]
    path.write_text(yaml.safe_dump({"name": f"grid-{trials}", "grid": {"finetune.learning_rate": rates}}))
    return path


def timed(*arguments: str) -> float:
    """Wall time of a `roma-ray` command."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "roma_ray", *arguments, "--address", "new", "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def no_ops(folder: Path, storage: str) -> float:
    """Seconds of fifty no-op trials, all that they share done before."""
    from roma_ray.ablations.plan import make_plan
    from roma_ray.ablations.space import load_space
    from roma_ray.ablations.sweep import run_sweep
    from roma_ray.cluster.ray_cluster import open_cluster
    from roma_ray.engine.progress import Silence

    space = load_space(space_file(folder, _NOOPS + 1), storage=storage)
    with open_cluster(space.centre, "new") as cluster:
        plan = make_plan(space, cluster.device())
        cluster.connect()
        started = time.perf_counter()
        run_sweep(plan, cluster, Silence(), do=no_op)
        return time.perf_counter() - started


def main() -> int:
    """Measure, print the table and the gates."""

    def more(parser: Any) -> None:
        parser.add_argument("--parts", nargs="+", default=["noop", "ten", "demo"], choices=("noop", "ten", "demo"))

    chosen = options(__doc__ or "", more)
    bench, rows = Bench("tune"), []
    root = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="rr-", dir="/tmp") as place:
        os.environ["RAY_TMPDIR"] = place
        folder, storage = Path(place), str(Path(place) / "cold")
        if {"noop", "ten"} & set(chosen.parts):
            bench.figures["cold run"] = timed("run", "--storage", storage)
            rows.append(["`roma-ray run`, cold", f"{bench.figures['cold run']:.0f}"])
        if "noop" in chosen.parts:
            seconds = bench.figures["no-op trials"] = no_ops(folder, storage)
            rows.append([f"{_NOOPS} no-op trials", f"{seconds:.0f}"])
            bench.gate("a no-op trial, seconds", seconds / _NOOPS, "at most", 1.0, "0.3")
        if "ten" in chosen.parts:
            seconds = timed("tune", "--space", str(space_file(folder, 10)), "--storage", str(folder / "ten"))
            bench.figures["ten trials"] = seconds
            rows.append(["ten trials with one cut, cold", f"{seconds:.0f}"])
            bench.gate("ten trials, of one cold run", seconds / bench.figures["cold run"], "at most", 2.5, "2")
        if "demo" in chosen.parts:
            seconds = bench.figures["embedded grid"] = timed("tune", "--storage", str(folder / "demo"))
            rows.append(["`roma-ray tune`, cold", f"{seconds:.0f}"])
            bench.gate("the embedded grid, seconds", seconds, "at most", 600, "300")
    print(f"{machine()}\n")
    table(["", "seconds"], rows)
    return bench.finish(chosen.json)


if __name__ == "__main__":
    sys.exit(main())
