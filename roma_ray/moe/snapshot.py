"""A model's files: a local folder or one commit of a hub repository, with only the needed shards downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from roma_ray.errors import ModelError
from roma_ray.moe import deepseek
from roma_ray.moe.backbones import backbone_of
from roma_ray.moe.families import has_family, refusal, supported_families
from roma_ray.moe.folders import refuse_special_files, refusing_malformed
from roma_ray.moe.quantized import Scheme, Stored, Unpacked, scheme_of
from roma_ray.moe.uneven import GateRows, declare
from roma_ray.store.buckets import is_object
from roma_ray.store.files import local_place

# Every path that loads a model passes here: transformers' own loaders then know the class too.
deepseek.register()

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Far above any model there is.
_LARGEST = 2**31
_MOST = {
    **{"num_hidden_layers": 1000, "vocab_size": 2**24},
    **{"num_experts": 10_000, "n_routed_experts": 10_000, "num_local_experts": 10_000},
}


@dataclass(frozen=True)
class Snapshot:
    """Where one model's files are. Open it with `open_snapshot`."""

    path: str
    """As the user gave it: a folder or a hub id."""
    folder: Path
    """The folder that its configuration lies in; a hub snapshot may not hold its shards yet."""
    revision: str | None
    """Commit hash of a hub snapshot; None for a local folder."""

    def file(self, name: str) -> Path:
        """Return the local path of a file, downloading it when it belongs to a hub snapshot. Raises ModelError."""
        local = self.folder / name
        if local.exists():
            return local
        if self.revision is None:
            raise ModelError(f"{self.path} has no file {name}")
        return _download(self.path, name, self.revision)

    def config(self) -> PreTrainedConfig:
        """Return the model's configuration, as of a plain model: quantized tensors are dequantized when they are loaded.

        Raises ModelError for an unknown model type or a quantization that is not read.
        """
        _check_sizes(self.folder / "config.json")
        try:
            with refusing_malformed(self.folder / "config.json", ModelError):
                config = AutoConfig.from_pretrained(str(self.folder), trust_remote_code=False)
        except (ModelError, ValueError, OSError, KeyError, json.JSONDecodeError) as error:
            model_type = _model_type(self.folder)
            known = model_type in supported_families()
            why = refusal(model_type) if model_type and not known else f"its config.json cannot be read: {error}"
            raise ModelError(f"{self.path}: {why}") from error
        if self.scheme is not None:
            for part in (config, config.get_text_config()):
                if hasattr(part, "quantization_config"):
                    del part.quantization_config
                # The type that quantized models are published for; some do not say it.
                part.dtype = part.dtype or torch.bfloat16
        return config

    def backbone(self) -> PreTrainedConfig:
        """The configuration of the layers: a multimodal model's language model, any other's own. Errors as `config`.

        Where layers have different numbers of experts it says so (`uneven.py`), also if config.json does not.
        """
        config = backbone_of(self.config())
        if has_family(config):
            declare(config, self.path, GateRows(self._keys, config, self._shapes))
        return config

    @cached_property
    def _keys(self) -> tuple[str, ...]:
        """The stored keys; none of a folder without weights, which says so when they are wanted, and none where all of a hub model's
        weights would be fetched for them.
        """
        try:
            if self.revision is not None:
                self.file(_INDEX)
            return tuple(self.weight_map)
        except ModelError:
            return ()

    def _shapes(self, keys: Sequence[str], download: bool) -> dict[str, tuple[int, ...]] | None:
        """The stored shapes of some tensors; None where a hub model's files would be fetched for them and may not be."""
        if self.revision is not None and not download:
            return None
        held = {name: _held(self.file(name)) for name in {self.weight_map[key] for key in keys}}
        return {key: held[self.weight_map[key]][key][0] for key in keys}

    @cached_property
    def scheme(self) -> Scheme | None:
        """How its tensors are quantized; None for a plain model. Raises ModelError for a quantization that is not read."""
        return scheme_of(_values(self.folder / "config.json"), self.path)

    @cached_property
    def tensors(self) -> dict[str, tuple[str, ...]]:
        """The model's own tensors by key, each with the stored ones that make it. Raises ModelError as `weight_map`."""
        if self.scheme is None:
            return {key: (key,) for key in self.weight_map}
        return self.scheme.tensors(self.weight_map)

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Which safetensors file holds each tensor. Raises ModelError when there is none, or it is damaged."""
        try:
            index = self.file(_INDEX)
        except ModelError:
            return dict.fromkeys(_held(self._single_file()), _SINGLE)
        try:
            weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise ModelError(f"{index} is not a safetensors index: {error}") from error
        for name in weight_map.values():
            # A file of this folder and of no other place.
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelError(f"{index} names the file {name!r:.80}, which is no safetensors file beside it")
        return {str(key): name for key, name in weight_map.items()}

    def _single_file(self) -> Path:
        try:
            return self.file(_SINGLE)
        except ModelError as error:
            raise ModelError(
                f"{self.path} has neither {_SINGLE} nor {_INDEX}. Only safetensors checkpoints are read; "
                f"convert .bin weights first. ({error})"
            ) from error

    def lazy_tensors(self, keys: Iterable[str], dtype: torch.dtype = torch.float32) -> dict[str, Stored | Unpacked]:
        """Tensors of the model that are read when they are indexed, quantized ones then dequantized to `dtype`.

        Raises ModelError for a file that is damaged.
        """
        by_file: dict[str, list[str]] = {}
        for key in keys:
            for part in self.tensors[key]:
                by_file.setdefault(self.weight_map[part], []).append(part)
        stored: dict[str, LazyTensor] = {}
        for name, wanted in by_file.items():
            path = self.file(name)
            held = _held(path)
            missing = set(wanted) - held.keys()
            if missing:
                raise ModelError(f"{path} is damaged: it lacks {min(missing)}, which the index says it holds")
            stored.update({key: LazyTensor(path, key, *held[key]) for key in wanted})
        if self.scheme is None:
            return dict(stored)
        try:
            return {key: self.scheme.unpacked([stored[part] for part in self.tensors[key]], dtype) for key in keys}
        except ModelError as error:
            raise ModelError(f"{self.path}: {error}") from None


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file, read when it is indexed, through a mapping of its own.

    What safetensors returns lies in the mapped file. In one mapping for all of a file's tensors, the one that stays in use as it
    is would keep every page that was touched, beside the copies that were made of the others: twice the weights' memory.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    kind: str
    """How safetensors names its type: BF16, F8_E4M3."""

    def __getitem__(self, index: Any) -> Tensor:
        with safe_open(self.path, framework="pt", device="cpu") as handle:
            return handle.get_slice(self.key)[index]


def open_snapshot(path: str, revision: str | None = None) -> Snapshot:
    """Find a model by local folder, or by hub id at a revision (branch, tag or commit). Raises ModelError."""
    folder = local_place(path)
    if folder.is_dir():
        refuse_special_files(folder, ModelError)
        if not (folder / "config.json").is_file():
            raise ModelError(f"{path} is not a model folder: it has no config.json")
        return Snapshot(path, folder.absolute(), None)
    if folder.is_absolute() or path.startswith((".", "~")) or is_object(folder):
        raise ModelError(f"the model folder {path} does not exist")
    config = _download(path, "config.json", revision)
    return Snapshot(path, config.parent, config.parent.name)


def _download(repo: str, name: str, revision: str | None) -> Path:
    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    # Everything that the hub client raises for a missing, gated, unreachable or misspelt repository.
    except (OSError, EntryNotFoundError, HFValidationError, ValueError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"cannot get {name} of {repo!r} at revision {revision or 'main'}: {first_line} (Is the name right, is the "
            "network up, and for a gated model, is HF_TOKEN set?)"
        ) from error


def _held(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """The shape and type of every tensor of a file, from its header."""
    try:
        with safe_open(path, framework="pt") as handle:
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 - not a dict
            return {key: (tuple(found.get_shape()), found.get_dtype()) for key, found in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or not a safetensors file: {error}") from error


def _values(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} is not the configuration of a model")
    return values


def _check_sizes(path: Path) -> None:
    """Refuse a configuration whose layers or experts no model has: building it would not end. Raises ModelError."""
    for name, value in _values(path).items():
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _MOST.get(name, _LARGEST):
            raise ModelError(f"{path}: {name} is {value:.3g}, which no model has")


def _model_type(folder: Path) -> str | None:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return str(found) if found else None
