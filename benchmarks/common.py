"""What the benchmarks share: the model and prompts that are measured, gates, tables, JSON, and what the machine is."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# glibc keeps memory for itself, for all variants alike: giving it back and asking again costs a third of the time of some.
_GLIBC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}

PREFIX_TOKENS = 18


def steady_process(threads: int = 1) -> None:
    """One thread and a steady allocator: starts the script again where the environment says otherwise."""
    wanted = {**_GLIBC, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    import torch

    torch.set_num_threads(threads)


def save_model(
    folder: Path,
    *,
    hidden: int = 512,
    layers: int = 16,
    experts: int = 64,
    top_k: int = 8,
    expert_width: int = 256,
    heads: int = 8,
    vocabulary: int = 12_576,
    dtype: str = "float32",
) -> Path:
    """Write a randomly initialised OLMoE whose parts weigh against one another as in OLMoE-1B-7B, at a quarter of its width.

    A vocabulary of 12,576 makes `lm_head` 10 % of the layers' arithmetic, as 50,304 does at the real width. Gates are scaled
    by 3, which gives routing of a realistic spread.
    """
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=expert_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_experts=experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=512,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = OlmoeForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.mul_(3)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def make_prompts(count: int, vocabulary: int, seed: int = 0) -> list[Any]:
    """Letter prompts of 50 to 200 tokens (mean 94), the first 18 shared by all, with four choices."""
    from roma_ray.questions.prompts import Prompt

    rng = random.Random(seed)
    shared = tuple(rng.randrange(10, vocabulary) for _ in range(PREFIX_TOKENS))
    prompts = []
    for number in range(count):
        length = min(200, 50 + int(rng.expovariate(1 / 46)))
        ids = shared + tuple(rng.randrange(10, vocabulary) for _ in range(length - PREFIX_TOKENS))
        prompts.append(
            Prompt(str(number), "t", "train", ids, ((1,), (2,), (3,), (4,)), (1,) * 4, rng.randrange(4), False)
        )
    return prompts


def save_questions(place: Path, prompts: Sequence[Any]) -> None:
    """Write prompts as the table that a questions stage leaves in its folder."""
    from roma_ray.engine.question_table import QUESTIONS, write_table

    columns: dict[str, Any] = {
        "row": range(len(prompts)),
        "id": [p.id for p in prompts],
        "task": [p.task for p in prompts],
        "split": [p.split for p in prompts],
        "question": [p.id for p in prompts],
        "choices": [["a", "b", "c", "d"]] * len(prompts),
        "answer": [p.answer for p in prompts],
        "context": [None] * len(prompts),
        "prompt_ids": [list(p.prompt_ids) for p in prompts],
        "choice_ids": [[list(c) for c in p.choice_ids] for p in prompts],
        "choice_chars": [list(p.choice_chars) for p in prompts],
        "truncated": [False] * len(prompts),
    }
    write_table(place / "questions.parquet", columns, QUESTIONS)


@dataclass
class Bench:
    """One script's figures and gates."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    gates: list[tuple[str, float, str, float, str]] = field(default_factory=list)

    def gate(self, what: str, value: float, rule: str, floor: float, aim: str) -> None:
        """A figure that must be `at least` or `at most` a floor; `aim` is what is wished for."""
        assert rule in ("at least", "at most")
        self.gates.append((what, value, rule, floor, aim))

    def finish(self, json_path: str | None) -> int:
        """Print the gates, write the JSON file; the exit code is 1 when a floor is missed."""
        missed = 0
        if self.gates:
            print("\n| gate | measured | floor | aim | |")
            print("| --- | --- | --- | --- | --- |")
        for what, value, rule, floor, aim in self.gates:
            good = value >= floor if rule == "at least" else value <= floor
            missed += not good
            print(f"| {what} | {value:.3g} | {rule} {floor:g} | {aim} | {'pass' if good else 'FAIL'} |")
        if json_path:
            result = {
                "benchmark": self.name,
                "machine": machine(),
                "figures": self.figures,
                "gates": [
                    dict(zip(("what", "value", "rule", "floor", "aim"), gate, strict=True)) for gate in self.gates
                ],
                "missed": missed,
            }
            Path(json_path).write_text(json.dumps(result, indent=1) + "\n")
        return 1 if missed else 0


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    from roma_ray.engine.devices import usable_cores

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    found: dict[str, Any] = {"cpu": name, "cores": usable_cores(), "torch": torch.__version__}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["matmul_tflops"] = round(matmul_rate("cuda") / 1e12, 1)
    return found


def matmul_rate(device: str) -> float:
    """Measured FLOP/s of a large matmul, what the device gives at best: in bf16 on a GPU, in fp32 and smaller on a CPU."""
    import time

    import torch

    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    a = torch.randn(size, size, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)
    for _ in range(3):
        a @ a
    wait()
    started = time.perf_counter()
    for _ in range(20):
        a @ a
    wait()
    return 20 * 2 * size**3 / (time.perf_counter() - started)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(head) + " |")
    print("| " + " | ".join("---" for _ in head) + " |")
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")


def options(description: str, more: Callable[[argparse.ArgumentParser], None] = lambda parser: None) -> Any:
    """The command line of a benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    more(parser)
    chosen = parser.parse_args()
    if chosen.device == "auto":
        import torch

        chosen.device = "cuda" if torch.cuda.is_available() else "cpu"
    return chosen
