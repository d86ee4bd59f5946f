"""Slices on padded batches by transformers' own forward: what packed passes are compared with.

Shapes: B batch, S sequence, P positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from roma_ray.moe.slices import Slice, position_ids


def slice_hidden(part: Slice, inputs: Tensor, attention_mask_BS: Tensor) -> Tensor:
    """Return the hidden states [B, S, D] that leave a slice without `lm_head`: those that enter layer `stop`.

    `inputs` are token ids [B, S] for a slice that starts at layer 0, else hidden states [B, S, D]. Left and right padding
    give the same states at real positions; states at padding are meaningless.
    """
    assert not part.has_lm_head, "this slice ends in logits: use slice_logits"
    return part.model(**_forward_arguments(part, inputs, attention_mask_BS)).last_hidden_state


def slice_logits(part: Slice, inputs: Tensor, attention_mask_BS: Tensor, positions_BP: Tensor) -> Tensor:
    """Return the logits [B, P, V] of a slice with `lm_head` at `positions_BP` of the padded batch.

    `inputs` are token ids [B, S] for a slice that starts at layer 0, else hidden states [B, S, D]. Entries of -1 in
    `positions_BP` are padding and give zero rows. Only the rows asked for go through `lm_head`.
    """
    assert part.has_lm_head, "this slice has no lm_head: use slice_hidden"
    positions_BP = positions_BP.to(part.device)
    arguments = _forward_arguments(part, inputs, attention_mask_BS)
    logits_BPV = part.model(**arguments, logits_to_keep=positions_BP.clamp(min=0)).logits
    return logits_BPV.masked_fill((positions_BP < 0)[:, :, None], 0.0)


def _forward_arguments(part: Slice, inputs: Tensor, attention_mask_BS: Tensor) -> dict[str, Any]:
    mask = attention_mask_BS.to(part.device)
    arguments = {"attention_mask": mask, "position_ids": position_ids(mask), "use_cache": False}
    if part.start == 0:
        return {**arguments, "input_ids": inputs.to(part.device)}
    return {**arguments, "inputs_embeds": inputs.to(part.device, part.dtype)}
