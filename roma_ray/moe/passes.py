"""Running slices on packings: stock transformers layers, with the work left out that nobody reads.

A pass may start after the attention of its first layer (what the activation cache keeps: that attention is frozen too), may
report the states there on the way, and in the last layer computes queries, experts and logits only at the wanted tokens.
All of it is done around the stock layers' own `forward`: an attention or experts block that is left out returns zeros, and
a residual stream plus zero is the stream to the bit. Where a family's code is otherwise, `selfcheck.py` refuses the model.

Shapes: T flat tokens, N kept tokens, P positions, D width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from roma_ray.moe.families import Family, family
from roma_ray.moe.packing import Attention, Captured, Packing, packed_attention, trimmed_layer
from roma_ray.moe.parts import feed_forward, has_mixer, recurrent_mixer, without_feed_forward, without_mixer
from roma_ray.moe.replacing import replaced
from roma_ray.moe.sending import sent
from roma_ray.moe.slices import Slice
from roma_ray.moe.tree_mixer import along_the_tree, sequences


@dataclass(frozen=True)
class Output:
    """What a pass gives."""

    states: Tensor
    """Logits [N, V] of a slice with `lm_head`, else hidden states [N, D] that leave it; N = T unless `keep` was given."""
    after_attention: dict[int, Tensor] = field(default_factory=dict)
    """States [T, D] after the attention of the layers that were asked for, before their experts."""


def run_packed(
    part: Slice,
    packing: Packing,
    states_TD: Tensor | None = None,
    *,
    resume: bool = False,
    after_attention: Sequence[int] = (),
    keep: Sequence[int] | None = None,
    vocabulary_rows: Tensor | None = None,
) -> Output:
    """Run a slice on a packing.

    `states_TD` are the hidden states that enter the slice, with `resume` those after the attention of its first layer;
    without them the slice starts at layer 0 and takes the packing's token ids. `after_attention` names layers
    (whole-model indices) whose states there are returned. `keep` (ascending flat indices) are the tokens whose output is
    wanted: of the last layer and `lm_head` only those are computed. `vocabulary_rows` are the rows of `lm_head` wanted.
    """
    assert states_TD is not None or part.start == 0, "a slice that starts above layer 0 needs hidden states"
    assert states_TD is not None or not resume
    packing = packing.to(part.device) if str(part.device) != packing.device else packing
    attention = Attention(packing)
    kept: dict[int, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    if states_TD is None:
        inputs["input_ids"] = packing.ids_T[None]
    else:
        inputs["inputs_embeds"] = sent(states_TD, part.device, part.dtype)[None]
    layers = part.model.base_model.layers
    rule = family(part.model.config)
    with ExitStack() as stack:
        stack.enter_context(packed_attention(attention))
        last = part.stop - 1
        mixers = [mixer for block in layers if (mixer := recurrent_mixer(block)) is not None]
        tables = sequences(packing) if mixers else ()
        for mixer in mixers:
            stack.enter_context(replaced(mixer, along_the_tree(mixer, *tables)))
        for layer in {part.start if resume else -1, *after_attention, last if keep is not None else -1} - {-1}:
            block = layers[layer - part.start]
            run = _around(
                block,
                rule,
                attention,
                resume=inputs["inputs_embeds"] if resume and layer == part.start else None,
                report=kept if layer in after_attention else None,
                index=layer,
                keep=keep if layer == last else None,
                stack=stack,
            )
            stack.enter_context(replaced(block, run))
        if vocabulary_rows is not None:
            stack.enter_context(replaced(part.model.get_output_embeddings(), _rows_of(part, vocabulary_rows)))
        whole = torch.ones(1, len(packing), dtype=torch.bool, device=part.device)
        output = part.model(
            **inputs,
            attention_mask=whole,
            position_ids=packing.positions_T[None],
            use_cache=False,
        )
    states = output.logits if part.has_lm_head else output.last_hidden_state
    return Output(states[0], kept)


def _around(
    block: nn.Module,
    rule: Family,
    attention: Attention,
    *,
    resume: Tensor | None,
    report: dict[int, Tensor] | None,
    index: int,
    keep: Sequence[int] | None,
    stack: ExitStack,
) -> Callable[..., Tensor]:
    """The forward of one layer with the parts left out that are known already or not wanted."""
    forward = block.forward
    keep_N = None
    if keep is not None:
        host_N = torch.tensor(keep, dtype=torch.long)
        keep_N = sent(host_N, attention.packing.ids_T.device)
        stack.enter_context(trimmed_layer(index, keep_N, host_N))

    def run(hidden_states: Tensor, *others: Any, **settings: Any) -> Tensor:
        # Gemma 4 hands its layers an input of their own, which no supported model has.
        assert all(other is None for other in others), "a layer has an input beside the hidden states"
        # What enters is not what the model's embedding multiplied, but the states themselves.
        middle = resume
        if middle is None and not has_mixer(block):
            middle = hidden_states
        # A recurrent layer needs all tokens up to its mixer, whatever is kept of what comes after.
        elif middle is None and (report is not None or keep_N is None or recurrent_mixer(block) is not None):
            with without_feed_forward(block, pair=rule.experts_return_pair):
                middle = _first(forward(hidden_states, **settings))
        if report is not None:
            assert middle is not None
            report[index] = middle[0]
        if middle is None:
            assert keep_N is not None
            assert keep is not None
            return _trimmed(forward, attention, hidden_states, settings, keep, keep_N)
        if keep_N is not None:
            middle, settings = middle[:, keep_N], _settings_at(settings, keep_N)
        with without_mixer(block):
            return _first(forward(middle, **settings))

    return run


def _trimmed(
    forward: Callable[..., Any],
    attention: Attention,
    hidden_states: Tensor,
    settings: dict[str, Any],
    keep: Sequence[int],
    keep_N: Tensor,
) -> Tensor:
    """A layer at the kept tokens: keys and values of all tokens, queries and the rest of those alone."""
    attention.capture = True
    try:
        forward(hidden_states, **settings)
    except Captured:
        pass
    finally:
        attention.capture = False
    attention.queries = attention.packing.queries_of(keep)
    return _first(forward(hidden_states[:, keep_N], **_settings_at(settings, keep_N)))


def _settings_at(settings: dict[str, Any], keep_N: Tensor) -> dict[str, Any]:
    """A layer's keyword arguments for some of its tokens."""
    rotary = settings.get("position_embeddings")
    if isinstance(rotary, tuple):
        rotary = tuple(table.index_select(-2, keep_N) for table in rotary)
    elif isinstance(rotary, Tensor):
        rotary = rotary.index_select(-2, keep_N)
    changed: dict[str, Any] = {"position_embeddings": rotary}
    if isinstance(settings.get("position_ids"), Tensor):
        changed["position_ids"] = settings["position_ids"].index_select(-1, keep_N)
    return {**settings, **changed}


def _first(output: Any) -> Tensor:
    """A layer's hidden states, whether it returns them alone or first."""
    return output[0] if isinstance(output, tuple) else output


def experts_block(part: Slice, layer: int) -> nn.Module:
    """The feed-forward block of a layer (whole-model index): router, experts and shared experts."""
    return feed_forward(part.model.base_model.layers[layer - part.start])


def _rows_of(part: Slice, rows_V: Tensor) -> Callable[[Tensor], Tensor]:
    head = part.model.get_output_embeddings()
    rows_V = sent(rows_V, part.device)
    weight = head.weight.index_select(0, rows_V)
    bias = None if getattr(head, "bias", None) is None else head.bias.index_select(0, rows_V)
    return lambda hidden_states: functional.linear(hidden_states, weight, bias)
