"""Tiny random models of every supported MoE family, in layouts that make slicing hard.

`tiny_moe("olmoe", seed=0)` builds a stock transformers model with at least four layers: dense-first (DeepSeek, GLM-4),
periodic (Qwen's `decoder_sparse_step`), mixed sliding and full attention (GPT-OSS, Qwen2-MoE), grouped routing
(DeepSeek-V2 and -V3), residual and embedding multipliers (Granite). `save_tiny(model, directory)` writes its checkpoint.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

import roma_ray.moe.snapshot  # noqa: F401 - registers DeepSeekMoE's class

transformers.utils.logging.disable_progress_bar()
VOCABULARY = 96

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
}
EAGER = {"gpt_oss", "mimo_v2_flash", "flint", "granitemoe_swa"}
_DENSE_FIRST = ["dense", *["sparse"] * 5]
_ALTERNATING = ["sliding_attention", "full_attention"] * 3
_HYBRID = [
    "linear_attention",
    "full_attention",
    "linear_attention",
    "linear_attention",
    "full_attention",
    "linear_attention",
]
_SIGMOID: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
}
_LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}
_LAYOUTS: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 4, "clip_qkv": 4.0},
    "flex_olmo": {"num_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 4},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 5},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 2,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 3,
        "norm_topk_prob": False,
    },
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "mlp_only_layers": [0, 3],
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "deepseek_v2": {
        **_MLA,
        "n_routed_experts": 8,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {
        **_MLA,
        "q_lora_rank": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 2,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
    },
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "head_dim": 8,
        "sliding_window": 4,
        "max_position_embeddings": 131072,
    },
    "granitemoe": {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "tie_word_embeddings": True,
    },
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "head_dim": 8,
        "use_qk_norm": True,
        "norm_topk_prob": True,
    },
    "dots1": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 2,
        "n_group": 2,
        "topk_group": 1,
        "head_dim": 8,
        "norm_topk_prob": True,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "sliding_window": 4,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_intermediate_size": 16,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 4,
        "moe_layer_interval": 1,
    },
    "minimax_m2": {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 8},
    "phimoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
    },
    "glm4_moe_lite": {**_SIGMOID, **_MLA, "q_lora_rank": 16, "mlp_layer_types": _DENSE_FIRST},
    "exaone_moe": {
        **_SIGMOID,
        "num_experts": 8,
        "num_shared_experts": 1,
        "mlp_layer_types": _DENSE_FIRST,
        "layer_types": _ALTERNATING,
        "sliding_window": 4,
        "head_dim": 8,
    },
    "solar_open": {**_SIGMOID, "head_dim": 8},
    "mimo_v2_flash": {
        **_SIGMOID,
        "head_dim": 8,
        "v_head_dim": 8,
        "mlp_layer_types": _DENSE_FIRST,
        "layer_types": _ALTERNATING,
        "sliding_window": 4,
        "swa_head_dim": 8,
        "swa_v_head_dim": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
    },
    "hy_v3": {**_SIGMOID, "num_experts": 8, "num_shared_experts": 1, "mlp_layer_types": _DENSE_FIRST, "head_dim": 8},
    "mellum": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "mlp_layer_types": _DENSE_FIRST,
        "layer_types": _ALTERNATING,
        "sliding_window": 4,
        "norm_topk_prob": True,
    },
    "flint": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "layer_types": _ALTERNATING,
        "sliding_window": 4,
    },
    "axk1": {**_SIGMOID, **_MLA, "q_lora_rank": 16, "mlp_layer_types": _DENSE_FIRST},
    "aria_text": {"moe_num_experts": 8, "moe_topk": 3, "moe_num_shared_experts": 1, "head_dim": 8},
    "laguna": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "head_dim": 8,
        "mlp_layer_types": _DENSE_FIRST,
        "layer_types": _ALTERNATING,
        "sliding_window": 4,
        "num_attention_heads_per_layer": [4, 2, 4, 2, 4, 2],
    },
    "granitemoeshared": {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "shared_intermediate_size": 16,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "granitemoe_swa": {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "shared_intermediate_size": 16,
        "layer_types": _ALTERNATING,
        "sliding_window": 4,
        "layer_rope_theta": [1e4, 1e5, 1e4, 1e5, 1e4, 1e5],
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 3, "head_dim": 8},
    "afmoe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "num_shared_experts": 1,
        "num_dense_layers": 1,
        "head_dim": 8,
        "layer_types": _ALTERNATING,
        "sliding_window": 4,
        "route_scale": 1.5,
    },
    "qwen3_next": {
        **_LINEAR,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "head_dim": 8,
        "layer_types": _HYBRID,
    },
    "qwen3_5_moe_text": {
        **_LINEAR,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "head_dim": 8,
        "layer_types": _HYBRID,
    },
    "granitemoehybrid": {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "shared_intermediate_size": 16,
        "layer_types": _HYBRID,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
        "mamba_chunk_size": 4,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "lfm2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention", "conv"],
        "tie_word_embeddings": True,
        "routed_scaling_factor": 1.5,
    },
    "nemotron_h": {
        **_SIGMOID,
        "layers_block_type": ["mlp", "moe", "linear_attention", "moe", "full_attention", "moe"],
        "head_dim": 8,
        "moe_shared_expert_intermediate_size": 16,
        "moe_latent_size": 24,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 4,
    },
    "gemma4_text": {
        "num_experts": 8,
        "top_k_experts": 3,
        "moe_intermediate_size": 16,
        "enable_moe_block": True,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "layer_types": _ALTERNATING,
        "sliding_window": 4,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "attention_k_eq_v": True,
    },
}

# Multimodal models: the language model's layout by its own type, and a tower for pictures that no text reaches.
_TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "image_size": 8,
    "num_position_embeddings": 4,
    "deepstack_visual_indexes": [0],
}
_GEMMA_TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "position_embedding_size": 16,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_LAYOUTS["qwen3_vl_moe_text"] = {
    **{
        name: value
        for name, value in _LAYOUTS["qwen3_moe"].items()
        if name not in ("norm_topk_prob", "tie_word_embeddings")
    },
    **_MROPE,
}
_LAYOUTS["glm4v_moe_text"] = {
    **{name: value for name, value in _LAYOUTS["glm4_moe"].items() if name not in ("use_qk_norm", "head_dim")},
    "rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [1, 1, 0]},
}
WRAPPERS = {
    "qwen3_5_moe": ("qwen3_5_moe_text", _TOWER),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", _TOWER),
    "glm4v_moe": ("glm4v_moe_text", _TOWER),
    "gemma4": ("gemma4_text", _GEMMA_TOWER),
}

FAMILIES = (
    *("olmoe", "qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "glm4_moe"),
    # Other layer rules: parts beside the experts, gates inside a router, heads by layer, recurrent layers.
    *(
        "deepseek",
        "granitemoeshared",
        "hunyuan_v1_moe",
        "afmoe",
        "laguna",
        "qwen3_next",
        "granitemoehybrid",
        "gemma4_text",
        "lfm2_moe",
        "nemotron_h",
    ),
    # Language models of multimodal ones.
    *WRAPPERS,
)
"""The families whose layer rules or kinds of router differ."""

MORE_FAMILIES = (
    *("flex_olmo", "dots1", "ernie4_5_moe", "minimax_m2", "glm4_moe_lite", "exaone_moe", "solar_open", "mimo_v2_flash"),
    *("hy_v3", "mellum", "flint", "axk1", "aria_text", "qwen3_5_moe_text", "granitemoe_swa"),
)
"""Relatives of them; every contract test of `moe/` runs over both lists."""


DELTA_RULE = ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text")
"""Families whose recurrence magnifies the rounding of what enters it, in transformers' own forward pass too."""


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """Return the tiny configuration of one family (`FAMILIES`, `MORE_FAMILIES` or "phimoe")."""
    if family in WRAPPERS:
        text, tower = WRAPPERS[family]
        layout = {**_COMMON, **_LAYOUTS[text], **overrides}
        known = CONFIG_MAPPING[family].sub_configs_defaults["vision_config"]
        fields = getattr(known, "config_class", known).__dataclass_fields__
        vision = {name: value for name, value in tower.items() if name in fields}
        return CONFIG_MAPPING[family](
            text_config=layout, vision_config=vision, tie_word_embeddings=layout["tie_word_embeddings"]
        )
    values = {**_COMMON, **_LAYOUTS[family], **overrides}
    return CONFIG_MAPPING[family](**values)


