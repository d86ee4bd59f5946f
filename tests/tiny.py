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
from tests.layouts import COMMON, GEMMA_TOWER, LAYOUTS, TOWER
from tests.layouts import VOCABULARY as VOCABULARY

transformers.utils.logging.disable_progress_bar()

EAGER = {"gpt_oss", "mimo_v2_flash", "flint", "granitemoe_swa"}
WRAPPERS = {
    "qwen3_5_moe": ("qwen3_5_moe_text", TOWER),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", TOWER),
    "glm4v_moe": ("glm4v_moe_text", TOWER),
    "gemma4": ("gemma4_text", GEMMA_TOWER),
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
        layout = {**COMMON, **LAYOUTS[text], **overrides}
        known = CONFIG_MAPPING[family].sub_configs_defaults["vision_config"]
        fields = getattr(known, "config_class", known).__dataclass_fields__
        vision = {name: value for name, value in tower.items() if name in fields}
        return CONFIG_MAPPING[family](
            text_config=layout, vision_config=vision, tie_word_embeddings=layout["tie_word_embeddings"]
        )
    values = {**COMMON, **LAYOUTS[family], **overrides}
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
