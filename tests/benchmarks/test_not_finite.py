"""A benchmark of a model whose numbers are none is refused, by the first layer that gives them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from roma_ray.benchmarks.judge import Wanted, judge
from roma_ray.benchmarks.judged_model import resolve_subject
from roma_ray.config.schema import Config
from roma_ray.engine.answers import Answers
from roma_ray.engine.progress import Silence
from roma_ray.engine.work import serial
from roma_ray.errors import GuardError
from roma_ray.moe.adapters import read_adapter, write_adapter
from roma_ray.store.artifacts import Store
from tests.benchmarks.conftest import JudgeWorld


def damaged(source: Path, target: Path, key: str) -> None:
    """A copy of a model folder with one value of a tensor made NaN."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    name = next(name for name in tensors if name.endswith(key))
    tensors[name][1, 1] = float("nan")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def judged_by(config: Config, folder: Path) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(folder)})})


@pytest.fixture
def ask(judge_world: JudgeWorld, tmp_path: Path) -> Callable[..., None]:
    def asked(config: Config, task: str, adapter: str | None = None) -> None:
        subject = replace(resolve_subject(config, adapter=adapter), batch_tokens=300, generation_batch=4)
        wanted = Wanted((task,), data_dir=str(judge_world.data))
        judge(config, subject, wanted, Store(tmp_path / "storage"), serial, Silence())

    return asked


def test_a_damaged_layer_is_named_by_likelihoods_and_by_generations(
    judge_world: JudgeWorld, tmp_path: Path, ask: Callable[..., None]
) -> None:
    damaged(Path(judge_world.config.model.path), tmp_path / "model", "layers.2.self_attn.o_proj.weight")
    config = judged_by(judge_world.config, tmp_path / "model")
    where = r"comes from layer 2 \(self_attn\), whose weights .*layers\.2\.self_attn\.o_proj\.weight"
    with pytest.raises(GuardError, match=rf"the base model's log-likelihoods .*{where}"):
        ask(config, "piqa")
    with pytest.raises(GuardError, match=rf"the base model's logits are not finite while it writes.*{where}"):
        ask(config, judge_world.tasks[4])


def test_tuned_gates_whose_routing_overflows_are_named(
    judge_world: JudgeWorld, tmp_path: Path, ask: Callable[..., None]
) -> None:
    checkpoint = read_adapter(judge_world.adapter)
    key = max(checkpoint.tensors)
    moved = {**checkpoint.tensors, key: checkpoint.tensors[key] * 1e38}
    write_adapter(tmp_path / "adapter", replace(checkpoint, tensors=moved))
    layer = checkpoint.layers[-1]
    with pytest.raises(
        GuardError, match=rf"the tuned model's log-likelihoods .*layer {layer} \(mlp\), whose own weights are finite"
    ):
        ask(judge_world.config, "piqa", str(tmp_path / "adapter"))


def test_a_dense_model_is_refused_likewise(judge_world: JudgeWorld, tmp_path: Path, ask: Callable[..., None]) -> None:
    source = Path(judge_world.config.model.path)
    settings = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**settings, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(
        tmp_path / "dense"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path / "dense" / name)
    damaged(tmp_path / "dense", tmp_path / "broken", "layers.1.mlp.up_proj.weight")
    with pytest.raises(GuardError, match=r"layer 1 \(mlp\), whose weights .*layers\.1\.mlp\.up_proj\.weight"):
        ask(judged_by(judge_world.config, tmp_path / "broken"), "piqa")


def test_a_method_s_answer_that_is_no_number_is_no_answer() -> None:
    with pytest.raises(GuardError, match="1 of 2 answers of this method are not finite, of question row 7 first"):
        Answers([3, 7], [[-1.0, -2.0], [-1.0, float("nan")]])
