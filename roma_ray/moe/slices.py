"""Slices of a model: consecutive layers as a stock transformers model of their own, read alone from the checkpoint.

A trunk (start 0) takes token ids and returns the hidden states that enter layer `stop`; a head takes those and returns
logits. Chained, slices give what the whole model gives.

Shapes: B batch, S sequence, P positions, D width, V vocabulary.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from roma_ray.errors import ModelError
from roma_ray.moe.backbones import model_class_of, plain_key
from roma_ray.moe.families import family, is_wrapper, refusal
from roma_ray.moe.fitting import check_fit, refuse, skeleton_of
from roma_ray.moe.folders import refusing_malformed
from roma_ray.moe.packing import ATTENTION
from roma_ray.moe.parts import EMBEDDINGS, NORMS, final_norm
from roma_ray.moe.routers import Router, find_routers
from roma_ray.moe.slice_config import slice_config
from roma_ray.moe.snapshot import Snapshot, open_snapshot
from roma_ray.moe.uneven import PER_LAYER, expert_counts

_LAYER_KEY = re.compile(r"^((?:(?:model|backbone)\.)?layers\.)(\d+)(\..+)$")
_EMBEDDING_KEY = re.compile(rf"^(?:(?:model|backbone)\.)?(?:{'|'.join(EMBEDDINGS)})\.weight$")
_NORM_KEY = re.compile(rf"^(?:(?:model|backbone)\.)?(?:{'|'.join(NORMS)})\.\w+$")
_HEAD_KEY = re.compile(r"^lm_head\.\w+$")


@dataclass
class Slice:
    """Layers [start, stop) of a model, frozen and in evaluation mode."""

    model: PreTrainedModel
    """A causal language model when it has the `lm_head`, else the family's base model."""
    start: int
    stop: int
    num_layers: int
    """Layers of the whole model."""
    path: str
    revision: str | None
    """Commit hash of a hub model; None for a local folder."""
    wrapper: str | None = None
    """Type of the multimodal model that these layers are the language model of."""

    @cached_property
    def routers(self) -> list[Router]:
        """The slice's routers in layer order, with whole-model layer indices."""
        return find_routers(self.model, first_layer=self.start, wrapped=self.wrapper is not None)

    @property
    def model_type(self) -> str:
        """The whole model's."""
        return self.wrapper or str(self.model.config.model_type)

    @property
    def has_lm_head(self) -> bool:
        """Whether the slice ends in logits."""
        return self.model.get_output_embeddings() is not None

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The type it computes in (some families keep a few vectors in fp32)."""
        return self.model.config.dtype


def model_facts(path: str, *, revision: str | None = None) -> dict[str, Any]:
    """Return what can be known of a model without its weights, as plain JSON-able values.

    Keys: `model_type`, `scoring`, `num_layers`, `moe_layers` (list), `num_experts` (of the largest
    layer), `experts_by_layer` (of the MoE layers), `top_k`, `hidden_size`, `vocab_size`,
    `parameters` (of the whole model), `dtype` (name of the type that the checkpoint says it is in, else "float32"),
    `quantization` ("MXFP4", "FP8" or None: how it is stored, before it is loaded), `revision` (commit hash or None). Raises
    ModelError.
    """
    snapshot = open_snapshot(path, revision)
    with refusing_malformed(snapshot.folder / "config.json", ModelError):
        facts = _facts(snapshot)
    for layer, experts in zip(facts["moe_layers"], facts["experts_by_layer"], strict=True):
        if not 1 <= facts["top_k"] <= experts:
            raise ModelError(
                f"{path} chooses {facts['top_k']} of {experts} experts in layer {layer}, which no model does"
            )
    return facts


def _facts(snapshot: Snapshot) -> dict[str, Any]:
    rule = family(snapshot.config())
    config = snapshot.backbone()
    model = skeleton_of(model_class_of(config, with_lm_head=True), config)
    routers = find_routers(model)
    counts = expert_counts(config)
    bare = [router.layer for router in routers if counts is not None and counts[router.layer] == 0]
    if bare:
        raise ModelError(f"{snapshot.path}: {PER_LAYER} gives layer {bare[0]} no experts, and it is no dense one")
    if not routers:
        raise ModelError(
            f"{snapshot.path} is a {rule.model_type} model without any MoE layer: {refusal(rule.model_type)}"
        )
    return {
        "model_type": rule.model_type,
        "scoring": rule.scoring.value,
        "num_layers": config.num_hidden_layers,
        "moe_layers": [router.layer for router in routers],
        "num_experts": routers[0].width,
        "experts_by_layer": [router.num_experts for router in routers],
        "top_k": routers[0].top_k,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "parameters": model.num_parameters(),
        "dtype": str(config.dtype or torch.float32).removeprefix("torch."),
        "quantization": None if snapshot.scheme is None else snapshot.scheme.name,
        "revision": snapshot.revision,
    }


def load_slice(
    path: str,
    *,
    start: int = 0,
    stop: int | None = None,
    dtype: torch.dtype,
    device: str = "cpu",
    revision: str | None = None,
    experts_backend: str = "eager",
    attention: str = "sdpa",
    with_lm_head: bool,
) -> Slice:
    """Load layers [start, stop) of a safetensors checkpoint, reading only the tensors that they need.

    `path` is a local folder or a hub id (then only the shards needed are downloaded). `stop` None means the last layer.
    `attention` falls back to "eager" for families without it (GPT-OSS has no sdpa). `with_lm_head` asks for logits and
    needs the last layer; without it, a slice up to the last layer ends in the final norm, and any other in raw hidden
    states. Raises ModelError for a model that cannot be tuned or sliced, and for missing, foreign or damaged weights.
    """
    snapshot = open_snapshot(path, revision)
    whole, config = snapshot.config(), snapshot.backbone()
    family(whole)
    total = config.num_hidden_layers
    end = total if stop is None else stop
    if with_lm_head and end != total:
        raise ModelError(f"only a slice that ends with the last layer ({total}) has logits, not one that ends at {end}")
    sliced = slice_config(config, start, end)
    sliced.use_cache = False
    tied = bool(getattr(config, "tie_word_embeddings", False))
    embeddings, norm = start == 0 or (with_lm_head and tied), end == total
    keys = wanted_keys(snapshot, start, end, embeddings=embeddings, norm=norm, with_lm_head=with_lm_head)
    model_class = model_class_of(config, with_lm_head=with_lm_head)
    if attention == "sdpa" and not model_class._supports_sdpa:
        attention = "eager"
    model = _load(
        model_class,
        sliced,
        snapshot,
        keys,
        _stand_ins(model_class, sliced, keys.values(), dtype, embeddings=embeddings, norm=norm),
        first_layer=start,
        dtype=dtype,
        device_map={"": device},
        attn_implementation=ATTENTION[attention],
        experts_implementation=experts_backend,
    )
    base = model.base_model
    if start > 0:
        _drop_input_embeddings(base, keep=with_lm_head and tied)
    if end < total:
        setattr(base, final_norm(base), nn.Identity())
    model.requires_grad_(False)
    wrapper = whole.model_type if is_wrapper(whole.model_type) else None
    return Slice(model.eval(), start, end, total, path, snapshot.revision, wrapper)


def position_ids(attention_mask_BS: Tensor) -> Tensor:
    """Return each real token's place in its own sequence, from 0; padding gets 0. The same for left and right padding."""
    return (attention_mask_BS.long().cumsum(dim=-1) - 1).clamp(min=0)


