"""What a trial leaves behind in its worker's memory: ten trials of a sweep, one after another, in one process.

    python benchmarks/trials.py [--json FILE] [--trials 10] [--arenas 2] [--hidden 0]

The same path as `roma-ray tune` with one trial at a time, on questions of the embedded default: with its model, or with --hidden N
a randomly initialised one of that width (16 layers). The figure is the process's own memory (anonymous pages) at the end of each
trial. `--arenas` sets MALLOC_ARENA_MAX in the workers in place of the package's own; 0 leaves it to glibc: eight for each core.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from common import Bench, machine, options, save_model, table

_QUESTIONS = 400


def measured(work: Any, report: Any) -> dict[str, Any]:
    """A trial's work, and what memory its process has at its end."""
    from roma_ray.ablations.trial import here

    record = here(work, report)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    mib = {name: int(status[name].split()[0]) / 1024 for name in ("RssAnon", "VmRSS")}
    with open(Path(work.setup.config.storage) / "memory.jsonl", "a") as stream:
        stream.write(json.dumps({"pid": os.getpid(), **mib}) + "\n")
    return record


def run_trials(folder: Path, count: int, hidden: int) -> list[dict[str, float]]:
    """The memory at the end of each of `count` trials that differ by their learning rate."""
    from roma_ray.ablations.plan import make_plan
    from roma_ray.ablations.space import load_space
    from roma_ray.ablations.sweep import run_sweep
    from roma_ray.cluster.ray_cluster import open_cluster
    from roma_ray.engine.progress import LineProgress

    storage = folder / "storage"
    base: dict[str, Any] = {
        "model": {"path": "assets:model", "dtype": "float32"},
        "questions": {
            "sources": [{"path": "assets:questions/train.jsonl", "limit": _QUESTIONS}],
            "prompt": {"format": "cloze", "max_tokens": 256},
        },
        "storage": str(storage),
        "device": "cpu",
        "finetune": {"epochs": 1},
        "tracking": {"enabled": False},
    }
    if hidden:
        model = save_model(folder / "model", hidden=hidden, expert_width=hidden // 2, vocabulary=2048)
        for file in (Path(__file__).resolve().parents[1] / "roma_ray" / "assets" / "model").glob("*token*"):
            shutil.copy(file, model / file.name)
        base["model"]["path"] = str(model)
    space = folder / "space.yaml"
    rates = [1e-5 * (n + 1) for n in range(count - 1)]
    content = {"name": "memory", "base": base, "grid": {"finetune.learning_rate": rates}, "max_concurrent": 1}
    space.write_text(yaml.safe_dump(content))
    loaded = load_space(str(space))
    progress = LineProgress()
    with open_cluster(loaded.centre, "new", progress.say) as cluster:
        run_sweep(make_plan(loaded, "cpu"), cluster, progress, do=measured)
    return [json.loads(line) for line in (storage / "memory.jsonl").read_text().splitlines()]


def main() -> int:
    """Measure, print the table and the gate."""

    def more(parser: Any) -> None:
        parser.add_argument("--trials", type=int, default=10)
        parser.add_argument("--arenas", type=int)
        parser.add_argument("--hidden", type=int, default=0)

    chosen = options(__doc__ or "", more)
    if chosen.arenas is not None:
        os.environ["MALLOC_ARENA_MAX"] = str(chosen.arenas)
    root = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [root, str(Path(root).parent), os.environ.get("PYTHONPATH")])
    )
    bench = Bench("trials")
    with tempfile.TemporaryDirectory(prefix="rr-", dir="/tmp") as place:
        os.environ["RAY_TMPDIR"] = place
        found = run_trials(Path(place), chosen.trials, chosen.hidden)
    assert len({one["pid"] for one in found}) == 1, "the trials did not share a process"
    assert len(found) == chosen.trials
    bench.figures["MiB after each trial"] = found
    print(f"{machine()}\n")
    table(["after trial", "own memory, MiB", "resident, MiB"],
          [[n + 1, f"{one['RssAnon']:.0f}", f"{one['VmRSS']:.0f}"] for n, one in enumerate(found)])  # fmt: skip
    grown = found[-1]["RssAnon"] / found[1]["RssAnon"]
    bench.gate(f"own memory after {chosen.trials} trials, of that after two", grown, "at most", 1.1, "1.02")
    return bench.finish(chosen.json)


if __name__ == "__main__":
    sys.exit(main())
