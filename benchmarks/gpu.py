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
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import Bench, make_prompts, matmul_rate, options, table
from gpu_measures import EPOCHS, QUESTIONS, Ground, backends, extraction, one_step, peak, self_check, training

os.environ.setdefault("HF_HUB_OFFLINE", "1")

NO_GPU = "NO GPU FIGURE: this run was on a CPU and proves the command alone"


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
    waits = found["extraction"]["ours"]["host_waits_a_batch"]
    if waits is not None:
        print(
            f"the host waits for the GPU {waits:.0f} times a batch of the extraction, {step['host_waits']} times a step"
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
