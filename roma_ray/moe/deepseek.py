"""DeepSeekMoE-16B (`model_type: deepseek`), which transformers has no class for, composed of blocks that it has.

The architecture is Llama's attention with softmax-routed experts beside shared ones: the text model of DeepSeek-OCR-2 in
transformers. The published remote code is never run; it differs from this in one rounding: it computes the gates' logits in
the model's own type, this in fp32, so that near-ties in bf16 may choose another expert. Keys are those that were published.

`register` puts the class where `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` look.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import (
    DeepseekOcr2TextModel,
    DeepseekOcr2TextPreTrainedModel,
)

from roma_ray.moe.backbones import LanguageModel

MODEL_TYPE = "deepseek"


class DeepseekConfig(DeepseekOcr2TextConfig):
    """The published configuration of DeepSeekMoE: dense first layers and a frequency instead of a list of layer types."""

    model_type = MODEL_TYPE
    base_config_key = ""

    def __post_init__(self, **kwargs: Any) -> None:
        dense, every = kwargs.pop("first_k_dense_replace", 0), kwargs.pop("moe_layer_freq", 1)
        normalised, scoring = kwargs.pop("norm_topk_prob", False), kwargs.pop("scoring_func", "softmax")
        if normalised or scoring != "softmax":
            raise ValueError(
                f"this DeepSeek model scores its experts otherwise (scoring_func {scoring!r}, norm_topk_prob {normalised}) than "
                "DeepSeekMoE-16B, whose blocks these are"
            )
        if self.__dict__.get("mlp_layer_types") is None:
            layers = range(self.num_hidden_layers)
            kinds = ["sparse" if layer >= dense and layer % every == 0 else "dense" for layer in layers]
            self.__dict__["mlp_layer_types"] = kinds
        super().__post_init__(**kwargs)


class DeepseekModel(DeepseekOcr2TextModel):
    """The decoder."""

    config_class = DeepseekConfig


class DeepseekForCausalLM(LanguageModel, DeepseekOcr2TextPreTrainedModel, GenerationMixin):
    """The decoder with `lm_head`."""

    config_class = DeepseekConfig
    text_model = DeepseekModel


def register() -> None:
    """Let transformers' own loaders find the class; a second call does nothing."""
    AutoConfig.register(MODEL_TYPE, DeepseekConfig, exist_ok=True)
    AutoModel.register(DeepseekConfig, DeepseekModel, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
    # Experts lie one by one in the files and merged in the model, as in Qwen2-MoE's.
    register_checkpoint_conversion_mapping(MODEL_TYPE, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)
