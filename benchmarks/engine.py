"""One optimizer step of router finetuning, by every path: plain, cached, packed, trimmed, and all together.

    python benchmarks/engine.py [--json FILE] [--rounds 3]

32 prompts of 50-200 tokens, 16 layers, the last 5 tuned, fp32 on one CPU thread; on a GPU in bf16, with tokens a second.
Every path computes the same loss and the same gate gradients; how far they agree, their counted FLOPs and their CPU time are
printed against `plain`: the stock forward of the whole model over the padded batch, logits everywhere, live routing by hooks.
The paths run interleaved in one process, so that another job on the machine slows all of them.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Bench, machine, make_prompts, options, save_model, steady_process, table

TUNED = 5
BATCH = 32


@dataclass
class World:
    """The model in parts, one batch in every layout, and the states that each path starts from."""

    whole: Any
    head: Any
    prompts: Sequence[Any]
    targets: Any
    layers: list[int]

    def __post_init__(self) -> None:
        import torch

        from roma_ray.engine.forward import lay_out, letter_rows
        from roma_ray.moe.passes import run_packed

        device = self.head.device
        width = max(len(p.prompt_ids) for p in self.prompts)
        self.ids = torch.zeros(len(self.prompts), width, dtype=torch.long, device=device)
        self.mask = torch.zeros_like(self.ids)
        for row, prompt in enumerate(self.prompts):
            self.ids[row, : len(prompt.prompt_ids)] = torch.tensor(prompt.prompt_ids)
            self.mask[row, : len(prompt.prompt_ids)] = 1
        self.last = (self.mask.sum(1) - 1)[:, None]
        self.letters = letter_rows(self.prompts)
        self.apart, self.shared = lay_out(self.prompts), lay_out(self.prompts, prefix=self.prefix())
        cut = self.head.start
        with torch.no_grad():
            self.middle = run_packed(self.whole, self.shared.packing, after_attention=[cut]).after_attention[cut]
            self.entering = self.states_entering(cut)
            packed = [self.entering[row, : len(p.prompt_ids)] for row, p in enumerate(self.prompts)]
            self.entering_flat = torch.cat(packed)

    def prefix(self) -> int:
        """Tokens that all prompts share."""
        from roma_ray.engine.forward import shared_prefix

        return shared_prefix(self.prompts)

    def states_entering(self, layer: int) -> Any:
        """Padded hidden states that enter a layer, by the whole model."""
        caught = []
        hook = self.whole.model.base_model.layers[layer].register_forward_pre_hook(
            lambda module, inputs: caught.append(inputs[0])
        )
        plain_logits(self)
        hook.remove()
        return caught[0]


def plain_logits(world: World) -> Any:
    """The stock forward over the padded batch: every position, every row of the vocabulary."""
    from roma_ray.moe.slices import position_ids

    output = world.whole.model(
        input_ids=world.ids, attention_mask=world.mask, position_ids=position_ids(world.mask), use_cache=False
    )
    return output.logits


def loss_of(world: World, logits: Any, routing: Any) -> Any:
    """Eq. 9 on the batch: cross-entropy over four letters, squared distance of the routing to its targets."""
    import torch

    answers = torch.tensor([p.answer for p in world.prompts], device=logits.device)
    task = torch.nn.functional.cross_entropy(logits.float(), answers, reduction="sum")
    return (task + 0.8 * (routing - world.targets).square().sum()) / len(world.prompts)


def _letters_at_last(world: World, logits: Any) -> Any:
    import torch

    rows = torch.arange(len(world.prompts), device=logits.device)
    return logits[rows, world.last[:, 0]][:, world.letters.to(logits.device)]


def plain(world: World) -> Any:
    from roma_ray.moe.reading import read_routing

    tuned = [r for r in world.whole.routers if r.layer in world.layers]
    with read_routing(world.whole.model, tuned, world.last) as tape:
        logits = plain_logits(world)
    return loss_of(world, _letters_at_last(world, logits), tape.routing_BPLE[:, 0])


def last_logits(world: World) -> Any:
    from roma_ray.moe.reading import read_routing
    from tests.padded import slice_logits

    tuned = [r for r in world.whole.routers if r.layer in world.layers]
    with read_routing(world.whole.model, tuned, world.last) as tape:
        logits = slice_logits(world.whole, world.ids, world.mask, world.last)
    return loss_of(world, logits[:, 0][:, world.letters.to(logits.device)], tape.routing_BPLE[:, 0])


def cached(world: World) -> Any:
    from roma_ray.moe.reading import read_routing
    from tests.padded import slice_logits

    with read_routing(world.head.model, world.head.routers, world.last) as tape:
        logits = slice_logits(world.head, world.entering, world.mask, world.last)
    return loss_of(world, logits[:, 0][:, world.letters.to(logits.device)], tape.routing_BPLE[:, 0])


def _packed(world: World, layout: Any, states: Any, *, keep: bool, resume: bool) -> Any:
    import torch

    from roma_ray.moe.passes import run_packed
    from roma_ray.moe.reading import read_routing

    ends = list(layout.ends)
    with read_routing(world.head.model, world.head.routers, torch.tensor([ends], device=world.ids.device)) as tape:
        out = run_packed(
            world.head,
            layout.packing,
            states,
            resume=resume,
            keep=ends if keep else None,
            vocabulary_rows=world.letters,
        )
    logits = out.states if keep else out.states[ends]
    return loss_of(world, logits, tape.routing_BPLE[0])


def packed(world: World) -> Any:
    return _packed(world, world.apart, world.entering_flat, keep=False, resume=False)


def trimmed(world: World) -> Any:
    return _packed(world, world.apart, world.entering_flat, keep=True, resume=False)


def full(world: World) -> Any:
    return _packed(world, world.shared, world.middle, keep=True, resume=True)


PATHS: dict[str, tuple[Callable[[World], Any], str, str]] = {
    "plain": (plain, "whole", "stock forward of the whole padded batch"),
    "last": (last_logits, "whole", "logits at the last token only"),
    "cached": (cached, "head", "from cached states: the last 5 layers"),
    "packed": (packed, "head", "no padding, four rows of lm_head"),
    "trimmed": (trimmed, "head", "the last layer at the last token only"),
    "full": (full, "head", "after the cut's attention, shared prefix once: what roma-ray runs"),
}


def step(world: World, name: str, masters: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Loss and gate gradients of one path."""
    import torch

    path, part, _ = PATHS[name]
    loss = path(world)
    return loss.detach(), list(torch.autograd.grad(loss, masters[part].parameters()))


