"""What a whole model's files say of its routers without loading it: shapes, the keys they are stored under, their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from roma_ray.errors import ModelError
from roma_ray.moe.backbones import model_class_of, plain_key
from roma_ray.moe.families import is_wrapper
from roma_ray.moe.fitting import by_target, check_fit, skeleton_of
from roma_ray.moe.parts import final_norm
from roma_ray.moe.routers import find_routers, router_parameters
from roma_ray.moe.slices import model_facts, wanted_keys
from roma_ray.moe.snapshot import Snapshot, open_snapshot


def router_shapes(path: str, *, revision: str | None = None) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return `model_facts` and the shape of every tunable router tensor by its whole-model name. Raises ModelError."""
    facts = model_facts(path, revision=revision)
    snapshot = open_snapshot(path, revision)
    wrapped = is_wrapper(snapshot.config().model_type)
    shapes = {
        f"{router.whole_name}.{name}": tuple(parameter.shape)
        for router in find_routers(_skeleton(snapshot), wrapped=wrapped)
        for name, parameter in router_parameters(router).items()
    }
    return facts, shapes


def checkpoint_keys(snapshot: Snapshot, names: Sequence[str]) -> dict[str, str]:
    """Map whole-model tensor names to the keys that the checkpoint's files have for them.

    They differ where transformers renames on loading (Mixtral's files say `block_sparse_moe.gate`). Raises ModelError
    when a tensor is absent, or stored merged with others so that it cannot be exchanged alone.
    """
    skeleton = _skeleton(snapshot)
    stored = {plain: key for key, plain in _all_keys(snapshot, skeleton).items()}
    sources, merged = by_target(skeleton, dict.fromkeys(stored, ()))
    plain_names = {name: plain_key(name) for name in names}
    found = {
        name: stored[next(iter(sources[plain]))]
        for name, plain in plain_names.items()
        if plain in sources and plain not in merged
    }
    missing = sorted(set(names) - found.keys())
    if missing:
        raise ModelError(
            f"{snapshot.path} has no tensor of its own for {missing[0]} ({len(missing)} of {len(names)} are missing)"
        )
    return found


def check_weights(snapshot: Snapshot) -> None:
    """Refuse a model that lacks a tensor or has one of another shape, by the headers of all its files. Raises ModelError."""
    skeleton = _skeleton(snapshot)
    keys = _all_keys(snapshot, skeleton)
    stored = snapshot.lazy_tensors(list(keys))
    check_fit(skeleton, {keys[key]: tensor.shape for key, tensor in stored.items()}, snapshot.path)


def base_tensors(path: str, names: Sequence[str], *, revision: str | None = None) -> dict[str, Tensor]:
    """Read some tensors of a checkpoint by their whole-model names, in the type they are stored in. Raises ModelError."""
    snapshot = open_snapshot(path, revision)
    keys = checkpoint_keys(snapshot, names)
    lazy = snapshot.lazy_tensors(keys.values())
    return {name: lazy[key][...] for name, key in keys.items()}


@dataclass(frozen=True)
class ModelSizes:
    """Parameters of a model's parts: of each layer, of the input embeddings, of the final norm with `lm_head`."""

    layers: tuple[int, ...]
    embedding: int
    head: int


def model_sizes(path: str, *, revision: str | None = None) -> ModelSizes:
    """Count a model's parameters by part, from its configuration alone. Raises ModelError."""
    model = _skeleton(open_snapshot(path, revision))
    base = model.base_model
    layers = tuple(sum(p.numel() for p in layer.parameters()) for layer in base.layers)
    head = model.get_output_embeddings().weight.numel() + sum(
        p.numel() for p in base.get_submodule(final_norm(base)).parameters()
    )
    return ModelSizes(layers, base.get_input_embeddings().weight.numel(), head)


def _all_keys(snapshot: Snapshot, skeleton: PreTrainedModel) -> dict[str, str]:
    """The keys of all that the language model needs, as the files and as it has them."""
    layers = skeleton.config.num_hidden_layers
    return wanted_keys(snapshot, 0, layers, embeddings=True, norm=True, with_lm_head=True)


def _skeleton(snapshot: Snapshot) -> PreTrainedModel:
    config = snapshot.backbone()
    return skeleton_of(model_class_of(config, with_lm_head=True), config)