def wanted_keys(
    snapshot: Snapshot, start: int, stop: int, *, embeddings: bool, norm: bool, with_lm_head: bool
) -> dict[str, str]:
    """Map each needed checkpoint key to its key in the slice (layers renumbered from 0)."""
    wanted: dict[str, str] = {}
    for stored in snapshot.tensors:
        key = plain_key(stored)
        match = _LAYER_KEY.match(key)
        if match is not None:
            if start <= int(match[2]) < stop:
                wanted[stored] = f"{match[1]}{int(match[2]) - start}{match[3]}"
        elif (
            (_EMBEDDING_KEY.match(key) and embeddings)
            or (_NORM_KEY.match(key) and norm)
            or (_HEAD_KEY.match(key) and with_lm_head)
        ):
            wanted[stored] = key
    return wanted


def _load(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    snapshot: Snapshot,
    keys: dict[str, str],
    stand_ins: dict[str, Tensor],
    *,
    first_layer: int,
    **placement: Any,
) -> PreTrainedModel:
    """Let transformers itself convert and place the tensors; what it would fill at random is an error here."""
    with quiet_loading():
        lazy = snapshot.lazy_tensors(keys, placement["dtype"])
        state = {**stand_ins, **{keys[key]: tensor for key, tensor in lazy.items()}}
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        check_fit(skeleton_of(model_class, config), shapes, snapshot.path, first_layer=first_layer)
        try:
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=state,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **placement,
            )
        except RuntimeError as error:
            # No room for them, or experts that do not go together.
            raise ModelError(f"the weights in {snapshot.path} cannot be loaded: {str(error).splitlines()[0]}") from None
    refuse(loading_faults(info), snapshot.path)
    return model