def build_cache(world: World) -> Any:
    """The trunk over the batch, packed: what a run pays once when the extraction did not leave its states."""
    import torch

    from roma_ray.moe.passes import run_packed

    with torch.no_grad():
        return run_packed(
            world.trunk,  # type: ignore[attr-defined]
            world.shared.packing,
            after_attention=[world.head.start],
            keep=[],
        )


def clock(device: str) -> Callable[[], float]:
    """CPU time of this process; on a GPU wall time after all of it is done."""
    if device == "cpu":
        return time.process_time

    def now() -> float:
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()

    return now


def main() -> int:
    """Measure, print the table and the gates."""
    steady_process()
    chosen = options(__doc__ or "", lambda parser: parser.add_argument("--rounds", type=int, default=3))
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from roma_ray.moe.masters import RouterMasters
    from roma_ray.moe.slices import load_slice

    device = chosen.device
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    sizes = {} if device == "cpu" else {"hidden": 2048, "expert_width": 1024, "heads": 16, "vocabulary": 50_304}
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), dtype=str(dtype).removeprefix("torch."), **sizes)
        load: dict[str, Any] = {
            "dtype": dtype,
            "device": device,
            "experts_backend": "eager" if device == "cpu" else "grouped_mm",
        }
        whole = load_slice(folder, with_lm_head=True, **load)
        cut = whole.num_layers - TUNED
        head = load_slice(folder, start=cut, with_lm_head=True, **load)
        trunk = load_slice(folder, stop=cut + 1, with_lm_head=False, **load)
    layers = list(range(cut, whole.num_layers))
    vocabulary = whole.model.config.vocab_size
    prompts = make_prompts(BATCH, vocabulary)
    generator = torch.Generator().manual_seed(1)
    targets = torch.softmax(3 * torch.randn(BATCH, TUNED, 64, generator=generator), -1).to(device)
    world = World(whole, head, prompts, targets, layers)
    world.trunk = trunk  # type: ignore[attr-defined]
    masters = {"whole": RouterMasters(whole, layers), "head": RouterMasters(head, layers)}

    results: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in PATHS}
    for name in PATHS:
        with FlopCounterMode(display=False) as counter:
            loss, gradients = step(world, name, masters)
        results[name] |= {"flops": counter.get_total_flops(), "loss": float(loss), "gradients": gradients}
    build: list[float] = []
    now, order = clock(device), random.Random(0)
    for _ in range(chosen.rounds):
        names = [*PATHS, "build"]
        order.shuffle(names)
        for name in names:
            started = now()
            if name == "build":
                build_cache(world)
                build.append(now() - started)
            else:
                step(world, name, masters)
                results[name]["seconds"].append(now() - started)
    return report(Bench("engine"), world, results, min(build), chosen)


