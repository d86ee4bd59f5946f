"""Routing rows of texts from a stock model that somebody else loaded: padded batches through its own forward pass.

B texts of a batch, S tokens of a padded row, P read positions of a text, L layers, E experts, N texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from roma_ray.errors import ModelError
from roma_ray.moe.layers import token_positions
from roma_ray.moe.reading import read_routing
from roma_ray.moe.routers import Router, find_routers


def chosen_routers(model: PreTrainedModel, layers: Sequence[int] | None) -> list[Router]:
    """A model's routers, all or those of some layers. Raises ModelError when a layer has none."""
    routers = find_routers(model)
    if layers is None:
        return routers
    missing = sorted(set(layers) - {router.layer for router in routers})
    if missing:
        raise ModelError(f"layers {missing} have no router; those that do: {[router.layer for router in routers]}")
    return [router for router in routers if router.layer in set(layers)]


def prompt_positions(mask_BS: Tensor, tokens: str = "Last1") -> Tensor:
    """Where a token rule's positions lie in padded prompts, [B, P] with -1 as padding; the side of the padding is free.

    `mask_BS` is 1 at the prompt's tokens. Raises ConfigError for an unknown rule or an empty prompt.
    """
    rows = []
    for mask in mask_BS.bool():
        real = mask.nonzero()[:, 0].tolist()
        rows.append([real[place] for place in token_positions(tokens, len(real))])
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], device=mask_BS.device)


def mean_rows(routing_BPLE: Tensor, positions_BP: Tensor) -> Tensor:
    """The mean routing row over each text's positions, [B, L, E] fp32, gradient kept; padded positions count nothing."""
    count_B = (positions_BP >= 0).sum(1).to(routing_BPLE)
    return routing_BPLE.sum(1) / count_B[:, None, None]


@torch.no_grad()
def routing_rows(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    tokens: str = "Last1",
    layers: Sequence[int] | None = None,
    batch_size: int = 8,
) -> Tensor:
    """r of each text, [N, L, E] fp32 on the CPU: softmax over all experts at the positions that `tokens` names, their mean.

    `model` is a stock causal language model of a supported family, in evaluation mode. Raises ModelError for others,
    ConfigError for an unknown token rule or an empty text.
    """
    if model.training:
        raise ModelError("call model.eval() first: some families add noise to their routing in training mode")
    routers = chosen_routers(model, layers)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    rows = []
    for start in range(0, len(texts), batch_size):
        ids = [tokenizer(text)["input_ids"] for text in texts[start : start + batch_size]]
        width = max(map(len, ids))
        ids_BS = torch.tensor([[*one, *[padding] * (width - len(one))] for one in ids], device=model.device)
        mask_BS = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in ids], device=model.device)
        positions_BP = prompt_positions(mask_BS, tokens)
        with read_routing(model, routers, positions_BP) as tape:
            model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False, logits_to_keep=1)
        rows.append(mean_rows(tape.routing_BPLE, positions_BP).cpu())
    return torch.cat(rows)