_FAULTS = {"missing_keys": "is missing", "mismatched_keys": "does not fit", "unexpected_keys": "has no place in it"}


def loading_faults(info: Mapping[str, Any], *kinds: str) -> list[str]:
    """What transformers' own report of a load says is missing, of another shape or foreign; `kinds` default to all three."""
    return [
        f"{entry[0] if isinstance(entry, tuple) else entry} {_FAULTS[kind]}"
        for kind in kinds or _FAULTS
        for entry in sorted(info[kind], key=str)
    ]


# While it loads, transformers puts other functions in the place of its classes' own (weight tying among them). Two threads
# that load at once can leave them there for good, and then no later model of the process has its embeddings tied.
_LOADING = threading.RLock()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Load one model at a time in a process, without transformers' bars and reports; missing tensors raise one ModelError."""
    with _LOADING:
        shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if shown:
                transformers_logging.enable_progress_bar()


def _stand_ins(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    names: Iterable[str],
    dtype: torch.dtype,
    *,
    embeddings: bool,
    norm: bool,
) -> dict[str, Tensor]:
    """Tensors of one stored element for the parts that a slice does not use, so that no memory or time goes into them.

    `embeddings` and `norm` say which it uses: those have to be in the checkpoint.
    """
    prefixed = any(name.startswith(("model.", "backbone.")) for name in names)
    prefix = f"{model_class.base_model_prefix}." if prefixed else ""
    base = skeleton_of(model_class, config).base_model
    table = next(name for name in EMBEDDINGS if hasattr(base, name))
    unused: dict[str, Tensor] = {}
    if not embeddings:
        shape = (config.vocab_size, config.hidden_size)
        unused[f"{prefix}{table}.weight"] = torch.zeros((), dtype=dtype).expand(shape)
    if not norm:
        unused[f"{prefix}{final_norm(base)}.weight"] = torch.zeros((), dtype=dtype).expand(config.hidden_size)
    return unused


def _drop_input_embeddings(base: PreTrainedModel, *, keep: bool) -> None:
    """Replace the embedding table of a slice that is fed hidden states, unless `lm_head` shares it."""
    if not keep:
        table = base.get_input_embeddings().weight
        row = nn.Embedding(
            1, base.config.hidden_size, device=table.device, dtype=table.dtype, _weight=torch.zeros_like(table[:1])
        )
        base.set_input_embeddings(row)
