"""DeepSeekMoE-16B (`model_type: deepseek`), which transformers has no class for, composed of blocks that it has.

The architecture is Llama's attention with softmax-routed experts beside shared ones: the text model of DeepSeek-OCR-2 in
transformers. The published remote code is never run; it differs from this in one rounding: it computes the gates' logits in
the model's own type, this in fp32, so that near-ties in bf16 may choose another expert. Keys are those that were published.

`register` puts the class where `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` look.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import (
    DeepseekOcr2TextModel,
    DeepseekOcr2TextPreTrainedModel,
)

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


class DeepseekForCausalLM(DeepseekOcr2TextPreTrainedModel, GenerationMixin):
    """The decoder with `lm_head`."""

    config_class = DeepseekConfig
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **settings: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As the causal language models of transformers; the auxiliary loss is 0."""
        out = self.model(input_ids=input_ids, **settings)
        logits = self.lm_head(slice_logits_to_keep(out.last_hidden_state, logits_to_keep))
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size)
        return MoeCausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )


def register() -> None:
    """Let transformers' own loaders find the class; a second call does nothing."""
    AutoConfig.register(MODEL_TYPE, DeepseekConfig, exist_ok=True)
    AutoModel.register(DeepseekConfig, DeepseekModel, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
    # Experts lie one by one in the files and merged in the model, as in Qwen2-MoE's.
    register_checkpoint_conversion_mapping(MODEL_TYPE, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)
