"""A merged DeepSeekMoE keeps its published keys and remote code, so that a process without roma-ray loads it by that code."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from roma_ray.moe.exporting import export_routers
from roma_ray.moe.slices import load_slice
from tests.moe import test_deepseek
from tests.moe.test_adapters import tuned_adapter
from tests.moe.test_deepseek import PUBLISHED, stored
from tests.tiny import VOCABULARY, save_tiny, tiny_config, tiny_moe

_CONFIGURATION = """
from transformers import PretrainedConfig


class DeepseekConfig(PretrainedConfig):
    model_type = "deepseek"
"""

# A stand-in of the published file: its class names and keys, with the arithmetic that tests/moe/test_deepseek.py writes out.
_MODELING = """
import torch
from torch import Tensor, nn
from typing import Any
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_deepseek import DeepseekConfig
from .blocks_deepseek import attention, swiglu_block


class DeepseekForCausalLM(PreTrainedModel):
    config_class = DeepseekConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.model.layers = nn.ModuleList()
        for number in range(config.num_hidden_layers):
            layer = nn.Module()
            layer.input_layernorm, layer.post_attention_layernorm = Norm(width), Norm(width)
            layer.self_attn = attention(config)
            if number < config.first_k_dense_replace:
                layer.mlp = swiglu_block(width, config.intermediate_size)
            else:
                layer.mlp = nn.Module()
                layer.mlp.gate = nn.Linear(width, config.n_routed_experts, bias=False)
                inner = config.moe_intermediate_size
                layer.mlp.experts = nn.ModuleList(swiglu_block(width, inner) for _ in range(config.n_routed_experts))
                layer.mlp.shared_experts = swiglu_block(width, inner * config.n_shared_experts)
            self.model.layers.append(layer)
        self.model.norm = Norm(width)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **unused):
        weights = dict(self.state_dict())
        return CausalLMOutput(logits=published_forward(weights, self.config, input_ids[0].tolist())[None])


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
"""

_BLOCKS = """
from torch import nn


def attention(config):
    block, width = nn.Module(), config.hidden_size
    head = width // config.num_attention_heads
    for name, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads), ("v", config.num_key_value_heads)):
        setattr(block, f"{name}_proj", nn.Linear(width, heads * head, bias=False))
    block.o_proj = nn.Linear(width, width, bias=False)
    return block


def swiglu_block(width, inner):
    block = nn.Module()
    block.gate_proj, block.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
    block.down_proj = nn.Linear(inner, width, bias=False)
    return block
"""

_STOCK = """
import sys

sys.modules["roma_ray"] = None
import torch
try:
    import roma_ray
except ImportError:
    pass
else:
    sys.exit("roma_ray can be imported here")
from transformers import AutoModelForCausalLM

model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
assert type(model).__module__.endswith("modeling_deepseek"), type(model)
with torch.no_grad():
    torch.save(model(torch.tensor([[5, 17, 40, 3, 77, 12, 9]])).logits, sys.argv[2])
"""


def published(folder: Path) -> Path:
    """A tiny DeepSeekMoE as it is published: configuration, keys, remote code, tokenizer files."""
    save_tiny(tiny_moe("deepseek", seed=4), folder)
    tiny = tiny_config("deepseek")
    sizes = {name: getattr(tiny, name) for name in PUBLISHED if isinstance(getattr(tiny, name, None), int)}
    facts = {**PUBLISHED, **sizes, "vocab_size": VOCABULARY, "first_k_dense_replace": 1, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(facts))
    arithmetic = [getattr(test_deepseek, name) for name in ("rms", "turned", "swiglu", "published_forward")]
    (folder / "configuration_deepseek.py").write_text(_CONFIGURATION)
    (folder / "modeling_deepseek.py").write_text("\n\n".join([_MODELING, *map(inspect.getsource, arithmetic)]))
    (folder / "blocks_deepseek.py").write_text(_BLOCKS)
    (folder / "unrelated.py").write_text("raise SystemExit('code that nobody names')")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def test_the_published_remote_code_loads_a_merged_export(tmp_path: Path) -> None:
    base = published(tmp_path / "base")
    _, checkpoint = tuned_adapter(str(base), tmp_path / "adapter", torch.float32, 4)
    merged = tmp_path / "merged"
    export_routers(tmp_path / "adapter", merged, form="merged")
    for name in ("configuration_deepseek.py", "modeling_deepseek.py", "blocks_deepseek.py", "tokenizer_config.json"):
        assert (merged / name).read_bytes() == (base / name).read_bytes()
    assert not (merged / "unrelated.py").exists()
    stated, written = (json.loads((folder / "config.json").read_text()) for folder in (base, merged))
    assert written == {**stated, "dtype": "float32"}
    assert written["auto_map"] == PUBLISHED["auto_map"]
    before, after = stored(str(base)), stored(str(merged))
    assert before.keys() == after.keys()
    assert {key for key in before if not torch.equal(before[key], after[key])} == set(checkpoint.tensors)
    script = tmp_path / "stock.py"
    script.write_text(_STOCK)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path / "m")}
    logits = {}
    for folder in (base, merged):
        command = [sys.executable, "-I", str(script), str(folder), str(tmp_path / "logits.pt")]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        logits[folder] = torch.load(tmp_path / "logits.pt", weights_only=True)
    part = load_slice(str(merged), dtype=torch.float32, with_lm_head=True)
    with torch.no_grad():
        ours = part.model(input_ids=torch.tensor([[5, 17, 40, 3, 77, 12, 9]]), use_cache=False).logits
    torch.testing.assert_close(logits[merged], ours, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits[base], logits[merged], atol=1e-3)


def test_code_that_is_not_there_is_not_named(tmp_path: Path) -> None:
    base = published(tmp_path / "base")
    (base / "modeling_deepseek.py").unlink()
    tuned_adapter(str(base), tmp_path / "adapter", torch.float32, 4)
    export_routers(tmp_path / "adapter", tmp_path / "merged", form="merged")
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["auto_map"] == {"AutoConfig": "configuration_deepseek.DeepseekConfig"}


@pytest.mark.parametrize(
    ("target", "kept"),
    [("../secret.Model", False), ("a/b.Model", False), ("lab/repository--modeling.Model", True), (7, True)],
)
def test_no_file_of_another_place_is_copied(tmp_path: Path, target: object, kept: bool) -> None:
    (tmp_path / "secret.py").write_text("x = 1")
    base = published(tmp_path / "base")
    stated = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**stated, "auto_map": {"AutoModelForCausalLM": target}}))
    tuned_adapter(str(base), tmp_path / "adapter", torch.float32, 4)
    export_routers(tmp_path / "adapter", tmp_path / "merged", form="merged")
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert ("AutoModelForCausalLM" in written["auto_map"]) is kept
    assert not list((tmp_path / "merged").rglob("*.py"))
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as handle:
        assert "lm_head.weight" in handle.keys()  # noqa: SIM118 - not a dict
