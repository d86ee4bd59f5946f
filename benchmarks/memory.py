"""Peak memory with a full-size OLMoE-1B-7B (6.9 billion parameters, 13.8 GB in bf16), randomly initialised on this machine.

    python benchmarks/memory.py [--json FILE] [--folder DIR] [--questions 60]

Each stage runs in a process of its own on the CPU: `extract` with `extraction.memory_gb` (slices streamed), then `finetune` (the last
five layers' routers from the cache). Two figures a stage: resident memory as the system counts it, with the pages of mapped
checkpoint files that happen to be in memory and that it may take back at any time; and the process's own (anonymous) memory
alone. The gates are on the first. The checkpoint (kept in DIR for the next time) needs 14 GB of disk.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import Bench, machine, options, table

ROOT = Path(__file__).resolve().parents[1]
LAYERS, HIDDEN, WIDTH, EXPERTS, VOCABULARY = 16, 2048, 1024, 64, 50_304


def save_full_size(folder: Path) -> None:
    """Write the checkpoint in the hub's layout (a tensor an expert), a file a layer, index and configuration last."""
    import torch
    from safetensors.torch import save_file
    from transformers import OlmoeConfig

    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}

    def random(*shape: int, scale: float = 0.02) -> Any:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, scale, generator=generator)

    def write(name: str, tensors: dict[str, Any]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    write(
        "ends.safetensors",
        {
            "model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
            "lm_head.weight": random(VOCABULARY, HIDDEN),
            "model.norm.weight": ones.clone(),
        },
    )
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        tensors = {f"{at}.self_attn.{n}_proj.weight": random(HIDDEN, HIDDEN) for n in "qkvo"}
        tensors |= {f"{at}.self_attn.{n}_norm.weight": ones.clone() for n in "qk"}
        tensors |= {f"{at}.{n}_layernorm.weight": ones.clone() for n in ("input", "post_attention")}
        tensors[f"{at}.mlp.gate.weight"] = random(EXPERTS, HIDDEN, scale=0.06)
        for expert in range(EXPERTS):
            own = f"{at}.mlp.experts.{expert}"
            tensors |= {f"{own}.{n}_proj.weight": random(WIDTH, HIDDEN) for n in ("gate", "up")}
            tensors[f"{own}.down_proj.weight"] = random(HIDDEN, WIDTH)
        write(f"layer-{layer:02d}.safetensors", tensors)
    assets = ROOT / "roma_ray" / "assets" / "model"
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (assets / file).exists():
            shutil.copy(assets / file, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        architectures=["OlmoeForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)


class Peaks(threading.Thread):
    """Samples this process's memory until it ends."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.own = 0

    def run(self) -> None:
        while True:
            self.own = max(self.own, _status("RssAnon"))
            time.sleep(0.02)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def stage(until: str, model: str, storage: str, questions: int, memory_gb: float) -> None:
    """Run the pipeline up to a stage in this process and print its peaks as JSON."""
    peaks = Peaks()
    peaks.start()
    from roma_ray.config.loading import load_config
    from roma_ray.engine.progress import Silence
    from roma_ray.engine.setup import resolve
    from roma_ray.runs.pipeline import run

    demo = load_config()
    source = demo.questions.sources[0].path
    config = load_config(
        None,
        [
            f"model.path={model}",
            "model.dtype=auto",
            f"storage={storage}",
            f"extraction.memory_gb={memory_gb}",
            f"questions.sources=[{{path: {source}, limit: {questions}}}]",
            "questions.prompt.format=letter",
            "questions.test_fraction=0.2",
            "finetune.epochs=1",
            "finetune.batch_size=16",
            "threads=2",
            "device=cpu",
        ],
    )
    started = time.monotonic()
    run(resolve(config), Silence(), until=until)
    seconds = time.monotonic() - started
    print("PEAKS " + json.dumps({"resident": _status("VmHWM") / 1e9, "own": peaks.own / 1e9, "seconds": seconds}))


def main() -> int:
    """Make the checkpoint, run both stages, print the table and the gates."""
    if len(sys.argv) > 1 and sys.argv[1] == "stage":
        stage(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), float(sys.argv[6]))
        return 0

    def more(parser: Any) -> None:
        parser.add_argument("--folder", default=str(Path(tempfile.gettempdir()) / "roma-ray-olmoe-1b-7b"))
        parser.add_argument("--questions", type=int, default=60)
        parser.add_argument("--memory-gb", type=float, default=1.8)

    chosen = options(__doc__ or "", more)
    model = Path(chosen.folder)
    save_full_size(model)
    bench, rows = Bench("memory"), []
    print(f"{machine()}\nOLMoE-1B-7B's shape, bf16, CPU, {chosen.questions} questions, memory_gb={chosen.memory_gb}\n")
    with tempfile.TemporaryDirectory() as storage:
        for until in ("extract", "finetune"):
            command = [
                sys.executable,
                __file__,
                "stage",
                until,
                str(model),
                storage,
                str(chosen.questions),
                str(chosen.memory_gb),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(done.stderr[-3000:], file=sys.stderr)
                return 2
            line = next(x for x in done.stdout.splitlines() if x.startswith("PEAKS "))
            found = json.loads(line.removeprefix("PEAKS "))
            bench.figures[until] = found
            rows.append([until, f"{found['resident']:.2f}", f"{found['own']:.2f}", f"{found['seconds']:.0f}"])
    table(["stage", "peak resident GB (mapped pages count)", "its own memory GB", "s"], rows)
    bench.gate("streamed extraction, peak resident GB", bench.figures["extract"]["resident"], "at most", 6, "4")
    bench.gate(
        "finetuning the last five routers, peak resident GB", bench.figures["finetune"]["resident"], "at most", 8, "6"
    )
    return bench.finish(chosen.json)


if __name__ == "__main__":
    sys.exit(main())
