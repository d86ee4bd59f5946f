"""Training a head over a chain of two slices: a step's time against one process, the same bits, and what a slice's actor holds.

    python benchmarks/chain_training.py [--json FILE] [--questions 128] [--micro 8 4]

A randomly initialised OLMoE of a quarter of OLMoE-1B-7B's width, 16 layers, the last 8 tuned, in fp32. Each process has one thread;
of the chain the lower slice is in a Ray actor, the upper one in this process. The actor's memory is its largest resident size
from the first step on, less that with the slice loaded.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import Bench, machine, make_prompts, options, save_model, steady_process, table
from gpu_measures import Ground, ours
from gpu_shapes import training_data, write_rows

CUT, VOCABULARY, VALIDATION = 8, 12_576, 16


def make_ground(place: Path, questions: int) -> tuple[Any, Any]:
    """The model on disk, the states at the cut of so many questions, and what the loop reads of them."""
    from roma_ray.engine.forward import shared_prefix
    from roma_ray.engine.model_spec import ModelSpec

    spec = ModelSpec(str(save_model(place / "model")), None, "float32", "eager", "sdpa", "cpu", 1)
    prompts = make_prompts(questions + VALIDATION, VOCABULARY)
    prefix = shared_prefix(prompts)
    ground = Ground(None, spec.load(0, None, with_lm_head=True), prompts, "cpu", 4096, place, 1.0)
    ground.cut = CUT
    plan = ground.plan(prefix)
    routing, _ = ours(ground, plan, prefix, cache=True)
    write_rows(place, prompts, plan, prefix)
    return spec, training_data(place, CUT, prompts, routing, questions, 4096)


def steps_of(head: Any, data: Any, micro: int) -> tuple[float, dict[str, Any]]:
    """Seconds of a step (median of an epoch's), and the gates that one epoch leaves."""
    from roma_ray.config.finetune_settings import FinetuneConfig
    from roma_ray.engine.training import finetune

    config, times = FinetuneConfig(epochs=1, micro_batch_size=micro), []
    layers = list(range(CUT, 16))
    outcome = finetune(
        head, data, config, layers=layers, seed=0, advance=lambda count, note: times.append(time.perf_counter())
    )
    return statistics.median(b - a for a, b in pairwise(times)), outcome.gates


def _resident(actor: Any, reset: bool) -> float:
    """MB of an actor's process: now, from here on counted anew; or at its largest since."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:" if reset else "VmHWM:")) / 1024


def over_two(spec: Any, data: Any, micro: int, activations: str, place: Path) -> tuple[float, dict[str, Any], float]:
    """As `steps_of`, of a chain of two, and the MB that its actor held beside the slice at most."""
    import ray

    from roma_ray.cluster.chain_plans import plan_chains
    from roma_ray.cluster.head_actors import head_over
    from roma_ray.cluster.ray_cluster import Cluster
    from roma_ray.config.loading import load_config

    asked = [f"model.path={spec.path}", f"storage={place}", "questions.prompt.format=letter", "device=cpu"]
    config = load_config(None, [*asked, "finetune.chain=2", f"finetune.chain_activations={activations}"])
    plan = plan_chains(Cluster(config), "finetune", spec, 2, None, 1, "cpu", first=CUT)
    with head_over(plan, spec, config, name="finetune", folder=place) as head:
        (actor,) = head.links.actors.actors  # type: ignore[union-attr]
        before = ray.get(actor.__ray_call__.remote(_resident, True))
        second, gates = steps_of(head, data, micro)
        return second, gates, ray.get(actor.__ray_call__.remote(_resident, False)) - before


def main() -> int:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--questions", type=int, default=128)
        parser.add_argument("--micro", type=int, nargs="+", default=[8, 4])

    chosen = options(__doc__ or "", more)
    steady_process()
    import ray
    import torch

    bench = Bench("chain_training")
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        spec, data = make_ground(Path(folder), chosen.questions)
        whole = spec.load(CUT, None, with_lm_head=True)
        for micro in chosen.micro:
            second, gates = steps_of(whole, data, micro)
            count = 32 // micro
            rows.append(("one process", count, f"{second * 1e3:.0f}", "1.00", ""))
            for activations in ("keep", "recompute"):
                own, found, memory = over_two(spec, data, micro, activations, Path(folder))
                assert all(torch.equal(gate, found[key]) for key, gate in gates.items()), "other bits"
                rows.append(
                    (
                        f"chain of 2, {activations}",
                        count,
                        f"{own * 1e3:.0f}",
                        f"{second / own:.2f}",
                        f"{memory:.0f}",
                    )
                )
                bench.figures[f"{activations} {micro}"] = {"seconds": own, "faster": second / own, "actor_mb": memory}
            bench.figures[f"one process {micro}"] = {"seconds": second}
    ray.shutdown()
    print(machine())
    table(("head", "micro-batches a step", "ms a step", "faster", "actor's activations, MB"), rows)
    return bench.finish(chosen.json)


if __name__ == "__main__":
    sys.exit(main())
