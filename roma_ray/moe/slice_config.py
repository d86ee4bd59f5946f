"""The configuration of a slice: the same model class with fewer layers, and every per-layer rule moved with them.

Rules that depend on a layer's index become explicit (Qwen's `decoder_sparse_step`) or are shifted (`first_k_dense_replace`);
an attribute about layers that is not known here is refused rather than guessed, because a wrong guess builds another model.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig

from roma_ray.errors import ModelError

# One entry a layer: cut out the slice's part.
_PER_LAYER = (
    *("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers"),
    *("num_attention_heads_per_layer", "layer_rope_theta", "num_experts_per_layer"),
)
# How many of the first layers are dense, by the families' names for it.
_DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers")
# Multipliers of the input embeddings: already inside the hidden states that a later slice is fed.
_EMBEDDING_MULTIPLIERS: dict[str, Any] = {"embedding_multiplier": 1.0, "mup_enabled": False}
# Rewritten below, or without a bearing on what a layer computes.
_HANDLED = frozenset(
    (
        *_PER_LAYER,
        *_DENSE_FIRST,
        *("num_hidden_layers", "mlp_only_layers", "decoder_sparse_step"),
        *("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
        *(
            "max_window_layers",
            "layer_norm_eps",
            "layernorm_epsilon",
            "layer_norm_epsilon",
            "num_nextn_predict_layers",
            "num_mtp_layers",
            "mtp_layers_block_type",
        ),
        # Written out in `layer_types`; the size of a table that is used by layers of another setting alone.
        *("global_attn_every_n_layers", "vocab_size_per_layer_input"),
    )
)
_ABOUT_LAYERS = ("layer", "interval", "sparse_step", "first_k", "period")


def slice_config(config: PreTrainedConfig, start: int, stop: int) -> PreTrainedConfig:
    """Return a copy of `config` for layers [start, stop) of the model, as a model of stop - start layers.

    Raises ModelError for a configuration whose layer rules are unknown or cannot be expressed for this cut.
    """
    total = config.num_hidden_layers
    if not 0 <= start < stop <= total:
        raise ModelError(f"layers [{start}, {stop}) are not a part of a model of {total} layers")
    _refuse_unknown(config)
    changes: dict[str, Any] = {"num_hidden_layers": stop - start}
    for name in _PER_LAYER:
        entries = getattr(config, name, None)
        if entries is not None:
            if len(entries) != total:
                raise ModelError(f"the configuration's {name} has {len(entries)} entries for {total} layers")
            changes[name] = list(entries[start:stop])
    changes.update(_sparse_step(config, start, stop))
    changes.update(_ernie_range(config, start, stop))
    for name in _DENSE_FIRST:
        count = getattr(config, name, None)
        if count is not None:
            changes[name] = min(max(count - start, 0), stop - start)
    if start > 0:
        changes.update({name: neutral for name, neutral in _EMBEDDING_MULTIPLIERS.items() if hasattr(config, name)})
    sliced = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(sliced, name, value)
    if config.is_heterogeneous:
        # Gemma 4: settings that some layers have of their own, by the layer's index.
        own = config._heterogeneity_spec.per_layer_overrides
        sliced.per_layer_config = {layer - start: own[layer] for layer in range(start, stop) if layer in own}
    return sliced


def _sparse_step(config: PreTrainedConfig, start: int, stop: int) -> dict[str, Any]:
    """Qwen: layer i is sparse if it is not listed and (i + 1) is a multiple of the step. Written out as a list."""
    step = getattr(config, "decoder_sparse_step", None)
    if step is None:
        return {}
    listed = config.mlp_only_layers or []
    dense = [layer - start for layer in range(start, stop) if layer in listed or (layer + 1) % step]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def _ernie_range(config: PreTrainedConfig, start: int, stop: int) -> dict[str, Any]:
    """Ernie: layer i is sparse if first <= i <= last and (i + 1) is a multiple of the interval."""
    interval = getattr(config, "moe_layer_interval", None)
    if interval is None:
        return {}
    first, last = config.moe_layer_start_index, config.moe_layer_end_index
    if interval > 1 and start % interval:
        raise ModelError(
            f"this model has an MoE layer every {interval} layers, so it can only be cut at a multiple of {interval}, not at {start}"
        )
    # A slice of dense layers alone starts its MoE part after its end; an index below zero would mean "the last layer".
    if last < start:
        return {"moe_layer_start_index": stop - start, "moe_layer_end_index": stop - start}
    return {"moe_layer_start_index": max(first - start, 0), "moe_layer_end_index": last - start}


def _refuse_unknown(config: PreTrainedConfig) -> None:
    unknown = sorted(
        name
        for name, value in vars(config).items()
        # 0 and False turn a rule off (Gemma 4's layers that share keys, its inputs a layer).
        if value not in (None, [], {}, 0)
        and not name.startswith("_")
        and name not in _HANDLED
        and any(word in name for word in _ABOUT_LAYERS)
    )
    if unknown:
        raise ModelError(
            f"this model cannot be cut into slices: the layer rules {unknown} of its configuration are not known here"
        )
