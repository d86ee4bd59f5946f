"""Peak memory with a full-size OLMoE-1B-7B (6.9 billion parameters, 13.8 GB in bf16), randomly initialised on this machine.

    python benchmarks/memory.py [--json FILE] [--folder DIR] [--questions 60]

Each stage runs in a process of its own on the CPU: `extract` with `extraction.memory_gb` (slices streamed), then `finetune` (the last
five layers' routers from the cache). Two figures a stage: resident memory as the system counts it, with the pages of mapped
checkpoint files that happen to be in memory and that it may take back at any time; and the process's own (anonymous) memory
alone. The gates are on the first. The checkpoint (kept in DIR for the next time) needs 14 GB of disk.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from common import Bench, machine, options, table
from full_size import Checkpoint, measure, ones, settings

LAYERS, HIDDEN, WIDTH, EXPERTS, VOCABULARY = 16, 2048, 1024, 64, 50_304
CONFIG = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "dtype": "bfloat16",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 8,
}


def save_olmoe(folder: Path) -> None:
    """Write the checkpoint as it is published (a tensor an expert), a file a layer, where it is not there yet."""
    if (folder / "config.json").exists():
        return
    checkpoint = Checkpoint(folder)
    checkpoint.ends(HIDDEN, VOCABULARY)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        tensors = {f"{at}.self_attn.{n}_proj.weight": checkpoint.random(HIDDEN, HIDDEN) for n in "qkvo"}
        tensors |= {f"{at}.self_attn.{n}_norm.weight": ones(HIDDEN) for n in "qk"}
        tensors |= {f"{at}.{n}_layernorm.weight": ones(HIDDEN) for n in ("input", "post_attention")}
        tensors[f"{at}.mlp.gate.weight"] = checkpoint.random(EXPERTS, HIDDEN, scale=0.06)
        for expert in range(EXPERTS):
            tensors |= checkpoint.mlp(f"{at}.mlp.experts.{expert}", HIDDEN, WIDTH)
        checkpoint.write(f"layer-{layer:02d}.safetensors", tensors)
    checkpoint.finish(CONFIG)


def main() -> int:
    """Make the checkpoint, run both stages, print the table and the gates."""

    def more(parser: Any) -> None:
        parser.add_argument("--folder", default=str(Path(tempfile.gettempdir()) / "roma-ray-olmoe-1b-7b"))
        parser.add_argument("--questions", type=int, default=60)
        parser.add_argument("--memory-gb", type=float, default=1.8)

    chosen = options(__doc__ or "", more)
    model = Path(chosen.folder)
    save_olmoe(model)
    bench, rows = Bench("memory"), []
    print(f"{machine()}\nOLMoE-1B-7B's shape, bf16, CPU, {chosen.questions} questions, memory_gb={chosen.memory_gb}\n")
    with tempfile.TemporaryDirectory() as storage:
        for until in ("extract", "finetune"):
            found = measure(until, settings(model, storage, chosen.questions, chosen.memory_gb, threads=2))
            if found is None:
                return 2
            bench.figures[until] = found
            peaks = (f"{found['resident']:.2f}", f"{found['own']:.2f}")
            rows.append([until, *peaks, f"{found['seconds']:.0f}", f"{found['cpu']:.0f}"])
    table(["stage", "peak resident GB (mapped pages count)", "its own memory GB", "s", "CPU s"], rows)
    bench.gate("streamed extraction, peak resident GB", bench.figures["extract"]["resident"], "at most", 6, "4")
    bench.gate(
        "finetuning the last five routers, peak resident GB", bench.figures["finetune"]["resident"], "at most", 8, "6"
    )
    return bench.finish(chosen.json)


if __name__ == "__main__":
    sys.exit(main())
