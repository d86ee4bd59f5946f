"""Router checkpoints: a PEFT adapter that carries the tuned gates whole, with `roma.json` beside it.

The adapter is of PEFT's LN_TUNING kind, whose adapter is a copy of the named module itself: full module paths name the
gates, so stock `PeftModel.from_pretrained(base, folder)` loads it bit-exactly, in bf16 too. A LoRA on `gate` would touch
every layer's gate instead and is not written. It is written from a slice of the model alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from roma_ray.borders.text import brief
from roma_ray.errors import CheckpointError
from roma_ray.moe.folders import MANIFEST, refuse_special_files, refusing_malformed, whole_folder
from roma_ray.moe.masters import tensor_digest
from roma_ray.moe.routers import Routed, Router
from roma_ray.store.files import local_place

FORMAT, FORMAT_VERSION = "roma-ray-routers", 1
WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_MARK = ".ln_tuning_layers."


@dataclass(frozen=True)
class RouterCheckpoint:
    """Tuned routers of one model, apart from any file format."""

    tensors: dict[str, Tensor] = field(repr=False)
    """Tuned tensors by the whole model's own name: `model.layers.11.mlp.gate.weight` (and `.bias` for GPT-OSS)."""
    extras: dict[str, Tensor] = field(repr=False)
    """Untuned tensors of the same gate modules (selection biases), which an adapter of whole modules carries along."""
    base_model: str
    revision: str | None
    model_type: str
    layers: tuple[int, ...]
    num_experts: int
    dtype: str
    """The type that the model was run in and the tensors are in, for example "bfloat16"."""
    fingerprint: str
    """Of the run that made it."""

    def layer_of(self, key: str) -> int:
        """The whole-model layer that a tensor belongs to."""
        return layer_of(key)


def layer_of(key: str) -> int:
    """Whole-model layer index in a key such as `model.layers.11.mlp.gate.weight`. Raises CheckpointError."""
    numbers = [part for part in key.split(".") if part.isdigit()]
    if len(numbers) != 1:
        raise CheckpointError(f"the key {key!r} does not name one layer")
    return int(numbers[0])


def save_adapter(
    folder: str | Path, part: Routed, state: Mapping[str, Tensor], *, base: str, revision: str | None, fingerprint: str
) -> RouterCheckpoint:
    """Write the masters' `state()` as a PEFT adapter and `roma.json`, needing only a slice that holds those layers.

    `state` has fp32 tensors under `layers.{i}.{weight|bias}`; they are stored in the type that the slice's routers have, so
    that what is saved is what was trained. `base` and `revision` name the whole model. Raises CheckpointError, StorageError.
    """
    routers = {router.layer: router for router in part.routers}
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        _, index, name = key.split(".")
        router = routers[int(index)]
        tensors[f"{router.whole_name}.{name}"] = value.to(getattr(router.gate, name).dtype)
    layers = tuple(sorted({layer_of(key) for key in tensors}))
    tuned = [routers[layer] for layer in layers]
    checkpoint = RouterCheckpoint(
        tensors=tensors,
        extras={key: value for router in tuned for key, value in _extras(router).items()},
        base_model=base,
        revision=revision if part.revision is None else part.revision,
        model_type=part.model_type,
        layers=layers,
        num_experts=max(router.num_experts for router in tuned),
        dtype=type_name(part.dtype),
        fingerprint=fingerprint,
    )
    write_adapter(folder, checkpoint)
    return checkpoint


def write_adapter(folder: str | Path, checkpoint: RouterCheckpoint) -> None:
    """Write a checkpoint as a PEFT adapter folder with `roma.json`, whole or not at all. Raises CheckpointError, StorageError."""
    from peft import LNTuningConfig

    check_finite(checkpoint.tensors)
    modules = sorted({key.rpartition(".")[0] for key in checkpoint.tensors}, key=layer_of)
    stored = {
        _adapter_key(key, modules): t.contiguous() for key, t in {**checkpoint.tensors, **checkpoint.extras}.items()
    }
    config = LNTuningConfig(
        target_modules=modules,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=checkpoint.base_model,
        revision=checkpoint.revision,
    )
    # PEFT keeps the paths as a set; a list in layer order makes equal checkpoints equal files.
    config.target_modules = modules
    with whole_folder(Path(folder)) as aside:
        save_file(stored, aside / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(aside))
        write_manifest(aside, checkpoint, kind="adapter")


