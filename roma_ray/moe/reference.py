"""The public reference's `router_ft.pt`, out and in.

`{"target_layers": [11, ...], "state_dict": {"layers.11.mlp.gate.weight": tensor, ...}, "model_name": "..."}`: a pickle, so it
is read with `weights_only=True` and every part of it is checked.
"""

from __future__ import annotations

import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roma_ray.errors import CheckpointError
from roma_ray.moe.adapters import RouterCheckpoint, check_finite, layer_of, type_name
from roma_ray.moe.backbones import plain_key
from roma_ray.moe.folders import refuse_special_file, refusing_malformed
from roma_ray.moe.whole import router_shapes
from roma_ray.store.artifacts import write_atomically

_KEY = re.compile(r"^(?:model\.)?(layers\.(\d+)\.[A-Za-z_.]+\.(?:weight|bias))$")


@dataclass(frozen=True)
class ReferenceFile:
    """What a router_ft.pt says, checked in itself but not against a model."""

    model_name: str | None
    layers: tuple[int, ...]
    tensors: dict[str, Tensor]
    """By the reference's own keys: `layers.11.mlp.gate.weight`."""


def export_reference(checkpoint: RouterCheckpoint, path: str | Path) -> None:
    """Write a checkpoint as the reference's router_ft.pt, whole or not at all. Raises StorageError."""
    content = {
        "target_layers": list(checkpoint.layers),
        "state_dict": {_short(key): tensor.contiguous() for key, tensor in checkpoint.tensors.items()},
        "model_name": checkpoint.base_model,
    }
    write_atomically(path, lambda aside: torch.save(content, aside))


def read_reference(path: str | Path) -> ReferenceFile:
    """Read a router_ft.pt. Raises CheckpointError for a foreign, truncated or non-finite file, and for one with pickled code."""
    refuse_special_file(Path(path))
    with refusing_malformed(path):
        return _checked(path, _unpickle(Path(path)))


def _checked(path: str | Path, content: Any) -> ReferenceFile:
    if not isinstance(content, dict) or not {"target_layers", "state_dict"} <= content.keys():
        raise CheckpointError(f"{path} is not a router_ft.pt: it needs target_layers, state_dict and model_name")
    state = content["state_dict"]
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"the state_dict of {path} is empty or not a dictionary")
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = _KEY.match(key) if isinstance(key, str) else None
        if match is None:
            raise CheckpointError(
                f"{path} holds {key!r}, which is no router's weight or bias (layers.11.mlp.gate.weight)"
            )
        if (
            not isinstance(tensor, Tensor)
            or not tensor.is_floating_point()
            or tensor.layout != torch.strided
            or tensor.is_meta
            or tensor.numel() == 0
            or tensor.dim() != (1 if key.endswith("bias") else 2)
        ):
            raise CheckpointError(f"{key} in {path} is not a router's tensor of floating-point numbers")
        if match[1] in tensors:
            raise CheckpointError(f"{path} holds {match[1]} twice, with and without `model.`")
        tensors[match[1]] = tensor.detach()
    check_finite(tensors)
    layers = tuple(sorted({layer_of(key) for key in tensors}))
    named = content["target_layers"]
    if not isinstance(named, (list, tuple)) or tuple(sorted(named)) != layers:
        raise CheckpointError(f"{path} says it tunes layers {named}, but its tensors are of layers {list(layers)}")
    return ReferenceFile(_name_of(path, content.get("model_name")), layers, tensors)


def _name_of(path: str | Path, value: Any) -> str | None:
    if not isinstance(value, str | None):
        raise CheckpointError(f"the model_name of {path} is no text")
    return value or None


def import_reference(path: str | Path, *, base: str, revision: str | None = None) -> RouterCheckpoint:
    """Read a router_ft.pt as a checkpoint of the model `base`, whose routers' names and shapes it must match.

    Selection biases and the like stay the base's, as the file has none. Raises CheckpointError, ModelError.
    """
    found = read_reference(path)
    facts, shapes = router_shapes(base, revision=revision)
    by_short = {_short(name): name for name in shapes}
    tensors: dict[str, Tensor] = {}
    for key, tensor in found.tensors.items():
        if key not in by_short:
            raise CheckpointError(
                f"{path} holds {key}, but {base} has no such router; its MoE layers are {facts['moe_layers']}"
            )
        name = by_short[key]
        if tuple(tensor.shape) != shapes[name]:
            raise CheckpointError(f"{key} in {path} has shape {tuple(tensor.shape)}, but {base} needs {shapes[name]}")
        tensors[name] = tensor
    lacking = sorted(name for name in shapes if layer_of(name) in found.layers and name not in tensors)
    if lacking:
        raise CheckpointError(f"{path} lacks {lacking[0]}, which a tuned router of {base} has")
    return RouterCheckpoint(
        tensors=tensors,
        extras={},
        base_model=base,
        revision=facts["revision"],
        model_type=facts["model_type"],
        layers=found.layers,
        num_experts=facts["num_experts"],
        dtype=type_name(next(iter(tensors.values())).dtype),
        fingerprint="imported",
    )


def _short(name: str) -> str:
    """The reference's name of a tensor: it knows language models alone."""
    return plain_key(name).removeprefix("model.")


def _unpickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # torch's own message advises loading without `weights_only`; ours must not repeat that.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is refused: it is no plain dictionary of tensors, and reading more than that from a pickle can run "
            "its author's code"
        ) from None
    # What torch raises for files that are cut off or not its own.
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is truncated or not a torch file: {error}") from error
