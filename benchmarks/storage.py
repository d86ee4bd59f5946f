"""What a storage in a bucket costs beside a folder: the embedded default, and an extraction whose activations are large.

    python benchmarks/storage.py [--json FILE] [--gigabytes 2] [--rounds 3]

The bucket is an S3 server on this machine's loopback, behind a proxy that counts and, for `far`, takes 50 ms a request and 200 MB/s.
Each measurement is a process of its own; the server and the proxy run beside it, so the machine needs two cores. Folder and
buckets take turns. Needs the development tools (`make dev`).
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from common import Bench, machine, make_prompts, options, save_model, save_questions, steady_process, table

FAR_SECONDS, FAR_BYTES = 0.05, 200e6
STAGES = ("questions", "extract", "embed", "neighbors", "finetune", "evaluate")
WIDTH = 1024


class Counted:
    """Requests and bytes of a proxy, by stage."""

    def __init__(self, proxy: Any) -> None:
        self.proxy = proxy
        self.requests: Counter[str] = Counter()

    def __enter__(self) -> Counted:
        self.proxy.reset()
        self.proxy.rule = self._note
        return self

    def _note(self, request: Any) -> None:
        stage = next((part for part in request.key.split("/") if part in STAGES), "other")
        self.requests[stage] += 1

    def __exit__(self, *error: object) -> None:
        self.sent, self.received = self.proxy.sent, self.proxy.received
        self.proxy.rule = lambda request: None


def whole_run(storage: str, scratch: Path) -> dict[str, Any]:
    """The embedded default in a process of its own: wall and CPU seconds, and what its manifests say of each stage."""
    from roma_ray.stages.finetuning import LIVE
    from roma_ray.store.artifacts import Store
    from roma_ray.store.contents import Storage
    from roma_ray.store.logs import whole_lines

    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-m", "roma_ray", "local", "--storage", storage, "--quiet"]
    environment = {**os.environ, "ROMA_RAY_SCRATCH": str(scratch)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - began
    found: dict[str, Any] = {
        "wall": wall,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "stages": Counter(),
    }
    for item in Storage(Store(storage)).items.values():
        found["stages"][item.kind] += item.stage.manifest()["seconds"]
        if item.kind == "finetune" and item.stage.identity["settings"].get("regularizer", {}).get("kind") != "none":
            lines = [json.loads(line) for line in whole_lines(item.stage.path / LIVE)[0]]
            found["later epochs"] = [b["time"] - a["time"] for a, b in itertools.pairwise(lines)]
    return found


def extraction(model: str, prompts: list[Any], folder: str, scratch: str, queue: Any) -> None:
    """The batches of an extraction in this process: wall and CPU seconds, their count, tokens."""
    os.environ["ROMA_RAY_SCRATCH"] = scratch
    from roma_ray.engine.work import one_by_one

    work, batches = make_work(model, prompts, folder)
    do = work.open()
    began, cpu = time.monotonic(), time.process_time()
    tokens = sum(report.tokens for report in one_by_one(do, range(batches)))
    queue.put((time.monotonic() - began, time.process_time() - cpu, batches, tokens))


def make_work(model: str, prompts: list[Any], folder: str) -> tuple[Any, int]:
    """An extraction stage of random questions in this storage: its table and its plan."""
    from dataclasses import replace

    from roma_ray.config.loading import load_config
    from roma_ray.engine.batches import plan_batches, write_plan
    from roma_ray.engine.extractor import PLAN, ExtractWork
    from roma_ray.engine.forward import own_tokens, shared_prefix
    from roma_ray.engine.model_spec import ModelSpec
    from roma_ray.engine.setup import resolve
    from roma_ray.store.artifacts import Stage, Store

    place = Store(folder).root
    save_questions(place, prompts)
    prefix = shared_prefix(prompts)
    plan = plan_batches([own_tokens(p, prefix) for p in prompts], 8192)
    stage = Stage(place / "extract", "extract", {})
    write_plan(stage.path / PLAN, plan, prefix)
    settings = [f"model.path={model}", f"storage={folder}", "questions.prompt.format=letter", "routing.layers=L1"]
    spec = ModelSpec(model, None, "float32", "eager", "sdpa", "cpu", 1)
    setup = replace(resolve(load_config(None, settings), device="cpu"), model=spec, cuts=(1,))
    return ExtractWork(setup, {"questions": Stage(place, "questions", {})}, stage), len(plan)


def timed_extraction(model: Path, prompts: list[Any], folder: str, scratch: Path) -> tuple[float, float, int, int]:
    """`extraction` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=extraction, args=(str(model), prompts, folder, str(scratch), queue))
    process.start()
    found = queue.get()
    process.join()
    return tuple(found)