def write_manifest(folder: Path, checkpoint: RouterCheckpoint, *, kind: str) -> None:
    """Write `roma.json`: what the folder holds and the digest of each tuned tensor."""
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "base_model": checkpoint.base_model,
        "revision": checkpoint.revision,
        "model_type": checkpoint.model_type,
        "layers": list(checkpoint.layers),
        "num_experts": checkpoint.num_experts,
        **_uneven(checkpoint),
        "dtype": checkpoint.dtype,
        "fingerprint": checkpoint.fingerprint,
        "tensors": {
            key: {"shape": list(tensor.shape), "dtype": type_name(tensor.dtype), "sha256": tensor_digest(tensor)}
            for key, tensor in sorted(checkpoint.tensors.items(), key=lambda item: (layer_of(item[0]), item[0]))
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _uneven(checkpoint: RouterCheckpoint) -> dict[str, list[int]]:
    """The experts of each tuned layer, where they differ: a reader of equal layers refuses the tensors' shapes."""
    counts = {layer_of(key): len(tensor) for key, tensor in checkpoint.tensors.items()}
    alike = set(counts.values()) <= {checkpoint.num_experts}
    return {} if alike else {"num_experts_per_layer": [counts[layer] for layer in checkpoint.layers]}


def read_manifest(folder: Path, *, kind: str) -> dict[str, Any]:
    """Read and check `roma.json`. Raises CheckpointError when it is absent, foreign, damaged, or of a newer version."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {MANIFEST}, so roma-ray did not write it") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not of the format {FORMAT!r}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {brief(manifest.get('format_version'))}; this roma-ray reads {FORMAT_VERSION}"
        )
    if manifest.get("kind") != kind:
        raise CheckpointError(f"{folder} holds a router checkpoint of kind {brief(manifest.get('kind'))}, not {kind!r}")
    wanted = {"base_model", "revision", "model_type", "layers", "num_experts", "dtype", "fingerprint", "tensors"}
    if not wanted <= manifest.keys() or not isinstance(manifest["tensors"], dict) or not manifest["tensors"]:
        raise CheckpointError(f"{path} is incomplete: it lacks {sorted(wanted - manifest.keys()) or 'tensors'}")
    fault = _fault(manifest)
    if fault:
        raise CheckpointError(f"{path} contradicts itself or was changed: {fault}")
    return manifest


def _fault(manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with the values of a `roma.json`, if anything: everything in it must fit its list of tensors."""
    for name in ("base_model", "model_type", "fingerprint"):
        if not isinstance(manifest[name], str) or not manifest[name]:
            return f"{name} is not a text"
    if not isinstance(manifest["revision"], str | None):
        return "revision is not a text"
    layers, experts, known = manifest["layers"], manifest["num_experts"], manifest["tensors"]
    if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
        return "layers are not a list of numbers"
    if layers != sorted({layer_of(key) for key in known}):
        return f"it tunes layers {brief(layers)}, but its tensors are of others"
    if not isinstance(getattr(torch, str(manifest["dtype"]), None), torch.dtype):
        return f"{brief(manifest['dtype'])} is no type of numbers"
    counts = manifest.get("num_experts_per_layer", [experts] * len(layers))
    if not isinstance(counts, list) or len(counts) != len(layers) or experts not in counts:
        return "num_experts_per_layer does not fit its layers and num_experts"
    of = dict(zip(layers, counts, strict=True))
    for key, fact in known.items():
        shape = fact.get("shape") if isinstance(fact, dict) else None
        if not isinstance(shape, list) or shape[:1] != [of[layer_of(key)]] or type(shape[0]) is not int:
            return f"{key} is not of {of[layer_of(key)]} experts"
    return None


def read_adapter(folder: str | Path) -> RouterCheckpoint:
    """Read an adapter folder that `write_adapter` wrote.

    Raises CheckpointError for a folder that is not one, and for truncated, altered or non-finite tensors.
    """
    folder = local_place(str(folder))
    if not folder.is_dir():
        raise CheckpointError(f"there is no adapter folder {folder}")
    with refusing_malformed(folder):
        return _read_adapter(folder)


def _read_adapter(folder: Path) -> RouterCheckpoint:
    refuse_special_files(folder)
    _refuse_foreign_adapter(folder)
    manifest = read_manifest(folder, kind="adapter")
    stored = read_safetensors(folder / WEIGHTS)
    by_key = {_whole_key(key): tensor for key, tensor in stored.items()}
    tensors = {key: by_key.pop(key) for key in manifest["tensors"] if key in by_key}
    check_digests(tensors, manifest, folder)
    modules = {known.rpartition(".")[0] for known in tensors}
    for key in by_key:
        # What a tuned gate has beside its own weight and bias, also in modules of its own (Ernie's statistics).
        of_gate = any(key.startswith(f"{module}.") for module in modules)
        if key.removesuffix(".weight").removesuffix(".bias") in modules or not of_gate:
            raise CheckpointError(f"{folder / WEIGHTS} holds {key}, of which {MANIFEST} knows nothing")
    return checkpoint_of(manifest, tensors, extras=by_key)


def load_adapter(folder: str | Path, target: Routed) -> RouterCheckpoint:
    """Put an adapter's gates into a slice (or whole model), in place, in the slice's own type; return what was read.

    Raises CheckpointError when the adapter is damaged, or of another model type, or tunes layers that the slice lacks.
    """
    checkpoint = read_adapter(folder)
    put_routers(checkpoint, target)
    return checkpoint


def put_routers(checkpoint: RouterCheckpoint, target: Routed) -> None:
    """Copy a checkpoint's gates into a slice's routers, in place. Raises CheckpointError when they do not fit."""
    model_type = target.model_type
    if checkpoint.model_type != model_type:
        raise CheckpointError(
            f"these routers are of a {checkpoint.model_type} model ({checkpoint.base_model}), not of a {model_type} one"
        )
    routers = {router.whole_name: router for router in target.routers}
    places: list[tuple[nn.Parameter, Tensor]] = []
    for key, tensor in checkpoint.tensors.items():
        module_name, _, name = key.rpartition(".")
        if module_name not in routers:
            raise CheckpointError(
                f"{key} has no place in layers [{target.start}, {target.stop}) of {target.path}; load a slice that has "
                f"layers {list(checkpoint.layers)}"
            )
        parameter = routers[module_name].gate._parameters.get(name)
        if parameter is None or parameter.shape != tensor.shape:
            found = None if parameter is None else tuple(parameter.shape)
            raise CheckpointError(f"{key} has shape {tuple(tensor.shape)}, but the model's is {found}")
        places.append((parameter, tensor))
    with torch.no_grad():
        for parameter, tensor in places:
            parameter.copy_(tensor)


def checkpoint_of(
    manifest: Mapping[str, Any], tensors: dict[str, Tensor], extras: dict[str, Tensor]
) -> RouterCheckpoint:
    """A checkpoint from a manifest that `read_manifest` accepted."""
    return RouterCheckpoint(
        tensors=tensors,
        extras=extras,
        base_model=str(manifest["base_model"]),
        revision=manifest["revision"],
        model_type=str(manifest["model_type"]),
        layers=tuple(int(layer) for layer in manifest["layers"]),
        num_experts=int(manifest["num_experts"]),
        dtype=str(manifest["dtype"]),
        fingerprint=str(manifest["fingerprint"]),
    )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file whole. Raises CheckpointError when it is absent or damaged."""
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error


def check_digests(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], where: Path) -> None:
    """Compare tensors with the manifest's shapes and digests. Raises CheckpointError."""
    missing = sorted(set(manifest["tensors"]) - set(tensors))
    if missing:
        raise CheckpointError(
            f"{where} lacks {missing[0]} ({len(missing)} of {len(manifest['tensors'])} tensors are missing)"
        )
    check_finite(tensors)
    for key, tensor in tensors.items():
        if list(tensor.shape) != manifest["tensors"][key].get("shape"):
            raise CheckpointError(f"{key} in {where} has another shape than {MANIFEST} says")
        if manifest["tensors"][key].get("sha256") != tensor_digest(tensor):
            raise CheckpointError(
                f"{key} in {where} is not what {MANIFEST} says was written: the file was changed or damaged"
            )


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError when a tensor holds NaN or infinity."""
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(f"{key} holds NaN or infinite values")


def type_name(dtype: torch.dtype) -> str:
    """The name without its prefix: "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _extras(router: Router) -> dict[str, Tensor]:
    state = router.gate.state_dict()
    return {
        f"{router.whole_name}.{name}": t.detach().cpu().clone()
        for name, t in state.items()
        if name not in ("weight", "bias")
    }


def _adapter_key(key: str, modules: list[str]) -> str:
    """The key that PEFT gives a tensor of a copied module; its adapter's name stays in the key only of nested ones."""
    module = next(name for name in modules if key.startswith(f"{name}."))
    rest = key.removeprefix(f"{module}.")
    return f"{_PREFIX}{module}{_MARK}{'default.' if '.' in rest else ''}{rest}"


def _whole_key(key: str) -> str:
    module, mark, rest = key.removeprefix(_PREFIX).partition(_MARK)
    if not mark or not key.startswith(_PREFIX):
        raise CheckpointError(f"{WEIGHTS} holds {key!r}, which is no tensor of a router")
    return f"{module}.{rest.removeprefix('default.')}"


def _refuse_foreign_adapter(folder: Path) -> None:
    if (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{folder} holds pickled weights (adapter_model.bin), which are never read: they can run code"
        )
    try:
        kind = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8")).get("peft_type")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a PEFT adapter: it has no {PEFT_CONFIG}") from error
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / PEFT_CONFIG} cannot be read as JSON: {error}") from error
    if kind != "LN_TUNING":
        raise CheckpointError(f"{folder} is a {kind} adapter, not one that carries whole routers (LN_TUNING)")
