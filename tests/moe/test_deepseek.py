"""DeepSeekMoE-16B's class: against its published arithmetic written again, its published keys, its shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from roma_ray.errors import ModelError
from roma_ray.moe.slices import load_slice, model_facts
from tests.tiny import save_tiny, tiny_config, tiny_moe

# config.json of deepseek-ai/deepseek-moe-16b-base, its facts.
PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "max_position_embeddings": 4096,
    "model_type": "deepseek",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 102400,
}


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def turned(x: Tensor, theta: float) -> Tensor:
    """Rotary positions on [S, H, C]: halves of the width, not neighboring pairs."""
    length, _, width = x.shape
    angles = torch.arange(length)[:, None] * theta ** (-torch.arange(0, width, 2) / width)
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))
    first, second = x[..., : width // 2], x[..., width // 2 :]
    return x * cos + torch.cat([-second, first], -1) * sin


def swiglu(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    gate, up, down = (weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def published_forward(weights: dict[str, Tensor], config: Any, ids: list[int]) -> Tensor:
    """Logits of one sequence from the published keys, by loops."""
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        normed = rms(x, weights[f"{at}.input_layernorm.weight"], config.rms_norm_eps)
        q, k, v = (normed @ weights[f"{at}.self_attn.{n}_proj.weight"].T for n in "qkv")
        q, k = turned(q.unflatten(-1, (heads, width)), 10000.0), turned(k.unflatten(-1, (kv, width)), 10000.0)
        v = v.unflatten(-1, (kv, width))
        out = torch.zeros(len(ids), heads, width)
        for head in range(heads):
            mine = head // (heads // kv)
            scores = q[:, head] @ k[:, mine].T / width**0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
            out[:, head] = scores.softmax(-1) @ v[:, mine]
        x = x + out.flatten(1) @ weights[f"{at}.self_attn.o_proj.weight"].T
        normed = rms(x, weights[f"{at}.post_attention_layernorm.weight"], config.rms_norm_eps)
        if f"{at}.mlp.gate.weight" not in weights:
            x = x + swiglu(normed, weights, f"{at}.mlp")
            continue
        scores = (normed @ weights[f"{at}.mlp.gate.weight"].T).softmax(-1)
        mixed = swiglu(normed, weights, f"{at}.mlp.shared_experts")
        for token in range(len(ids)):
            best = scores[token].topk(config.num_experts_per_tok)
            for share, expert in zip(best.values, best.indices.tolist(), strict=True):
                mixed[token] += share * swiglu(normed[token], weights, f"{at}.mlp.experts.{expert}")
        x = x + mixed
    return rms(x, weights["model.norm.weight"], config.rms_norm_eps) @ weights["lm_head.weight"].T


def stored(path: str) -> dict[str, Tensor]:
    with safe_open(Path(path) / "model.safetensors", framework="pt") as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a dict


def test_it_computes_what_was_published_and_saves_the_published_keys(tmp_path: Path) -> None:
    model = tiny_moe("deepseek", seed=4)
    path = save_tiny(model, tmp_path)
    weights = stored(path)
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in weights
    assert "model.layers.0.mlp.gate_proj.weight" in weights
    assert not any("gate_up_proj" in key or "rotary" in key for key in weights)
    ids = [5, 17, 40, 3, 77, 12, 9]
    wanted = published_forward(weights, model.config, ids)
    again = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    part = load_slice(path, dtype=torch.float32, with_lm_head=True)
    with torch.no_grad():
        for loaded in (model, again, part.model):
            got = loaded(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_old_checkpoints_with_rotary_buffers_load(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = save_tiny(tiny_moe("deepseek", seed=4), tmp_path)
    extra = {"model.layers.2.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**stored(path), **extra}, Path(path) / "model.safetensors", metadata={"format": "pt"})
    load_slice(path, start=2, dtype=torch.float32, with_lm_head=True)


def test_the_published_configuration_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    (tmp_path / "model.safetensors").write_bytes(b"")
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.mlp_layer_types == ["dense"] + ["sparse"] * 27
    facts = model_facts(str(tmp_path))
    assert facts["moe_layers"] == list(range(1, 28))
    assert (facts["num_experts"], facts["top_k"], facts["scoring"]) == (64, 6, "softmax")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == 16_375_728_128


@pytest.mark.parametrize("change", [{"norm_topk_prob": True}, {"scoring_func": "sigmoid"}])
def test_other_scoring_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, **change}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="scores its experts otherwise"):
        model_facts(str(tmp_path))


def test_layers_by_frequency() -> None:
    config = tiny_config("deepseek", first_k_dense_replace=2, moe_layer_freq=2)
    assert config.mlp_layer_types == ["dense", "dense", "sparse", "dense", "sparse", "dense"]
