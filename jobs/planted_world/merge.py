"""The merge: public and domain FFNs become the experts of a stock Qwen3-MoE, its gates prototypes of the domains' states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from .branches import Cached, Expert
from .corpus import Document
from .dense import dense_config
from .recipe import Recipe


def merged_config(recipe: Recipe, experts: int) -> Qwen3MoeConfig:
    """The public model's configuration with experts in its late layers."""
    dense = dense_config(recipe, recipe.dense + recipe.sparse)
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
        *("num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
    return Qwen3MoeConfig(
        **{name: getattr(dense, name) for name in names},
        rope_parameters=dense.rope_parameters,
        mlp_only_layers=list(range(recipe.dense)),
        moe_intermediate_size=recipe.ffn,
        num_experts=experts,
        num_experts_per_tok=recipe.top_k,
        norm_topk_prob=True,
        use_cache=False,
    )


def prototypes(recipe: Recipe, cached: Sequence[Cached], documents: Sequence[Sequence[Document]]) -> Tensor:
    """Gates [L, experts, H]: each domain's mean FFN input over told and plainly asked documents, less the mean over all
    domains, scaled to one length. Each domain takes its first `gate_people` people in the order of its documents."""
    means = []
    for states, texts in zip(cached, documents, strict=True):
        people = set(list(dict.fromkeys(d.name for d in texts))[: recipe.gate_people])
        chosen = [n for n, d in enumerate(texts) if d.name in people and not d.phrasing]
        means.append(states.inputs_LNH[:, chosen].mean(1))
    gates_LEH = torch.stack(means, 1)
    gates_LEH = gates_LEH - gates_LEH.mean(1, keepdim=True)
    return recipe.gate_norm * gates_LEH / gates_LEH.norm(dim=-1, keepdim=True)


def merge(recipe: Recipe, model: Qwen3ForCausalLM, experts: Sequence[Expert], gates_LEH: Tensor) -> Qwen3MoeForCausalLM:
    """The merged model, in fp32. Expert 0 is the public one."""
    out = Qwen3MoeForCausalLM(merged_config(recipe, len(experts)))
    state = {k: v for k, v in model.state_dict().items() if k in out.state_dict()}
    for n in range(recipe.sparse):
        layer = f"model.layers.{recipe.dense + n}.mlp"
        state[f"{layer}.gate.weight"] = gates_LEH[n]
        state[f"{layer}.experts.gate_up_proj"] = torch.stack(
            [torch.cat([e[n]["gate_proj"], e[n]["up_proj"]]) for e in experts]
        )
        state[f"{layer}.experts.down_proj"] = torch.stack([e[n]["down_proj"] for e in experts])
    out.load_state_dict(state)
    return out.eval()
