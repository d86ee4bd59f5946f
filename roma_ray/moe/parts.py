"""A decoder layer's parts by their names in transformers: what mixes tokens, what works on each alone, and how to leave one out.

A part that is left out returns zeros at no cost. Shapes: T flat tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from roma_ray.moe.replacing import replaced

# Blocks that work on each token alone; a layer may have several beside one another (Granite's shared experts, Gemma 4's).
_FEED_FORWARD = ("mlp", "block_sparse_moe", "feed_forward", "shared_mlp", "experts")
# Mixers that carry a state from token to token instead of attending: Qwen3-Next's, Granite 4's, LFM2's.
_RECURRENT = ("linear_attn", "mamba", "conv")
# A model's tables and last norm, by their names in its base model: Nemotron's and LFM2's are called otherwise.
EMBEDDINGS = ("embed_tokens", "embeddings")
NORMS = ("norm", "norm_f", "embedding_norm")


def recurrent_mixer(block: nn.Module) -> nn.Module | None:
    """The layer's recurrent mixer, where it has one in place of attention."""
    if _only_part(block) == "linear_attention":
        return block.get_submodule("mixer")
    return next((found for name in _RECURRENT if (found := getattr(block, name, None)) is not None), None)


def has_mixer(block: nn.Module) -> bool:
    """Whether anything in the layer mixes tokens: Nemotron's layers are a mixer or a feed-forward block, not both."""
    return _only_part(block) not in ("moe", "mlp")


def feed_forward(block: nn.Module) -> nn.Module:
    """The layer's block of router, experts and shared experts."""
    return _feed_forward_parts(block)[0]


def final_norm(base: nn.Module) -> str:
    """The name of a base model's last norm."""
    return next(name for name in NORMS if hasattr(base, name))


def _only_part(block: nn.Module) -> str | None:
    """What a layer of one part (Nemotron's `mixer`) is; None for a layer of two."""
    return str(block.block_type) if hasattr(block, "mixer") else None


def _feed_forward_parts(block: nn.Module) -> list[nn.Module]:
    if _only_part(block) is not None:
        return [] if has_mixer(block) else [block.get_submodule("mixer")]
    return [found for name in _FEED_FORWARD if (found := getattr(block, name, None)) is not None]


@contextmanager
def without_mixer(block: nn.Module) -> Iterator[None]:
    """Inside the block the layer's attention or recurrent mixer gives zeros."""
    recurrent = recurrent_mixer(block)
    if not has_mixer(block):
        yield
        return
    attention = "self_attn" if _only_part(block) is None else "mixer"
    part = block.get_submodule(attention) if recurrent is None else recurrent
    with replaced(part, _zeros(pair=recurrent is None)):
        yield


@contextmanager
def without_feed_forward(block: nn.Module, *, pair: bool) -> Iterator[None]:
    """Inside the block all that works on each token alone gives zeros; `pair` where the layer unpacks a pair from it."""
    with ExitStack() as stack:
        for part in _feed_forward_parts(block):
            stack.enter_context(replaced(part, _zeros(pair=pair)))
        router = getattr(block, "router", None)
        if router is not None:
            # A router beside the experts and not in their block (Gemma 4): its choice is not wanted, nor its reading.
            stack.enter_context(replaced(router, lambda hidden_states, *_, **__: (None, None, None)))
        scalar = getattr(block, "layer_scalar", None)
        if scalar is not None:
            # Gemma 4 multiplies what leaves a layer: not what only passes its middle.
            block.layer_scalar = torch.ones_like(scalar)
            stack.callback(setattr, block, "layer_scalar", scalar)
        yield


def _zeros(*, pair: bool) -> Any:
    def nothing(hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        zeros = torch.zeros((), dtype=hidden_states.dtype, device=hidden_states.device).expand_as(hidden_states)
        return (zeros, None) if pair else zeros

    return nothing