def report(bench: Bench, world: World, results: dict[str, dict[str, Any]], build: float, chosen: Any) -> int:
    """Print the table, check the gates."""
    base = results["plain"]
    fastest = {name: min(r["seconds"]) for name, r in results.items()}
    rows, worst_loss, worst_gradient = [], 0.0, 0.0
    tokens = sum(len(p.prompt_ids) for p in world.prompts)
    for name, result in results.items():
        loss_difference = abs(result["loss"] / base["loss"] - 1)
        gradient_difference = max(
            float((mine - theirs).norm() / theirs.norm())
            for mine, theirs in zip(result["gradients"], base["gradients"], strict=True)
        )
        worst_loss, worst_gradient = max(worst_loss, loss_difference), max(worst_gradient, gradient_difference)
        flops, seconds = base["flops"] / result["flops"], fastest["plain"] / fastest[name]
        rows.append(
            [
                name,
                PATHS[name][2],
                f"{result['flops'] / 1e9:.1f}",
                f"{flops:.2f}",
                f"{1e3 * fastest[name]:.0f}",
                f"{seconds:.2f}",
                f"{loss_difference:.0e}",
                f"{gradient_difference:.0e}",
            ]
        )
        bench.figures[name] = {
            "gflops": result["flops"] / 1e9,
            "flops_ratio": flops,
            "milliseconds": 1e3 * fastest[name],
            "time_ratio": seconds,
            "loss_difference": loss_difference,
            "gradient_difference": gradient_difference,
            "tokens_per_second": tokens / fastest[name],
        }
    device = machine()
    print(
        f"{device}\n{BATCH} prompts, {tokens} tokens, last {TUNED} of {world.whole.num_layers} layers; best of {chosen.rounds}\n"
    )
    unit = "CPU ms" if chosen.device == "cpu" else "ms"
    table(["path", "what it does", "GFLOP", "fewer", unit, "faster", "loss differs", "gates' gradient differs"], rows)
    t_plain, t_full = fastest["plain"], fastest["full"]
    alone, shared = 3 * t_plain / (3 * t_full + build), t_plain / t_full
    trial = 30 * t_plain / (30 * t_full + build)
    bench.figures["build_milliseconds"] = 1e3 * build
    bench.figures |= {"epochs_with_build": alone, "epochs_from_extraction": shared, "ten_trials": trial}
    print(
        f"\nbuilding the cache: {1e3 * build:.0f} {unit}. Composed from these times: three epochs {alone:.2f} times faster "
        f"with the cache built for them, {shared:.2f} from the extraction's; a trial of ten on one cache {trial:.2f}"
    )
    if chosen.device == "cuda":
        rate = device["matmul_tflops"]
        reached = results["full"]["flops"] / t_full / 1e12
        print(
            f"full: {tokens / t_full:,.0f} tokens/s, {reached / rate:.0%} of the device's matmul rate, peak memory "
            f"{peak_gpu():.1f} GB"
        )
        return bench.finish(chosen.json)
    bench.gate("loss, relative difference, worst path", worst_loss, "at most", 1e-5, "4e-7")
    bench.gate("gates' gradient, relative difference, worst path", worst_gradient, "at most", 1e-5, "4e-7")
    bench.gate("counted FLOPs of a step, times fewer", base["flops"] / results["full"]["flops"], "at least", 5, "6.5")
    bench.gate("CPU time of a step, times faster", shared, "at least", 4.5, "6")
    bench.gate("3 epochs with building the cache, times faster", alone, "at least", 3, "3.8")
    bench.gate("3 epochs from the extraction's cache, times faster", shared, "at least", 4.5, "6")
    bench.gate("a trial of ten on one cache, times faster", trial, "at least", 5, "5.7")
    return bench.finish(chosen.json)


def peak_gpu() -> float:
    """GB of the GPU's memory at the fullest moment."""
    import torch

    return torch.cuda.max_memory_allocated() / 1e9


if __name__ == "__main__":
    sys.exit(main())
