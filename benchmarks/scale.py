"""Ray's overhead: the extraction of the same planned batches by a bare loop and by Ray actors on 1, 2 and 4 simulated nodes.

    python benchmarks/scale.py [--json FILE] [--batches 60] [--nodes 1 2 4]

Each simulated node is a raylet of its own on this machine with room for one worker; times run from the first finished batch
to the last, so that starting Ray and loading the model do not count (they are printed beside). More workers than cores share
the cores: on a machine of two, four nodes show the overhead, not a speed-up. The gate compares one worker with the bare loop.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from common import Bench, machine, make_prompts, options, save_model, save_questions, steady_process, table


def make_work(place: Path, batches: int) -> Any:
    """An extraction stage of random questions: model, table and plan on disk."""
    from roma_ray.config.loading import load_config
    from roma_ray.engine.batches import PlannedBatches, plan_batches, write_plan
    from roma_ray.engine.extractor import PLAN, ExtractWork
    from roma_ray.engine.forward import own_tokens, shared_prefix
    from roma_ray.engine.model_spec import ModelSpec
    from roma_ray.engine.setup import resolve
    from roma_ray.store.artifacts import Stage

    vocabulary = 2_048
    save_model(place / "model", hidden=256, layers=8, experts=16, top_k=4, expert_width=256, vocabulary=vocabulary)
    # A prompt has 76 tokens of its own on average: 80 more than fill a batch.
    prompts = make_prompts(batches * 80, vocabulary)
    save_questions(place, prompts)
    prefix = shared_prefix(prompts)
    plan = plan_batches([own_tokens(p, prefix) for p in prompts], 4096)[:batches]
    assert len(plan) == batches
    write_plan(place / PLAN, PlannedBatches.of(plan), prefix)
    spec = ModelSpec(str(place / "model"), None, "float32", "eager", "sdpa", "cpu", 1)
    settings = [f"model.path={place / 'model'}", f"storage={place}", "questions.prompt.format=letter"]
    setup = replace(resolve(load_config(None, settings), device="cpu"), model=spec, cuts=(5,))
    return ExtractWork(setup, {"questions": Stage(place, "questions", {})}, Stage(place, "extract", {}))


def timed(reports: Iterator[Any]) -> tuple[float, float, int]:
    """Seconds until the first batch is done, from there to the last, and the batches in the latter."""
    started = time.perf_counter()
    first = last = 0.0
    count = 0
    for _ in reports:
        last = time.perf_counter()
        first = first or last
        count += 1
    return first - started, last - first, count - 1


def on_ray(work: Any, batches: int, nodes: int) -> tuple[float, float, int]:
    """The batches on a simulated cluster."""
    import ray
    from ray.cluster_utils import Cluster as Simulated

    from roma_ray.cluster.batch_actors import ray_executor
    from roma_ray.cluster.ray_cluster import open_cluster
    from roma_ray.config.loading import load_config

    simulated = Simulated(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    for _ in range(nodes - 1):
        simulated.add_node(num_cpus=1)
    try:
        config = load_config(None, ["device=cpu", f"ray.extract_workers={nodes}", "ray.cpus_per_worker=0.5"])
        with open_cluster(config, simulated.address) as cluster:
            return timed(ray_executor(cluster, "extract", "cpu")(work, range(batches)))
    finally:
        ray.shutdown()
        simulated.shutdown()


def main() -> int:
    """Measure, print the table and the gate."""
    steady_process()
    # A cluster of this process's own, on the loopback address only.
    os.environ["RAY_AUTH_MODE"] = "disabled"

    def more(parser: Any) -> None:
        parser.add_argument("--batches", type=int, default=60)
        parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])

    chosen = options(__doc__ or "", more)
    import shutil

    from roma_ray.engine.work import serial

    bench, rows = Bench("scale"), []
    with tempfile.TemporaryDirectory(prefix="rr-", dir="/tmp") as place:
        os.environ["RAY_TMPDIR"] = place
        folder = Path(place)
        work = make_work(folder, chosen.batches)
        runs: list[tuple[str, Any]] = [("bare loop", lambda: timed(serial(work, range(chosen.batches))))]
        runs += [(f"{n} node(s)", lambda n=n: on_ray(work, chosen.batches, n)) for n in chosen.nodes]
        # Before and after the run that the gate is about: one loop differs from the next by as much as a tenth.
        runs.insert(2, ("bare loop, again", runs[0][1]))
        for name, measure in runs:
            shutil.rmtree(folder / "batches", ignore_errors=True)
            start, seconds, count = measure()
            bench.figures[name] = {"start": start, "seconds_a_batch": seconds / count}
            rows.append([name, f"{start:.1f}", f"{1e3 * seconds / count:.0f}"])
    bare = fmean(bench.figures[name]["seconds_a_batch"] for name in ("bare loop", "bare loop, again"))
    for row in rows:
        row.append(f"{bench.figures[row[0]]['seconds_a_batch'] / bare:.2f}")
    print(f"{machine()}\n{chosen.batches} batches of 4,096 tokens\n")
    table(["extraction", "s to the first batch", "ms a batch", "of the bare loop's time"], rows)
    if 1 in chosen.nodes:
        bench.gate(
            "Ray with one worker, of the bare loop's time",
            bench.figures["1 node(s)"]["seconds_a_batch"] / bare,
            "at most",
            1.10,
            "1.03",
        )
    return bench.finish(chosen.json)


if __name__ == "__main__":
    sys.exit(main())
