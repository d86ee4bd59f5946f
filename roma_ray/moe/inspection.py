"""Saying what a file or folder holds: an adapter, a merged model, the reference's files, or a base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roma_ray.borders.text import printable
from roma_ray.errors import CheckpointError, ModelError
from roma_ray.moe.adapters import (
    PEFT_CONFIG,
    RouterCheckpoint,
    check_digests,
    checkpoint_of,
    layer_of,
    read_adapter,
    read_manifest,
    type_name,
)
from roma_ray.moe.folders import MANIFEST, refuse_special_file, refuse_special_files, refusing_malformed
from roma_ray.moe.reference import read_reference
from roma_ray.moe.routing_json import read_routing_json
from roma_ray.moe.slices import model_facts
from roma_ray.moe.whole import base_tensors
from roma_ray.store.files import local_place

_PICKLES = {".pt", ".pth", ".bin", ".ckpt"}


def inspect(path: str | Path, *, base: str | None = None) -> dict[str, Any]:
    """Return what `path` holds as plain values: always `kind`, then what that kind has.

    Kinds: `adapter`, `merged`, `reference` (router_ft.pt), `routing` (the reference's JSON), `model`. All but `routing` have
    `dtype` and `parameters` (of the tuned routers; for `model` of the whole model). The first three have `layers`, `shapes`
    and, when the base model is at hand (`base`, or a local folder that the file names), `change` by layer: the norm of
    (tuned - base) over the norm of the base. Raises CheckpointError or ModelError for
    anything foreign, truncated, non-finite or with pickled code, saying why.
    """
    path = local_place(str(path))
    with refusing_malformed(path):
        return _inspect(path, base)


def _inspect(path: Path, base: str | None) -> dict[str, Any]:
    if not path.is_dir():
        refuse_special_file(path)
        if not path.exists():
            raise CheckpointError(f"there is nothing at {path}")
        return _inspect_file(path, base)
    refuse_special_files(path)
    if (path / PEFT_CONFIG).exists() or (path / "adapter_model.bin").exists():
        return _routers(read_adapter(path), "adapter", base)
    if (path / MANIFEST).exists():
        return _routers(read_merged(path), "merged", base)
    if (path / "config.json").exists():
        return {"kind": "model", **model_facts(str(path))}
    raise CheckpointError(f"{path} holds neither a router adapter ({PEFT_CONFIG}) nor a model (config.json)")


def describe(path: str | Path, *, base: str | None = None) -> str:
    """Return `inspect`'s answer as lines for the screen. Raises CheckpointError, ModelError."""
    with refusing_malformed(Path(path)):
        return _lines(path, inspect(path, base=base))


def _lines(path: str | Path, found: Mapping[str, Any]) -> str:
    titles = {
        "adapter": "PEFT adapter of tuned routers",
        "merged": "whole model with tuned routers",
        "reference": "the reference's router_ft.pt",
        "routing": "the reference's routing JSON",
        "model": "a model with no tuned routers of ours",
    }
    lines = [f"{printable(str(path), None)}: {titles[found['kind']]}"]
    hidden = {"kind", "shapes", "change"}
    shown = {name: value for name, value in found.items() if name not in hidden}
    if "parameters" in shown:
        shown["parameters"] = f"{shown['parameters']:,}"
    lines += [f"  {name.replace('_', ' ')}: {_plain(value)}" for name, value in shown.items()]
    for layer in found.get("layers", ()) if "shapes" in found else ():
        shapes = ", ".join(
            f"{printable(key)} {'x'.join(map(str, shape))}"
            for key, shape in found["shapes"].items()
            if layer_of(key) == layer
        )
        change = found["change"]
        moved = "" if change is None else f"  changed by {change[layer]:.3%}"
        lines.append(f"  layer {layer}: {shapes}{moved}")
    if "shapes" in found and found["change"] is None:
        lines.append("  change by layer: give the base model (--base) to measure it")
    return "\n".join(lines)


def read_merged(folder: Path) -> RouterCheckpoint:
    """Read the tuned routers back out of a merged model, checked against its roma.json. Raises CheckpointError, ModelError."""
    manifest = read_manifest(folder, kind="merged")
    tensors = base_tensors(str(folder), list(manifest["tensors"]))
    # A merged file may hold a gate in a wider type than it was trained in. Widening is lossless: casting back gives the digest.
    narrowed = {key: tensor.to(_dtype(str(manifest["tensors"][key].get("dtype")))) for key, tensor in tensors.items()}
    check_digests(narrowed, manifest, folder)
    return checkpoint_of(manifest, narrowed, extras={})


def relative_changes(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[int, float]:
    """By layer: norm of (tuned - base) over the norm of the base, all of a router's tensors together, in fp64."""
    moved: dict[int, float] = {}
    total: dict[int, float] = {}
    for key, tensor in tensors.items():
        layer = layer_of(key)
        # Compare in the tuned tensor's type: otherwise every rounded weight would count as moved.
        original = base[key].to(tensor.dtype).double()
        moved[layer] = moved.get(layer, 0.0) + float((tensor.double() - original).square().sum())
        total[layer] = total.get(layer, 0.0) + float(original.square().sum())
    return {
        layer: (moved[layer] / total[layer]) ** 0.5 if total[layer] else float(moved[layer] > 0)
        for layer in sorted(moved)
    }


def _inspect_file(path: Path, base: str | None) -> dict[str, Any]:
    if path.suffix == ".json":
        entries = read_routing_json(path)
        first = entries[0]
        return {
            "kind": "routing",
            "questions": len(entries),
            "successful": sum(entry.is_correct for entry in entries),
            "layers": list(first.layers),
            "num_experts": first.routing_LE.shape[1],
        }
    if path.suffix in _PICKLES:
        found = read_reference(path)
        tensors = {f"model.{key}": tensor for key, tensor in found.tensors.items()}
        return {
            "kind": "reference",
            "base_model": found.model_name,
            "layers": list(found.layers),
            "dtype": ", ".join(sorted({type_name(tensor.dtype) for tensor in tensors.values()})),
            "parameters": sum(tensor.numel() for tensor in tensors.values()),
            "shapes": {key: tuple(tensor.shape) for key, tensor in found.tensors.items()},
            "change": _change(tensors, base, found.model_name, None),
        }
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is one file of a checkpoint; give its folder")
    raise CheckpointError(
        f"{path} is of no kind that is known here: an adapter or model folder, router_ft.pt, or a routing JSON"
    )


def _routers(checkpoint: RouterCheckpoint, kind: str, base: str | None) -> dict[str, Any]:
    return {
        "kind": kind,
        "base_model": checkpoint.base_model,
        "revision": checkpoint.revision,
        "model_type": checkpoint.model_type,
        "layers": list(checkpoint.layers),
        "num_experts": checkpoint.num_experts,
        "dtype": checkpoint.dtype,
        "parameters": sum(tensor.numel() for tensor in checkpoint.tensors.values()),
        "fingerprint": checkpoint.fingerprint,
        "shapes": {key: tuple(tensor.shape) for key, tensor in checkpoint.tensors.items()},
        "change": _change(checkpoint.tensors, base, checkpoint.base_model, checkpoint.revision),
    }


def _change(
    tensors: Mapping[str, Tensor], base: str | None, named: str | None, revision: str | None
) -> dict[int, float] | None:
    """None when the base is neither given nor a local folder: looking at a file must not download a model."""
    where = base or named
    if where is None or (base is None and not local_place(where).is_dir()):
        return None
    original = base_tensors(where, list(tensors), revision=None if base else revision)
    for key, tensor in tensors.items():
        if original[key].shape != tensor.shape:
            raise ModelError(f"{key} has shape {tuple(tensor.shape)}, but {where} has {tuple(original[key].shape)}")
    return relative_changes(tensors, original)


def _dtype(name: str) -> Any:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"{MANIFEST} names an unknown type {name!r}")
    return found


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value)
    return "none" if value is None else printable(str(value), 300)
