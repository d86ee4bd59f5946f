"""Extraction: routing weights of all layers and answers for a set of prompts, with and without writing the cache.

    python benchmarks/extract.py [--json FILE] [--prompts 128] [--rounds 2]

`naive` is the stock model in input order, batches of 32, with `output_router_logits=True` and logits everywhere. `ours` is what
the extract stage runs on its planned batches. fp32 and one thread on a CPU, bf16 on a GPU; the variants run interleaved.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Bench, machine, make_prompts, options, save_model, steady_process, table
from engine import clock, peak_gpu

CUT = 11


def naive(model: Any, prompts: Sequence[Any]) -> tuple[Any, Any]:
    """Routing at the last token [N, L, E] and the four letters' log-likelihoods [N, 4]."""
    import torch

    routing, scores = [], []
    for start in range(0, len(prompts), 32):
        some = prompts[start : start + 32]
        lengths = torch.tensor([len(p.prompt_ids) for p in some], device=model.device)
        width = int(lengths.max())
        ids = torch.tensor([[*p.prompt_ids, *[0] * (width - len(p.prompt_ids))] for p in some], device=model.device)
        mask = (torch.arange(width, device=model.device) < lengths[:, None]).long()
        output = model(ids, attention_mask=mask, output_router_logits=True, use_cache=False)
        rows = torch.arange(len(some), device=model.device)
        routing.append(
            torch.stack(
                [
                    torch.softmax(x.float(), -1).unflatten(0, (len(some), width))[rows, lengths - 1]
                    for x in output.router_logits
                ],
                dim=1,
            )
        )
        scores.append(torch.log_softmax(output.logits.float(), -1)[rows, lengths - 1][:, 1:5])
    return torch.cat(routing), torch.cat(scores)


def ours(
    part: Any, prompts: Sequence[Any], plan: Sequence[Sequence[int]], prefix: int, folder: Path | None
) -> tuple[Any, Any]:
    """The same by the engine; with a folder the states at the cut are written there."""
    import torch

    from roma_ray.engine.extractor import Reading, run_part
    from roma_ray.engine.forward import choice_scores, lay_out
    from roma_ray.store.tensors import write_tensors

    routing, scores = [None] * len(prompts), [None] * len(prompts)
    for number, rows in enumerate(plan):
        reading = Reading.of(lay_out([prompts[r] for r in rows], prefix=prefix), ("Last1",))
        states, kept, tape = run_part(part, reading, None, (CUT,) if folder else ())
        found = choice_scores(states, reading.keep, reading.layout)
        own = reading.routing(tape)["Last1"]
        for n, row in enumerate(rows):
            routing[row], scores[row] = torch.from_numpy(own[n]), torch.tensor(found[n])
        if folder:
            write_tensors(folder / f"{number}.safetensors", {"hidden": kept[CUT].cpu().contiguous()})
    return torch.stack(routing), torch.stack(scores)


def main() -> int:
    """Measure, print the table and the gates."""
    steady_process()

    def more(parser: Any) -> None:
        parser.add_argument("--prompts", type=int, default=128)
        parser.add_argument("--rounds", type=int, default=2)

    chosen = options(__doc__ or "", more)
    import torch

    from roma_ray.engine.batches import plan_batches
    from roma_ray.engine.forward import own_tokens, shared_prefix
    from roma_ray.moe.slices import load_slice

    device = chosen.device
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    sizes = {} if device == "cpu" else {"hidden": 2048, "expert_width": 1024, "heads": 16, "vocabulary": 50_304}
    bench, now, order = Bench("extract"), clock(device), random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        save_model(Path(place) / "model", dtype=str(dtype).removeprefix("torch."), **sizes)
        backend = "eager" if device == "cpu" else "grouped_mm"
        part = load_slice(
            str(Path(place) / "model"), dtype=dtype, device=device, with_lm_head=True, experts_backend=backend
        )
        prompts = make_prompts(chosen.prompts, part.model.config.vocab_size)
        prefix = shared_prefix(prompts)
        plan = plan_batches([own_tokens(p, prefix) for p in prompts], 4096 if device == "cpu" else 32_768)
        variants = {
            "naive": lambda: naive(part.model, prompts),
            "ours": lambda: ours(part, prompts, plan, prefix, None),
            "ours, writing the cache": lambda: ours(part, prompts, plan, prefix, Path(place)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        results: dict[str, Any] = {}
        with torch.inference_mode():
            for _ in range(chosen.rounds):
                names = [*variants]
                order.shuffle(names)
                for name in names:
                    started = now()
                    results[name] = variants[name]()
                    seconds[name].append(now() - started)
    tokens = sum(len(p.prompt_ids) for p in prompts)
    best = {name: min(values) for name, values in seconds.items()}
    print(
        f"{machine()}\n{len(prompts)} prompts, {tokens} tokens, {len(plan)} planned batches; best of {chosen.rounds}\n"
    )
    rows = []
    for name, value in best.items():
        difference = float((results[name][0].cpu() - results["naive"][0].cpu()).abs().max())
        same = float((results[name][1].cpu().argmax(1) == results["naive"][1].cpu().argmax(1)).float().mean())
        rows.append(
            [
                name,
                f"{value:.2f}",
                f"{best['naive'] / value:.2f}",
                f"{tokens / value:,.0f}",
                f"{difference:.0e}",
                f"{same:.0%}",
            ]
        )
        bench.figures[name] = {"seconds": value, "ratio": best["naive"] / value, "tokens_per_second": tokens / value}
    table(["extraction", "CPU s" if device == "cpu" else "s", "faster", "tokens/s", "r differs", "same answers"], rows)
    overhead = best["ours, writing the cache"] / best["ours"] - 1
    if device == "cuda":
        print(
            f"peak memory {peak_gpu():.1f} GB; 49,000 questions of this length: "
            f"{49_000 * tokens / len(prompts) / (tokens / best['ours, writing the cache']):.0f} s"
        )
        return bench.finish(chosen.json)
    bench.gate(
        "extraction with its cache, CPU time, times faster",
        best["naive"] / best["ours, writing the cache"],
        "at least",
        1.8,
        "2.7",
    )
    bench.gate("writing the cache, part of the extraction's CPU time", overhead, "at most", 0.10, "0.05")
    return bench.finish(chosen.json)


if __name__ == "__main__":
    sys.exit(main())
