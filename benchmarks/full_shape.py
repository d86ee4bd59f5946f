"""A full-shape DeepSeekMoE-16B (16.4 billion parameters, 33 GB in bf16), randomly initialised: streamed and finetuned on the CPU.

    python benchmarks/full_shape.py [--layers 28] [--questions 40] [--folder DIR] [--json FILE]

The checkpoint has the published configuration, keys and shapes, or with `--layers` the first so many of its layers. Each stage runs
on one thread in a process of its own: `extract`, a slice of `--memory-gb` at a time, then `finetune` (the last five layers'
routers from the cache). Memory is measured as in `memory.py`, the gates are on resident memory, which counts mapped pages. The
checkpoint stays in DIR for the next time.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Bench, machine, options, table
from full_size import Checkpoint, measure, ones, settings, status

LAYERS, HIDDEN, VOCABULARY = 28, 2048, 102_400
DENSE_WIDTH, EXPERT_WIDTH, EXPERTS, SHARED = 10_944, 1408, 64, 2
# config.json of deepseek-ai/deepseek-moe-16b-base.
PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": DENSE_WIDTH,
    "max_position_embeddings": 4096,
    "model_type": "deepseek",
    "moe_intermediate_size": EXPERT_WIDTH,
    "moe_layer_freq": 1,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": SHARED,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}


def save_deepseek(folder: Path, layers: int) -> str:
    """Write the checkpoint as it is published (a tensor an expert), a file a layer; says what that took."""
    config = {**PUBLISHED, "num_hidden_layers": layers}
    file = folder / "config.json"
    if file.exists():
        if json.loads(file.read_text()) != config:
            raise SystemExit(f"{folder} holds another model than this one of {layers} layers; give another --folder")
        return "was there"
    started = time.monotonic()
    checkpoint = Checkpoint(folder)
    checkpoint.ends(HIDDEN, VOCABULARY)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors = {f"{at}.self_attn.{n}_proj.weight": checkpoint.random(HIDDEN, HIDDEN) for n in "qkvo"}
        tensors |= {f"{at}.{n}_layernorm.weight": ones(HIDDEN) for n in ("input", "post_attention")}
        if layer < PUBLISHED["first_k_dense_replace"]:
            tensors |= checkpoint.mlp(f"{at}.mlp", HIDDEN, DENSE_WIDTH)
        else:
            tensors[f"{at}.mlp.gate.weight"] = checkpoint.random(EXPERTS, HIDDEN, scale=0.06)
            tensors |= checkpoint.mlp(f"{at}.mlp.shared_experts", HIDDEN, SHARED * EXPERT_WIDTH)
            for expert in range(EXPERTS):
                tensors |= checkpoint.mlp(f"{at}.mlp.experts.{expert}", HIDDEN, EXPERT_WIDTH)
        checkpoint.write(f"layer-{layer:02d}.safetensors", tensors)
    checkpoint.finish(config)
    return f"written in {time.monotonic() - started:.0f} s within {status('VmHWM') / 1e9:.2f} GB of memory"


def main() -> int:
    """Make the checkpoint, run both stages, print the tables and the gates."""

    def more(parser: Any) -> None:
        parser.add_argument("--layers", type=int, default=LAYERS, choices=range(2, LAYERS + 1), metavar="2..28")
        parser.add_argument("--questions", type=int, default=40)
        parser.add_argument("--folder", help="where the checkpoint lies; default: in the folder for temporary files")
        parser.add_argument("--memory-gb", type=float, default=1.8, help="extraction.memory_gb")

    chosen = options(__doc__ or "", more)
    name = f"roma-ray-deepseek-moe-{chosen.layers}"
    folder = Path(chosen.folder or Path(tempfile.gettempdir()) / name)
    written = save_deepseek(folder, chosen.layers)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e9
    bench = Bench("full_shape")
    bench.figures |= {"layers": chosen.layers, "questions": chosen.questions, "disk_gb": size}
    print(
        f"{machine()}\nDeepSeekMoE-16B's shape, {chosen.layers} of {LAYERS} layers, bf16: {size:.1f} GB on disk, {written}"
    )
    print(f"CPU, one thread, {chosen.questions} questions, memory_gb={chosen.memory_gb}\n")
    rows, stages = [], {}
    with tempfile.TemporaryDirectory() as storage:
        overrides = settings(folder, storage, chosen.questions, chosen.memory_gb, threads=1)
        # The first layer has no experts.
        overrides.append(f"routing.layers=L{min(5, chosen.layers - 1)}")
        for until in ("extract", "finetune"):
            found = measure(until, overrides)
            if found is None:
                return 2
            bench.figures[until] = found
            peaks = (f"{found['resident']:.2f}", f"{found['own']:.2f}")
            rows.append([until, *peaks, f"{found['seconds']:.0f}", f"{found['cpu']:.0f}"])
            stages |= found["stages"]
    table(["up to", "peak resident GB (mapped pages count)", "its own memory GB", "s", "CPU s"], rows)
    print()
    table(["stage", "s"], [[stage, f"{seconds:.1f}"] for stage, seconds in stages.items()])
    print()
    table(["self-check, largest difference", ""], [[n, f"{v:.2g}"] for n, v in found["self_check"].items()])
    bench.gate("streamed extraction, peak resident GB", bench.figures["extract"]["resident"], "at most", 6, "4")
    bench.gate(
        "finetuning the last five routers, peak resident GB", bench.figures["finetune"]["resident"], "at most", 12, "9"
    )
    return bench.finish(chosen.json)


if __name__ == "__main__":
    sys.exit(main())
