"""The families of mixture-of-experts models whose routers can be tuned, and how each one scores its experts.

Routers are found by class (`routers.py`), so a family needs no module paths here: only the function that turns a
router's logits into scores, and a line of reason for each family that is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from roma_ray.errors import ModelError
from roma_ray.moe.refused import REASONS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Scoring(StrEnum):
    """How a router turns its logits into the scores that choose and weigh experts."""

    SOFTMAX = "softmax"
    """Softmax over all experts, then the top-k of it (renormalised or not)."""
    TOPK_SOFTMAX = "topk_softmax"
    """The top-k logits first, softmax over those alone."""
    SIGMOID = "sigmoid"
    """Each expert's own sigmoid; a selection bias may shift the choice but never the weights."""


@dataclass(frozen=True)
class Family:
    """What tells one family of models from another here: its `model_type` and its scoring."""

    model_type: str
    scoring: Scoring
    experts_return_pair: bool = False
    """Whether its layers unpack a pair from their experts block."""
    gate: str = ""
    """Submodule of the router that makes the logits, where the router itself has no `weight`."""


_SCORING = {
    "olmoe": Scoring.SOFTMAX,
    "deepseek": Scoring.SOFTMAX,
    "flex_olmo": Scoring.SOFTMAX,
    "mixtral": Scoring.SOFTMAX,
    "qwen2_moe": Scoring.SOFTMAX,
    "qwen3_moe": Scoring.SOFTMAX,
    "deepseek_v2": Scoring.SOFTMAX,
    "ernie4_5_moe": Scoring.SOFTMAX,
    "mellum": Scoring.SOFTMAX,
    "hunyuan_v1_moe": Scoring.SOFTMAX,
    "qwen3_next": Scoring.SOFTMAX,
    "qwen3_5_moe_text": Scoring.SOFTMAX,
    "qwen3_5_moe": Scoring.SOFTMAX,
    "qwen3_vl_moe": Scoring.SOFTMAX,
    "gemma4_text": Scoring.SOFTMAX,
    "gemma4": Scoring.SOFTMAX,
    "gpt_oss": Scoring.TOPK_SOFTMAX,
    "granitemoe": Scoring.TOPK_SOFTMAX,
    "granitemoeshared": Scoring.TOPK_SOFTMAX,
    "granitemoe_swa": Scoring.TOPK_SOFTMAX,
    "granitemoehybrid": Scoring.TOPK_SOFTMAX,
    "aria_text": Scoring.TOPK_SOFTMAX,
    "deepseek_v3": Scoring.SIGMOID,
    "glm4_moe": Scoring.SIGMOID,
    "glm4v_moe": Scoring.SIGMOID,
    "dots1": Scoring.SIGMOID,
    "minimax_m2": Scoring.SIGMOID,
    "glm4_moe_lite": Scoring.SIGMOID,
    "exaone_moe": Scoring.SIGMOID,
    "solar_open": Scoring.SIGMOID,
    "mimo_v2_flash": Scoring.SIGMOID,
    "hy_v3": Scoring.SIGMOID,
    "flint": Scoring.SIGMOID,
    "axk1": Scoring.SIGMOID,
    "laguna": Scoring.SIGMOID,
    "afmoe": Scoring.SIGMOID,
    "lfm2_moe": Scoring.SIGMOID,
    "nemotron_h": Scoring.SIGMOID,
}

# Routers that are more than a gate: where the gate lies in them.
_GATE = {"hunyuan_v1_moe": "wg", "afmoe": "gate", "gemma4_text": "proj"}

# Multimodal models, of which the language model is tuned, by its own type.
_WRAPPERS = {
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
    "glm4v_moe": "glm4v_moe_text",
    "gemma4": "gemma4_text",
}
_WRAPPER_OF = {text: wrapper for wrapper, text in _WRAPPERS.items()}


def supported_families() -> tuple[str, ...]:
    """The `model_type`s whose routers can be tuned, sorted."""
    return tuple(sorted(_SCORING))


def families_table() -> str:
    """The supported families by how their routers score, as the Markdown table of docs/models.md."""
    words = {
        Scoring.SOFTMAX: "softmax over all experts",
        Scoring.TOPK_SOFTMAX: "softmax over the top-k logits",
        Scoring.SIGMOID: "sigmoid of each expert",
    }
    rows = [
        (", ".join(f"`{t}`" for t in sorted(_SCORING) if _SCORING[t] is rule), text) for rule, text in words.items()
    ]
    return "\n".join(["| `model_type` | router scores |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)])


def family(config: PreTrainedConfig) -> Family:
    """Return the family of a transformers configuration. Raises ModelError for any that cannot be tuned, saying why."""
    model_type = getattr(config, "model_type", "") or "unknown"
    # Some backbones have no name of their own among the models that are published.
    known = model_type if model_type in _SCORING else _WRAPPER_OF.get(model_type, model_type)
    text = config.get_text_config() if known in _WRAPPERS else config
    if known not in _SCORING or getattr(text, "enable_moe_block", True) is False:
        raise ModelError(refusal(model_type, text_type=getattr(config.get_text_config(), "model_type", "")))
    return Family(model_type, _SCORING[known], known == "gpt_oss", _GATE.get(_WRAPPERS.get(known, known), ""))


def has_family(config: PreTrainedConfig) -> bool:
    """Whether models of this configuration have routers that can be tuned."""
    try:
        family(config)
    except ModelError:
        return False
    return True


def is_wrapper(model_type: str) -> bool:
    """Whether models of this type hold a language model among other parts, which alone is tuned."""
    return model_type in _WRAPPERS


def refusal(model_type: str, *, text_type: str = "") -> str:
    """One sentence that says why models of this type cannot be tuned here, and which can.

    `text_type` is the type of a multimodal model's language model.
    """
    reason = REASONS.get(model_type) or REASONS.get(text_type)
    if reason is None and model_type not in _SCORING and text_type != model_type and text_type in _SCORING:
        reason = f"its language model is a {text_type!r}, but this multimodal form of it has not been checked"
    reason = reason or "its routers have not been checked, or it has none (a dense model)"
    return f"the routers of a {model_type!r} model cannot be tuned: {reason}. Families that can: {', '.join(supported_families())}."