def default_runs(bench: Bench, proxy: Any, place: Path, rounds: int) -> None:
    """The embedded default in a folder, a near and a far bucket, in turns."""
    found: dict[str, list[dict[str, Any]]] = {"folder": [], "near": [], "far": []}
    counted: dict[str, Counted] = {}
    for number in range(rounds):
        for name, runs in found.items():
            scratch = place / f"scratch-{name}-{number}"
            if name == "folder":
                runs.append(whole_run(str(place / f"folder-{number}"), scratch))
                continue
            with Counted(proxy) as counted[name]:
                proxy.delay, proxy.rate = (FAR_SECONDS, FAR_BYTES) if name == "far" else (0.0, float("inf"))
                runs.append(whole_run(proxy.address(f"{name}-{number}"), scratch))
    names = list(found)

    def middle(name: str, key: str) -> float:
        return median(run["stages"][key] if key in STAGES else run[key] for run in found[name])

    rows = [[key, *(f"{middle(name, key):.1f}" for name in names)] for key in (*STAGES, "wall", "cpu")]
    later = {name: median(s for run in runs for s in run["later epochs"]) for name, runs in found.items()}
    rows.append(["an epoch after the first", *(f"{later[name]:.2f}" for name in names)])
    for stage in (*STAGES, "other"):
        rows.append([f"requests: {stage}", "", *(str(counted[name].requests[stage]) for name in names[1:])])
    rows.append(["MB sent", "", *(f"{counted[name].sent / 1e6:.1f}" for name in names[1:])])
    rows.append(["MB received", "", *(f"{counted[name].received / 1e6:.1f}" for name in names[1:])])
    print(f"The embedded default, seconds (median of {rounds}) and requests\n")
    table(["", "folder", "bucket", "bucket, 50 ms and 200 MB/s"], rows)
    bench.figures["default"] = {name: {key: middle(name, key) for key in (*STAGES, "wall", "cpu")} for name in names}
    bench.figures["later epochs"] = later
    bench.gate("an epoch after the first, far, of a folder's", later["far"] / later["folder"], "at most", 1.05, "1")


def large_extraction(bench: Bench, proxy: Any, place: Path, gigabytes: float) -> None:
    """An extraction that writes so many GB of activations, to a folder, the far bucket, and a folder again."""
    vocabulary = 2_048
    model = save_model(
        place / "model", hidden=WIDTH, layers=2, experts=8, top_k=2, expert_width=256, vocabulary=vocabulary
    )
    # A prompt has 76 tokens of its own on average.
    prompts = make_prompts(int(gigabytes * 1e9 / (76 * WIDTH * 4)), vocabulary)
    rows, seconds = [], {}
    for name in ("folder", "far", "folder, again"):
        with Counted(proxy) as counted:
            proxy.delay, proxy.rate = FAR_SECONDS, FAR_BYTES
            storage = str(place / f"large-{name}") if name != "far" else proxy.address("large")
            wall, cpu, batches, tokens = timed_extraction(model, prompts, storage, place / f"scratch-large-{name}")
        seconds[name] = wall
        each = f"{counted.requests['extract'] / batches:.1f}" if name == "far" else ""
        sent = f"{counted.sent / 1e9:.2f}" if name == "far" else ""
        rows.append([name, f"{wall:.0f}", f"{cpu:.0f}", f"{tokens / wall:,.0f}", each, sent])
    print(
        f"\nAn extraction of {tokens:,} tokens, {batches} batches, {tokens * WIDTH * 4 / 1e9:.2f} GB of activations\n"
    )
    table(["storage", "s", "CPU s", "tokens/s", "requests a batch", "GB sent"], rows)
    bench.figures["extraction"] = seconds
    ratio = seconds["far"] / ((seconds["folder"] + seconds["folder, again"]) / 2)
    bench.gate("extraction far away, of a folder's time", ratio, "at most", 1.10, "1.02")


def main() -> int:
    """Measure, print the tables and the gates."""
    steady_process()

    def more(parser: Any) -> None:
        parser.add_argument("--gigabytes", type=float, default=2.0)
        parser.add_argument("--rounds", type=int, default=3)

    chosen = options(__doc__ or "", more)
    from tests.bucket import CREDENTIALS, bucket_server

    os.environ.update(CREDENTIALS)
    bench = Bench("storage")
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory() as place, bucket_server() as proxy:
        default_runs(bench, proxy, Path(place), chosen.rounds)
        large_extraction(bench, proxy, Path(place), chosen.gigabytes)
    return bench.finish(chosen.json)


if __name__ == "__main__":
    raise SystemExit(main())
