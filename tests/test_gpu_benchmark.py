"""`make bench-gpu` on the CPU: the command runs without Ray, MLflow and FAISS, and what it reports is what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from roma_ray.engine.extractor import Reading
from roma_ray.engine.forward import lay_out
from roma_ray.moe.passes import run_packed
from tests.hiding import HEAVY, KERNELS, ROOT, run_without

sys.path.insert(0, str(ROOT / "benchmarks"))

from common import make_prompts
from gpu_shapes import SHAPES, build, fitting_layers, head_of, matmul_flops

# What stands for vLLM: as far as `gpu_vllm.py` uses it, and checking what it is given.
VLLM = """
from pathlib import Path
class SamplingParams:
    def __init__(self, max_tokens, temperature, detokenize):
        assert max_tokens == 1
class LLM:
    def __init__(self, model, load_format, enable_prefix_caching, **others):
        assert load_format == "dummy" and (Path(model) / "config.json").exists()
        self.shared = enable_prefix_caching
    def reset_prefix_cache(self):
        assert self.shared
    def generate(self, asked, params, use_tqdm):
        assert len(asked) == 64 and all(one["prompt_token_ids"] for one in asked)
"""


def test_the_command_runs_without_ray_mlflow_faiss_and_kernels_of_cuda(tmp_path: Path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "vllm.py").write_text(VLLM)
    told = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--tiny", "--shapes", "olmoe", "--rounds", "1", "--vllm", "--json", str(told)]
    hidden = (*HEAVY, *KERNELS, "sentence_transformers", "peft", "lm_eval", "datasets", "optuna", "matplotlib")
    done = run_without(hidden, tmp_path / "site", "benchmarks/gpu.py", *options, path=str(tmp_path / "own"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("NO GPU FIGURE")
    assert done.stdout.strip().splitlines()[-1].startswith("NO GPU FIGURE")
    result = json.loads(told.read_text())
    assert result["figures"]["device"].startswith("NO GPU FIGURE")
    assert result["gates"] == [], "the goals are a GPU's, and nothing is judged by them here"
    found = result["figures"]["olmoe"]
    assert found["self_check"]["gradient"] < 1e-4
    for row in found["extraction"].values():
        assert row["routing_differs"] < 1e-5
        assert row["same_answers"] == 1
    assert found["step"]["gradient_differs"] < 1e-4
    assert set(found["experts_backends"]) == {"grouped_mm", "eager"}
    assert found["training"]["steps"] == 2
    steps = 3 * 1532  # 49,000 questions in batches of 32, three times
    composed = found["training"]["three_epochs_of_49000_composed_seconds"]
    assert composed == pytest.approx(steps * found["training"]["step_seconds"])
    assert set(found["vllm"]) == {"apart", "shared"}
    assert found["peak_gb_training"] is None, "a CPU has no GPU memory to tell of"


def test_without_a_gpu_the_published_shapes_are_refused(tmp_path: Path):
    done = run_without(HEAVY, tmp_path, "benchmarks/gpu.py", "--device", "cpu")
    assert done.returncode == 2
    assert "--device cpu --tiny" in done.stderr


@pytest.mark.parametrize("key", SHAPES)
def test_the_arithmetic_that_a_rate_is_made_of_is_what_torch_counts(key: str):
    shape = SHAPES[key].tiny()
    part = build(shape, 3, "cpu", torch.float32)
    part.model.set_experts_implementation("eager")  # whose matmuls are plain ones, that torch counts
    reading = Reading.of(lay_out(make_prompts(6, 128)), ("Last1",))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run_packed(part, reading.layout.packing, keep=reading.keep)
    counted = counter.get_flop_counts()["Global"]
    attention = sum(value for name, value in counted.items() if "attention" in str(name))
    tokens, kept = len(reading.layout.packing), len(reading.keep)
    config = part.model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    needed = matmul_flops(config, tokens, kept)
    # The stock attention of the last layer also makes queries of all tokens, and the kept tokens' keys and values again.
    queries = 2 * config.hidden_size * config.num_attention_heads * head * tokens
    again = 2 * config.hidden_size * 2 * config.num_key_value_heads * head * kept
    assert sum(counted.values()) - attention == needed + queries + again


def test_layers_are_as_many_as_fit():
    shape = SHAPES["qwen3"]
    weights = 61.06e9  # the published 30.53 billion parameters in bf16
    assert fitting_layers(shape, None, torch.bfloat16) == 48
    assert fitting_layers(shape, weights + 12.1e9, torch.bfloat16) == 48
    assert 40 <= fitting_layers(shape, weights + 6e9, torch.bfloat16) < 48
    assert fitting_layers(shape, 1e9, torch.bfloat16) == 6


def test_the_head_is_the_whole_models_own_layers():
    part = build(SHAPES["qwen3"].tiny(), 6, "cpu", torch.float32)
    head = head_of(part, 2)
    packing = lay_out(make_prompts(4, 128)).packing
    with torch.no_grad():
        whole = run_packed(part, packing, after_attention=[2])
        assert torch.equal(run_packed(head, packing, whole.after_attention[2], resume=True).states, whole.states)
    assert [router.layer for router in head.routers] == [2, 3, 4, 5]
    assert head.routers[0].gate is part.routers[2].gate
