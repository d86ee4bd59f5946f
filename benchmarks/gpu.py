"""Every figure that a GPU must give, in one command: extraction, its part of the matmul rate, a training step, three epochs.

    make bench-gpu                              # or: python benchmarks/gpu.py [--json FILE]
    python benchmarks/gpu.py --device cpu --tiny    # proves the command without a GPU; its figures are no GPU's

OLMoE-1B-7B's shape and Qwen3-30B-A3B's, or as many of its layers as fit, in bf16 with random weights made on the device. Each
is held against transformers' own forward in the same process: padded batches of questions of like length, logits at the last
token alone. Needs torch and transformers; neither Ray, MLflow nor FAISS. `--vllm` puts vLLM's prefill rate on the same prompts
beside it where vLLM is installed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import Bench, make_prompts, matmul_rate, options, table

os.environ.setdefault("HF_HUB_OFFLINE", "1")

QUESTIONS, EPOCHS = 49_000, 3
NO_GPU = "NO GPU FIGURE: this run was on a CPU and proves the command alone"


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
    finally:
        masters.detach()
    (loss, wanted), (own_loss, own) = results["plain"], results["full"]
    return {
        "questions": len(some),
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


# -- the report ---------------------------------------------------------------------------------------------------------


def peak(device: str, reset: bool = True) -> float | None:
    """GB of the GPU's memory at the fullest moment since the last call; None on a CPU, where it is not measured."""
    import torch

    if device != "cuda":
        return None
    found = torch.cuda.max_memory_allocated() / 1e9
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return found


