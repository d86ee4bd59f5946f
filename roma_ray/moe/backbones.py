"""Text backbones of multimodal wrappers (Qwen3.5, Qwen3-VL, GLM-4.5V, Gemma 4): their layers as a language model alone.

Questions are texts, so a wrapper's towers for pictures and sound are never loaded: slices are cut from its language model,
and only names tell that there is more around it. Where transformers has no causal language model for a backbone, it is
composed here of the wrapper's own text model and an `lm_head`.
"""

from __future__ import annotations

import copy
import re
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.glm4v_moe.configuration_glm4v_moe import Glm4vMoeTextConfig
from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoePreTrainedModel, Glm4vMoeTextModel
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoePreTrainedModel, Qwen3VLMoeTextModel

from roma_ray.errors import ModelError
from roma_ray.moe.families import is_wrapper, refusal
from roma_ray.moe.uneven import expert_counts, uneven_class

# Where a wrapper of transformers 5 has its language model; older files have the whole of it, head and all, under one name.
LANGUAGE_MODEL = "model.language_model."
_WRAPPED = re.compile(r"^(?:model\.language_model\.|language_model\.model\.|language_model\.(?=lm_head\.))")


class LanguageModel:
    """A text model under `model` and an `lm_head`, as transformers' causal language models have them; a mixin."""

    text_model: ClassVar[type[PreTrainedModel]]
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.model = self.text_model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[attr-defined]

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
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size)  # type: ignore[attr-defined]
        return MoeCausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )


class Qwen3VLMoeBackbone(Qwen3VLMoeTextModel):
    """The layers of Qwen3-VL-MoE."""


class Qwen3VLMoeForCausalLM(LanguageModel, Qwen3VLMoePreTrainedModel, GenerationMixin):
    """The layers of Qwen3-VL-MoE with `lm_head`."""

    config_class = Qwen3VLMoeTextConfig
    text_model = Qwen3VLMoeTextModel


class Glm4vMoeBackbone(Glm4vMoeTextModel):
    """The layers of GLM-4.5V."""


class Glm4vMoeForCausalLM(LanguageModel, Glm4vMoePreTrainedModel, GenerationMixin):
    """The layers of GLM-4.5V with `lm_head`."""

    config_class = Glm4vMoeTextConfig
    text_model = Glm4vMoeTextModel


# By the backbone's type: its classes without and with `lm_head`, and the type that transformers has its files' rules under.
_COMPOSED: dict[str, tuple[type[PreTrainedModel], type[PreTrainedModel], str]] = {
    "qwen3_vl_moe_text": (Qwen3VLMoeBackbone, Qwen3VLMoeForCausalLM, "qwen3_vl_moe"),
    "glm4v_moe_text": (Glm4vMoeBackbone, Glm4vMoeForCausalLM, "glm4v_moe"),
}
for _base, _causal, _rules in _COMPOSED.values():
    # Under the classes' own names: under the type, a wrapper's text model inside it would get them a second time.
    for _class in (_base, _causal):
        register_checkpoint_conversion_mapping(
            _class.__name__, get_checkpoint_conversion_mapping(_rules), overwrite=True
        )


def model_class_of(config: PreTrainedConfig, *, with_lm_head: bool) -> type[PreTrainedModel]:
    """The class for a configuration: transformers' own, or one composed of its parts or layers. Raises ModelError for no class."""
    found = _alike(config, with_lm_head=with_lm_head)
    return found if expert_counts(config) is None else uneven_class(found)  # type: ignore[arg-type]


def _alike(config: PreTrainedConfig, *, with_lm_head: bool) -> type[PreTrainedModel]:
    """The class of a model whose layers have equally many experts."""
    if config.model_type in _COMPOSED:
        base, causal, _ = _COMPOSED[config.model_type]
        return causal if with_lm_head else base
    mapping = (AutoModelForCausalLM if with_lm_head else AutoModel)._model_mapping
    if type(config) not in mapping:
        raise ModelError(refusal(config.model_type))
    return cast("type[PreTrainedModel]", mapping[type(config)])


def backbone_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a wrapper's language model, a copy; any other model's own."""
    if not is_wrapper(config.model_type):
        return config
    text = copy.deepcopy(config.get_text_config())
    # transformers ties a wrapper's head by the wrapper's word.
    text.tie_word_embeddings = config.tie_word_embeddings
    text.dtype = config.dtype or text.dtype
    return text


def plain_key(key: str) -> str:
    """A checkpoint's key as the language model alone would have it."""
    return _WRAPPED.sub(lambda match: "" if match[0] == "language_model." else "model.", key)
