"""What is exported loads in stock tools, in a process that cannot import roma_ray, and gives the judged answers there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from roma_ray.benchmarks.judge import Wanted, judge
from roma_ray.benchmarks.judged_model import resolve_subject
from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import read_table
from roma_ray.engine.work import serial
from roma_ray.evaluation.benchmark_results import RESPONSES
from roma_ray.moe.exporting import export_routers
from roma_ray.store.artifacts import Store
from tests.benchmarks.conftest import JudgeWorld, write_rows

SCRIPT = """
import json, sys
sys.modules["roma_ray"] = None
base, adapter, merged, task = sys.argv[1:]
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

ids = torch.arange(5, 40)[None]
with torch.inference_mode():
    plain = load(base)(ids).logits
    tuned = PeftModel.from_pretrained(load(base), adapter).eval()(ids).logits
    whole = load(merged)(ids).logits
import lm_eval.evaluator
lm_eval.evaluator.add_env_info = lambda results: None  # asks pip and the compiler for seconds
from lm_eval.tasks import TaskManager
arguments = f"pretrained={base},peft={adapter},dtype=float32"
found = lm_eval.evaluator.simple_evaluate(
    model="hf", model_args=arguments, tasks=[task], device="cpu", batch_size=4, bootstrap_iters=0,
    task_manager=TaskManager(include_defaults=False),
)
samples = {s["doc_id"]: [r[0][0] for r in s["resps"]] for s in found["samples"]["stock_check"]}
print("RESULT", json.dumps({
    "moved": bool((plain != tuned).any()), "equal": torch.equal(tuned, whole), "samples": samples,
    "ours": [m for m in sys.modules if m.startswith("roma_ray.")],
}))
"""


@pytest.fixture(scope="module")
def merged(judge_world: JudgeWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "model"
    export_routers(Path(judge_world.adapter), folder, form="merged")
    return folder


def test_peft_transformers_and_lm_eval_load_the_exports(judge_world: JudgeWorld, merged: Path, tmp_path: Path) -> None:
    rows = [
        {"q": f"Which word is red number {n}?", "options": ["red", "green one", "blue"], "gold": 0} for n in range(6)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    task: dict[str, Any] = {
        "task": "stock_check",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "Question: {{q}}\nAnswer:",
        "doc_to_choice": "options",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    file = tmp_path / "stock_check.yaml"
    file.write_text(yaml.safe_dump(task))
    base = judge_world.config.model.path
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, base, judge_world.adapter, str(merged), str(file)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))[7:])
    assert found["ours"] == []
    assert found["moved"]
    assert found["equal"], "the merged model and the adapter on the base are one model"
    subject = replace(resolve_subject(judge_world.config, adapter=judge_world.adapter), batch_tokens=100)
    stage = judge(judge_world.config, subject, Wanted((str(file),)), Store(tmp_path / "s"), serial, Silence())
    for row in read_table(stage.path / RESPONSES).to_pylist():
        assert list(map(float, row["tuned"])) == pytest.approx(found["samples"][str(row["doc"])], abs=1e-4)


def test_the_merged_checkpoint_has_the_names_that_vllm_reads(merged: Path) -> None:
    """vLLM's OLMoE class asks for each expert's three projections under the checkpoint's own numbering, and splits no gate."""
    keys: set[str] = set()
    for file in merged.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            keys |= set(handle.keys())
    config = json.loads((merged / "config.json").read_text())
    layer = [
        *(f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
        *("input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate.weight"),
        *(
            f"mlp.experts.{e}.{name}.weight"
            for e in range(config["num_experts"])
            for name in ("gate_proj", "up_proj", "down_proj")
        ),
    ]
    expected = {f"model.layers.{n}.{name}" for n in range(config["num_hidden_layers"]) for name in layer}
    assert keys == expected | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert config["architectures"] == ["OlmoeForCausalLM"]
    assert all(re.fullmatch(r"[\w.]+", key) for key in keys)
