"""The domains' experts: copies of the public model's late FFNs, each trained alone on its domain's text.

Everything else is frozen and shared, and an expert acts only at the token that predicts the value; so the states below it and
the keys and values of the tokens before it are the public model's, and are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerFast, Qwen3ForCausalLM

from .corpus import Document
from .dense import batches, dense_config, new_model, optimizer_of, positions, step_rate, take_step, token_rows
from .recipe import Recipe

FFN = ("gate_proj", "up_proj", "down_proj")
Expert = list[dict[str, Tensor]]
"""The FFN's matrices, one dictionary a layer that has experts."""


@dataclass(frozen=True)
class Cached:
    """The public model's states of N documents: of the last token [N, H] before the first layer that has experts, and of the
    others the keys and values [L, 2, N, heads, S, head_dim] of those layers. `inputs` [L, N, H] are the last token's FFN inputs."""

    state_NH: Tensor
    kv: Tensor
    inputs_LNH: Tensor
    real_NS: Tensor
    """Which tokens are real, the last one included."""
    target_N: Tensor


@torch.no_grad()
def cache_states(
    recipe: Recipe, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]
) -> Cached:
    """Run the public model once over documents up to the token that predicts the value."""
    ids_NS, real_NS = token_rows(tokenizer, documents)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    layers = model.model.layers[recipe.dense :]
    seen: list[Tensor] = []
    hooks = [layer.mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0][:, -1])) for layer in layers]
    for ids, real in zip(ids_NS[:, :-1].split(256), real_NS[:, :-1].split(256), strict=True):
        seen.clear()
        out = model.model(
            input_ids=ids,
            attention_mask=real.long(),
            position_ids=positions(real),
            use_cache=True,
            output_hidden_states=True,
        )
        kept = out.past_key_values.layers[recipe.dense :]
        kv = torch.stack([torch.stack([layer.keys[:, :, :-1], layer.values[:, :, :-1]]) for layer in kept])
        parts.append((out.hidden_states[recipe.dense][:, -1], kv, torch.stack(seen)))
    for hook in hooks:
        hook.remove()
    states, kvs, inputs = zip(*parts, strict=True)
    return Cached(torch.cat(states), torch.cat(kvs, 2), torch.cat(inputs, 1), real_NS[:, :-1], ids_NS[:, -1])


def late_layers(recipe: Recipe, model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """The public model's layers that get experts, as a model of their own; only their FFNs train."""
    out = new_model(dense_config(recipe, recipe.sparse), 0)
    kept = {}
    for key, tensor in model.state_dict().items():
        head, _, tail = key.partition("layers.")
        if not tail:
            kept[key] = tensor
        elif (number := int(tail.partition(".")[0])) >= recipe.dense:
            kept[f"{head}layers.{number - recipe.dense}.{tail.partition('.')[2]}"] = tensor
    out.load_state_dict(kept)
    out.requires_grad_(False)
    for layer in out.model.layers:
        layer.mlp.requires_grad_(True)
    return out.eval()


def last_token_logits(late: Qwen3ForCausalLM, cached: Cached, index: Tensor) -> Tensor:
    """Logits [B, V] of some documents, the last token alone running through the late layers."""
    past = DynamicCache([(kv[0, index], kv[1, index]) for kv in cached.kv])
    real = cached.real_NS[index]
    out = late.model(
        inputs_embeds=cached.state_NH[index, None],
        past_key_values=past,
        attention_mask=real.long(),
        position_ids=positions(real)[:, -1:],
        use_cache=True,
    )
    return late.lm_head(out.last_hidden_state[:, 0])


def train_expert(recipe: Recipe, model: Qwen3ForCausalLM, cached: Cached, seed: int) -> Expert:
    """Train one domain's FFNs on its documents, with expert dropout."""
    late = late_layers(recipe, model)
    generator = torch.Generator().manual_seed(seed)
    keep = 1 - recipe.branch_dropout

    def dropout(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] * (torch.rand(args[0].shape, generator=generator) < keep) / keep,)

    hooks = [layer.mlp.down_proj.register_forward_pre_hook(dropout) for layer in late.model.layers]
    optimizer = optimizer_of(late, recipe.branch_decay)
    steps = recipe.branch_steps
    for step, index in enumerate(batches(len(cached.target_N), recipe.branch_batch, steps, generator)):
        loss = nn.functional.cross_entropy(last_token_logits(late, cached, index), cached.target_N[index])
        take_step(optimizer, loss, step_rate(recipe.branch_rate, step, steps))
    for hook in hooks:
        hook.remove()
    return ffns(late, 0)


def ffns(model: Qwen3ForCausalLM, first: int) -> Expert:
    """The FFNs' matrices from a layer on."""
    return [
        {name: getattr(layer.mlp, name).weight.detach().clone() for name in FFN} for layer in model.model.layers[first:]
    ]
