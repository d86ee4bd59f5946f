"""The families of mixture-of-experts models whose routers can be tuned, and how each one scores its experts.

Routers are found by class (`routers.py`), so a family needs no module paths here: only the function that turns a
router's logits into scores, and a line of reason for each family that is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from roma_ray.errors import ModelError

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
    "gemma4_text": Scoring.SOFTMAX,
    "gpt_oss": Scoring.TOPK_SOFTMAX,
    "granitemoe": Scoring.TOPK_SOFTMAX,
    "granitemoeshared": Scoring.TOPK_SOFTMAX,
    "granitemoehybrid": Scoring.TOPK_SOFTMAX,
    "aria_text": Scoring.TOPK_SOFTMAX,
    "deepseek_v3": Scoring.SIGMOID,
    "glm4_moe": Scoring.SIGMOID,
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
}

# Routers that are more than a gate: where the gate lies in them.
_GATE = {"hunyuan_v1_moe": "wg", "afmoe": "gate", "gemma4_text": "proj"}

_REFUSED = {
    "phimoe": "its sparsemixer chooses experts through thresholds that pass no gradient to some routers in evaluation mode",
    "llama4": "its router returns dense scores of all experts, not the (logits, weights, indices) that the others return",
    "llama4_text": "its router returns dense scores of all experts, not the (logits, weights, indices) that the others return",
    "switch_transformers": "it is an encoder-decoder model",
    "nllb_moe": "it is an encoder-decoder model",
    "jetmoe": "it also routes inside its attention",
    "dbrx": "its router is not one gate with a softmax over experts that can be tuned alone",
    "longcat_flash": "it routes to zero-computation experts, with the choice made outside the gradient",
}


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
    if model_type in _SCORING:
        return Family(model_type, _SCORING[model_type], model_type == "gpt_oss", _GATE.get(model_type, ""))
    raise ModelError(refusal(model_type))


def refusal(model_type: str) -> str:
    """One sentence that says why models of this type cannot be tuned here, and which can."""
    reason = _REFUSED.get(model_type, "its routers have not been checked, or it has none (a dense model)")
    return f"the routers of a {model_type!r} model cannot be tuned: {reason}. Families that can: {', '.join(supported_families())}."
