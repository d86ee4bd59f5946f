"""The parts of `gpu.py`: what is timed, each against transformers' own forward in the same process.

Q questions, L layers, E experts.
"""

from __future__ import annotations

import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import common  # noqa: F401 - puts the repository's root on the path

QUESTIONS, EPOCHS = 49_000, 3


@dataclass
class Ground:
    """What a shape is measured on."""

    shape: Any
    part: Any
    prompts: Sequence[Any]
    device: str
    batch_tokens: int
    folder: Path
    matmul: float
    """FLOP/s of the device's large matmul."""

    def __post_init__(self) -> None:
        from engine import clock

        self.now = clock(self.device)
        self.cut = self.part.num_layers - 5
        self.tokens = sum(len(p.prompt_ids) for p in self.prompts)

    def plan(self, prefix: int) -> list[list[int]]:
        """The planned batches of an extraction."""
        from roma_ray.engine.batches import plan_batches
        from roma_ray.engine.forward import own_tokens

        return plan_batches([own_tokens(p, prefix) for p in self.prompts], self.batch_tokens)


def stock(ground: Ground, plan: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Transformers' own forward on padded batches: routing rows [Q, L, E] and the four letters' scores [Q, 4], at the last token."""
    import torch

    from roma_ray.moe.reading import read_routing

    part, found = ground.part, {}
    for rows in plan:
        some = [ground.prompts[row] for row in rows]
        lengths = torch.tensor([len(p.prompt_ids) for p in some])
        width = int(lengths.max())
        ids = torch.tensor([[*p.prompt_ids, *[0] * (width - len(p.prompt_ids))] for p in some]).to(ground.device)
        mask = (torch.arange(width) < lengths[:, None]).long().to(ground.device)
        last = (lengths - 1).to(ground.device)
        with read_routing(part.model, part.routers, last[:, None]) as tape:
            states = part.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        logits = part.model.lm_head(states[torch.arange(len(some), device=last.device), last])
        scores = torch.log_softmax(logits.float(), -1)[:, 1:5].cpu()
        for n, (row, r) in enumerate(zip(rows, tape.routing_BPLE[:, 0].cpu(), strict=True)):
            found[row] = r, scores[n]
    return _in_order(found)


def ours(ground: Ground, plan: Sequence[Sequence[int]], prefix: int, *, cache: bool = False) -> tuple[Any, Any]:
    """The same by the extract stage's passes; with `cache` the states at the cut are written as it writes them."""
    import torch

    from roma_ray.engine.extractor import Reading, batch_activations, run_part
    from roma_ray.engine.forward import choice_scores, lay_out
    from roma_ray.store.tensors import write_tensors

    found = {}
    for number, rows in enumerate(plan):
        reading = Reading.of(lay_out([ground.prompts[r] for r in rows], prefix=prefix), ("Last1",))
        logits, kept, tape = run_part(ground.part, reading, None, (ground.cut,) if cache else ())
        own = reading.routing(tape)["Last1"]
        for n, (row, scores) in enumerate(zip(rows, choice_scores(logits, reading.keep, reading.layout), strict=True)):
            found[row] = torch.from_numpy(own[n]), torch.tensor(scores)
        if cache:
            path = batch_activations(ground.folder, number, ground.cut)
            write_tensors(path, {"hidden": kept[ground.cut].cpu().contiguous()})
    return _in_order(found)


def _in_order(found: dict[int, tuple[Any, Any]]) -> tuple[Any, Any]:
    import torch

    rows = sorted(found)
    return torch.stack([found[row][0] for row in rows]), torch.stack([found[row][1] for row in rows])


def interleaved(
    ground: Ground, variants: dict[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Each variant's best seconds and last result, run in turns after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    results: dict[str, Any] = {}
    order = random.Random(0)
    for turn in range(rounds + 1):
        names = [*variants]
        order.shuffle(names)
        for name in names:
            started = ground.now()
            results[name] = variants[name]()
            if turn:
                seconds[name].append(ground.now() - started)
    return {name: min(values) for name, values in seconds.items()}, results


# -- the parts ----------------------------------------------------------------------------------------------------------


def self_check(ground: Ground) -> dict[str, Any]:
    """Every layer's passes against the stock forward; a refusal is a figure too."""
    from roma_ray.errors import ModelError
    from roma_ray.moe.selfcheck import check_slice

    try:
        checked = check_slice(ground.part)
    except ModelError as refusal:
        return {"refused": str(refusal)}
    return {"refused": "the stock forward gives no numbers"} if checked is None else checked.facts()


def backends(ground: Ground) -> dict[str, Any]:
    """Tokens a second of each experts implementation on the first planned batch: ours without sharing, and transformers' own."""
    import torch

    from roma_ray.engine.expert_backends import CANDIDATES

    found: dict[str, Any] = {}
    plan = ground.plan(0)[:1]
    tokens = sum(len(ground.prompts[row].prompt_ids) for row in plan[0])
    for name in CANDIDATES:
        ground.part.model.set_experts_implementation(name)
        try:
            with torch.inference_mode():
                best, _ = interleaved(
                    ground, {"ours": lambda: ours(ground, plan, 0), "stock": lambda: stock(ground, plan)}, 1
                )
        except (RuntimeError, NotImplementedError, ImportError) as failure:
            found[name] = {"failed": str(failure).splitlines()[0]}
            continue
        found[name] = {key: tokens / value for key, value in best.items()}
    ran = [name for name, value in found.items() if "ours" in value]
    if not ran:
        raise SystemExit(f"no experts implementation runs on this device: {found}")
    ground.part.model.set_experts_implementation(max(ran, key=lambda name: found[name]["ours"]))
    return found


def extraction(ground: Ground, rounds: int) -> tuple[dict[str, Any], Any]:
    """Tokens a second and part of the matmul rate of each variant, and the routing rows that training starts from."""
    import torch

    from roma_ray.engine.forward import own_tokens, shared_prefix

    prefix = shared_prefix(ground.prompts)
    apart, shared = ground.plan(0), ground.plan(prefix)
    variants = {
        "transformers": lambda: stock(ground, apart),
        "ours": lambda: ours(ground, apart, 0),
        "ours, prefix shared": lambda: ours(ground, shared, prefix),
        "ours, prefix shared, cache written": lambda: ours(ground, shared, prefix, cache=True),
    }
    with torch.inference_mode():
        best, results = interleaved(ground, variants, rounds)
        waits = host_waits(ground.device, variants["ours"])
    from gpu_shapes import matmul_flops, write_rows

    write_rows(ground.folder, ground.prompts, shared, prefix)
    own = prefix * len(shared) + sum(own_tokens(p, prefix) for p in ground.prompts)
    base = results["transformers"]
    found = {}
    for name, value in best.items():
        flops = matmul_flops(ground.part.model.config, own if "shared" in name else ground.tokens, len(ground.prompts))
        found[name] = {
            "seconds": value,
            "tokens_per_second": ground.tokens / value,
            "part_of_matmul_rate": flops / value / ground.matmul,
            "times_faster": best["transformers"] / value,
            "routing_differs": float((results[name][0] - base[0]).abs().max()),
            "same_answers": float((results[name][1].argmax(1) == base[1].argmax(1)).float().mean()),
        }
    found["ours"]["host_waits_a_batch"] = None if waits is None else waits / len(apart)
    return found, results["ours, prefix shared"][0]


def one_step(ground: Ground, head: Any, rounds: int) -> dict[str, Any]:
    """Loss and gate gradients of one batch: transformers' own forward and backward against the head's, from states in memory."""
    import torch
    from engine import BATCH, World, step

    from roma_ray.moe.masters import RouterMasters

    layers = list(range(ground.cut, ground.part.num_layers))
    some = ground.prompts[:BATCH]
    generator = torch.Generator().manual_seed(1)
    experts = ground.part.routers[0].num_experts
    targets = torch.softmax(3 * torch.randn(len(some), len(layers), experts, generator=generator), -1)
    world = World(ground.part, head, some, targets.to(ground.device), layers)
    # The head is made of the whole model's own layers, so one set of masters serves both.
    masters = RouterMasters(head, layers)
    both = {"whole": masters, "head": masters}
    try:
        best, results = interleaved(
            ground, {name: lambda name=name: step(world, name, both) for name in ("plain", "full")}, rounds
        )
        waits = host_waits(ground.device, lambda: step(world, "full", both))
    finally:
        masters.detach()
    (loss, wanted), (own_loss, own) = results["plain"], results["full"]
    return {
        "questions": len(some),
        "host_waits": waits,
        "transformers_seconds": best["plain"],
        "ours_seconds": best["full"],
        "times_faster": best["plain"] / best["full"],
        "loss_differs": abs(float(own_loss) / float(loss) - 1),
        "gradient_differs": max(float((a - b).norm() / b.norm()) for a, b in zip(own, wanted, strict=True)),
    }


def training(ground: Ground, head: Any, routing: Any, validation: int, epochs: int) -> dict[str, Any]:
    """The training loop itself over the cache on disk: seconds of a step, its reading included, and of `epochs` epochs."""
    from gpu_shapes import training_data

    from roma_ray.config.finetune_settings import FinetuneConfig
    from roma_ray.engine.training import finetune

    train = len(ground.prompts) - validation
    data = training_data(ground.folder, ground.cut, ground.prompts, routing, train, ground.batch_tokens)
    config = FinetuneConfig(epochs=epochs)
    times: list[float] = []
    started = time.perf_counter()
    layers = list(range(ground.cut, ground.part.num_layers))
    finetune(head, data, config, layers=layers, seed=0, advance=lambda count, note: times.append(time.perf_counter()))
    whole = time.perf_counter() - started
    # Each step ends with a transfer of its figures, so the host's clock sees the device's work; an epoch's end is no step.
    per_epoch = len(times) // epochs
    steps = [b - a for n, (a, b) in enumerate(pairwise(times), 1) if n % per_epoch]
    reading = time.perf_counter()
    for row in range(train):
        data.states.states(row)
    reading = (time.perf_counter() - reading) / train * config.batch_size
    second = statistics.median(steps)
    return {
        "steps": len(times),
        "step_seconds": second,
        "questions_per_second": config.batch_size / second,
        "cache_read_seconds_a_step": reading,
        "three_epochs_of_49000_composed_seconds": EPOCHS * -(-QUESTIONS // config.batch_size) * second,
        "measured": {"questions": train, "epochs": epochs, "seconds": whole},
    }


def peak(device: str, reset: bool = True) -> float | None:
    """GB of the GPU's memory at the fullest moment since the last call; None on a CPU, where it is not measured."""
    import torch

    if device != "cuda":
        return None
    found = torch.cuda.max_memory_allocated() / 1e9
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return found


def host_waits(device: str, run: Callable[[], Any]) -> int | None:
    """How often the host waits for the GPU while something runs, counted by torch; None on a CPU."""
    import torch

    if device != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in seen)