def measure(shape: Any, chosen: Any, matmul: float, place: Path) -> dict[str, Any]:
    """All figures of one shape."""
    import torch
    from gpu_shapes import build, fitting_layers, head_of

    dtype = torch.bfloat16 if chosen.device == "cuda" else torch.float32
    room = torch.cuda.mem_get_info()[0] if chosen.device == "cuda" else None
    layers = fitting_layers(shape, room, dtype)
    part = build(shape, layers, chosen.device, dtype)
    prompts = make_prompts(chosen.prompts, part.model.config.vocab_size)
    ground = Ground(shape, part, prompts, chosen.device, 1024 if chosen.tiny else 32_768, place, matmul)
    found: dict[str, Any] = {
        "layers": layers,
        "of_layers": shape.layers,
        "dtype": str(dtype).removeprefix("torch."),
        "prompts": len(prompts),
        "tokens": ground.tokens,
    }
    peak(chosen.device)
    found["self_check"] = self_check(ground)
    found["experts_backends"] = backends(ground)
    found["experts_backend"] = part.model.config._experts_implementation
    found["extraction"], routing = extraction(ground, chosen.rounds)
    found["peak_gb_extraction"] = peak(chosen.device)
    head = head_of(part, ground.cut)
    found["step"] = one_step(ground, head, chosen.rounds)
    found["peak_gb_step_of_both"] = peak(chosen.device)
    validation = min(64, len(prompts) // 4)
    found["training"] = training(ground, head, routing, validation, EPOCHS if chosen.measure_epochs else 1)
    found["peak_gb_training"] = peak(chosen.device)
    found["extraction_of_49000_composed_seconds"] = (
        QUESTIONS / len(prompts) * found["extraction"]["ours, prefix shared, cache written"]["seconds"]
    )
    return found


def show(shape: Any, found: dict[str, Any]) -> None:
    """Print one shape's figures."""
    part = "" if found["layers"] == found["of_layers"] else f" of {found['of_layers']}"
    print(
        f"\n## {shape.name}: {found['layers']}{part} layers, {found['dtype']}, {found['prompts']} prompts, "
        f"{found['tokens']:,} tokens, experts by {found['experts_backend']}\n"
    )
    table(
        ["extraction", "s", "tokens/s", "of the matmul rate", "faster", "r differs", "same answers"],
        [
            [
                name,
                f"{row['seconds']:.3f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['part_of_matmul_rate']:.1%}",
                f"{row['times_faster']:.2f}",
                f"{row['routing_differs']:.0e}",
                f"{row['same_answers']:.0%}",
            ]
            for name, row in found["extraction"].items()
        ],
    )
    print("\nexperts, tokens/s of one batch (ours / transformers'):")
    for name, row in found["experts_backends"].items():
        print(f"  {name}: {row.get('failed') or '{ours:,.0f} / {stock:,.0f}'.format(**row)}")
    step, loop = found["step"], found["training"]
    print(
        f"one step's loss and gradients, {step['questions']} questions: transformers {1e3 * step['transformers_seconds']:.1f} ms, "
        f"ours {1e3 * step['ours_seconds']:.1f} ms, {step['times_faster']:.2f} times faster; loss differs by "
        f"{step['loss_differs']:.0e}, gradients by {step['gradient_differs']:.0e}\n"
        f"a step of the training loop, reading its cache: {1e3 * loop['step_seconds']:.1f} ms ({loop['questions_per_second']:,.0f} "
        f"questions/s; reading alone {1e3 * loop['cache_read_seconds_a_step']:.1f} ms, in a thread beside it)\n"
        f"49,000 questions, composed from these: extraction {found['extraction_of_49000_composed_seconds']:,.0f} s, three epochs "
        f"{loop['three_epochs_of_49000_composed_seconds']:,.0f} s (without validation)\n"
        "measured: {questions:,} questions, {epochs} epoch(s), start, probe and validation included: {seconds:,.1f} s".format(
            **loop["measured"]
        )
    )
    gb = {key: value for key, value in found.items() if key.startswith("peak_gb_")}
    told = ", ".join(f"{key.removeprefix('peak_gb_')} {value:.1f} GB" for key, value in gb.items() if value is not None)
    print(f"peak memory: {told or 'not measured on a CPU'}")
    print(f"self-check: {json.dumps(found['self_check'])}")


def judge(bench: Bench, shape: Any, found: dict[str, Any]) -> None:
    """The goals for one GPU. Of a part of the layers the rate is scaled to all of them, which overstates the ends' cost."""
    rate = found["extraction"]["ours"]["tokens_per_second"] * found["layers"] / found["of_layers"]
    what = "" if found["layers"] == found["of_layers"] else ", composed from a part of the layers"
    goal = f"{shape.name}: extraction without sharing, tokens/s{what} (the floor is an H100's)"
    bench.gate(goal, rate, "at least", shape.floor, f"{shape.floor:,.0f}")
    bench.gate(f"{shape.name}: self-check passed", float("refused" not in found["self_check"]), "at least", 1, "1")


def vllm_rates(shape: Any, prompts: Sequence[Any], layers: int) -> dict[str, Any]:
    """vLLM's prefill rate on the same prompts, in a process of its own; why not, where it cannot be had."""
    if find_spec("vllm") is None:
        return {"not_run": "vLLM is not installed"}
    with tempfile.TemporaryDirectory() as place:
        config = shape.config(layers)
        config.architectures = [{"olmoe": "OlmoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}[shape.model_type]]
        config.save_pretrained(place)
        asked = Path(place) / "prompts.json"
        asked.write_text(json.dumps([list(p.prompt_ids) for p in prompts]))
        script = str(Path(__file__).with_name("gpu_vllm.py"))
        found = {}
        for way in ("apart", "shared"):
            command = [sys.executable, script, place, str(asked), way]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                return {"not_run": f"vLLM failed: {' '.join(done.stderr.strip().splitlines()[-1:])}"}
            found[way] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def more(parser: argparse.ArgumentParser) -> None:
    """The options beside those of all benchmarks."""
    parser.add_argument("--shapes", default="olmoe,qwen3", help="which, comma-separated (default: olmoe,qwen3)")
    parser.add_argument("--prompts", type=int, help="questions (default 4,096; 64 with --tiny)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="the families at a tiny shape, to prove the command")
    parser.add_argument("--vllm", action="store_true", help="vLLM's prefill rate beside it, where it is installed")
    parser.add_argument(
        "--measure-epochs",
        action="store_true",
        help="extract 49,000 questions and train three epochs, 15 to 20 GB of disk, in place of composing them",
    )


def main() -> int:
    """Measure each shape, print and judge it."""
    chosen = options(__doc__ or "", more)
    if chosen.device == "cpu" and not chosen.tiny:
        print("no GPU here, and these shapes need one; `--device cpu --tiny` proves the command alone", file=sys.stderr)
        return 2
    import torch
    from gpu_shapes import SHAPES

    unknown = sorted(set(chosen.shapes.split(",")) - set(SHAPES))
    if unknown:
        print(f"no shape is called {', '.join(unknown)}; there are {', '.join(SHAPES)}", file=sys.stderr)
        return 2
    chosen.prompts = chosen.prompts or (64 if chosen.tiny else QUESTIONS + 64 if chosen.measure_epochs else 4096)
    if chosen.prompts < 64:
        print("--prompts: at least 64, for a step takes 32 and the loop must take two", file=sys.stderr)
        return 2
    bench, gpu = Bench("gpu"), chosen.device == "cuda"
    name = torch.cuda.get_device_name() if gpu else NO_GPU
    matmul = matmul_rate(chosen.device)
    bench.figures |= {"device": name, "tiny": chosen.tiny, "matmul_tflops": matmul / 1e12}
    print(f"{name}\ntorch {torch.__version__}, matmul {matmul / 1e12:.3g} TFLOP/s")
    for key in chosen.shapes.split(","):
        shape = SHAPES[key].tiny() if chosen.tiny else SHAPES[key]
        with tempfile.TemporaryDirectory() as place:
            found = measure(shape, chosen, matmul, Path(place))
        bench.figures[key] = found
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
        show(shape, found)
        if chosen.vllm:
            prompts = make_prompts(chosen.prompts, shape.values["vocab_size"])
            found["vllm"] = vllm_rates(shape, prompts, found["layers"])
            print(f"vLLM: {json.dumps(found['vllm'])}")
        if gpu and not chosen.tiny:
            judge(bench, shape, found)
    if not gpu:
        print(f"\n{name}")
    return bench.finish(chosen.json)


if __name__ == "__main__":
    sys.exit(main())