def tiny_moe(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """Build a random causal language model of `family` in eval mode; all its parameters and buffers depend on `seed`.

    Routers get weights that are large enough to prefer some experts, and selection biases that change the choice, so
    that a test which forgets either of them fails.
    """
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loader = AutoModelForImageTextToText if family in WRAPPERS else AutoModelForCausalLM
        model = loader.from_config(config, attn_implementation="eager" if family in EAGER else "sdpa")
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "correction_bias" in name:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5)
            elif ".gate.weight" in name or ".router.weight" in name or ".router.bias" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
            elif name.endswith("bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
            elif "norm" in name and tensor.dim() == 1:
                tensor.copy_(1 + torch.randn(tensor.shape, generator=generator) * 0.1)
    model.set_experts_implementation("eager")
    return model.to(dtype).eval()


def save_tiny(model: PreTrainedModel, directory: str | Path, *, max_shard_size: str | int = "1GB") -> str:
    """Write a safetensors checkpoint of `model` (sharded when it exceeds `max_shard_size`); return its path."""
    model.save_pretrained(str(directory), max_shard_size=max_shard_size)
    return str(directory)


def padded_batch(
    lengths: tuple[int, ...] = (7, 4, 9), *, side: str = "right", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `input_ids_BS`, `attention_mask_BS` and `last_B` (index of each row's last real token), padded on `side`."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    input_ids_BS = torch.zeros(len(lengths), width, dtype=torch.long)
    mask_BS = torch.zeros(len(lengths), width, dtype=torch.long)
    last = []
    for row, length in enumerate(lengths):
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator)
        start = 0 if side == "right" else width - length
        input_ids_BS[row, start : start + length] = tokens
        mask_BS[row, start : start + length] = 1
        last.append(start + length - 1)
    return input_ids_BS, mask_BS, torch.tensor(last)
