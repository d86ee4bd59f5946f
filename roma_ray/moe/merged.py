"""A whole model with tuned routers, for transformers, vLLM and lm-eval: the base checkpoint copied, the gates replaced.

The base's safetensors files are copied byte by byte with only the gate tensors exchanged, so the peak of memory is one
tensor's, however large the model, and every other weight is the base's to the bit, under the base's own keys.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from roma_ray.errors import CheckpointError, ModelError
from roma_ray.moe.adapters import RouterCheckpoint, check_finite, type_name, write_manifest
from roma_ray.moe.folders import whole_folder
from roma_ray.moe.snapshot import Snapshot, open_snapshot
from roma_ray.moe.whole import check_weights, checkpoint_keys

_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_BLOCK = 1 << 22
_CODE = re.compile(r"[A-Za-z_]\w*\.py")
_IMPORTED = re.compile(r"^\s*from\s+\.(\w+)\s+import\b", re.MULTILINE)
_COMPANIONS = (
    *("generation_config.json", "chat_template.jinja", "chat_template.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
)


def save_merged(checkpoint: RouterCheckpoint, folder: str | Path) -> str:
    """Write the base model with the checkpoint's gates as a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Its config.json names the type of the checkpoint (`dtype`), so that loading it without a word gives the tuned logits bit for
    bit; returns the type that the base's names. Tensors keep the types that they are stored in, and a gate takes the wider of
    its own and the base file's. Raises CheckpointError, ModelError, StorageError.
    """
    snapshot = open_snapshot(checkpoint.base_model, checkpoint.revision)
    model_type = snapshot.config().model_type
    if model_type != checkpoint.model_type:
        raise CheckpointError(
            f"these routers are of a {checkpoint.model_type} model, but {snapshot.path} is a {model_type} one"
        )
    check_finite(checkpoint.tensors)
    check_weights(snapshot)
    keys = checkpoint_keys(snapshot, list(checkpoint.tensors))
    replaced = {keys[name]: tensor for name, tensor in checkpoint.tensors.items()}
    with whole_folder(Path(folder)) as aside:
        total = 0
        for name in sorted(set(snapshot.weight_map.values())):
            part = {key: tensor for key, tensor in replaced.items() if snapshot.weight_map[key] == name}
            total += _copy_weights(snapshot.file(name), aside / name, part)
        _copy_companions(snapshot, aside, total)
        code = _copy_code(snapshot, aside)
        _write_config(snapshot, aside, checkpoint.dtype, code)
        write_manifest(aside, checkpoint, kind="merged")
    return type_name(snapshot.backbone().dtype or torch.float32)


def _copy_weights(source: Path, target: Path, replaced: Mapping[str, Tensor]) -> int:
    """Copy a safetensors file with some tensors exchanged; return the bytes of its tensors. Raises ModelError, CheckpointError."""
    with open(source, "rb") as old, open(target, "wb") as new:
        header, start = _header(old, source)
        metadata = header.pop("__metadata__", {"format": "pt"})
        order = sorted(header, key=lambda key: header[key]["data_offsets"][0])
        values = {key: _widened(key, tensor, header[key]) for key, tensor in replaced.items()}
        fresh: dict[str, Any] = {"__metadata__": metadata}
        offset = 0
        for key in order:
            begin, end = header[key]["data_offsets"]
            size = values[key].nbytes if key in values else end - begin
            kind = _NAMES[values[key].dtype] if key in values else header[key]["dtype"]
            fresh[key] = {"dtype": kind, "shape": header[key]["shape"], "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(fresh, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        new.write(struct.pack("<Q", len(text)) + text)
        for key in order:
            if key in values:
                new.write(values[key].view(torch.uint8).numpy().tobytes())
            else:
                begin, end = header[key]["data_offsets"]
                _copy_bytes(old, new, start + begin, end - begin, source)
    return offset


def _header(stream: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    try:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        return json.loads(stream.read(length)), 8 + length
    except (struct.error, ValueError) as error:
        raise ModelError(f"{path} is damaged or not a safetensors file: {error}") from error


def _widened(key: str, tensor: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """The tensor in the wider of its own and the file's type, flat: neither rounding the gate nor narrowing the file."""
    if list(tensor.shape) != list(entry["shape"]):
        raise CheckpointError(f"{key} has shape {tuple(tensor.shape)}, but the base model's is {tuple(entry['shape'])}")
    if entry["dtype"] not in _TYPES:
        raise CheckpointError(
            f"{key} is stored as {entry['dtype']} in the base model, so a tuned gate cannot replace it"
        )
    return tensor.detach().cpu().to(torch.promote_types(tensor.dtype, _TYPES[entry["dtype"]])).contiguous().reshape(-1)


def _copy_bytes(old: BinaryIO, new: BinaryIO, begin: int, size: int, path: Path) -> None:
    old.seek(begin)
    while size:
        block = old.read(min(_BLOCK, size))
        if not block:
            raise ModelError(f"{path} is truncated")
        new.write(block)
        size -= len(block)


def _write_config(snapshot: Snapshot, folder: Path, dtype: str, code: set[str]) -> None:
    """The base's configuration with the type in which the figures were made: transformers loads a model in what it names.

    Classes of remote code stay named where that code was copied along.
    """
    config = json.loads(snapshot.file("config.json").read_text(encoding="utf-8"))
    # The second is the name that older versions and other tools know.
    config |= {"dtype": dtype, **({"torch_dtype": dtype} if "torch_dtype" in config else {})}
    named = _code_of(config)
    if named:
        config["auto_map"] = {name: target for name, target in config["auto_map"].items() if named[name] <= code}
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _code_of(config: Mapping[str, Any]) -> dict[str, set[str]]:
    """The files beside a config.json that each entry of its `auto_map` names; those of another repository are not its own."""
    entries = config.get("auto_map")
    found: dict[str, set[str]] = {}
    for name, target in entries.items() if isinstance(entries, dict) else ():
        parts = target if isinstance(target, list) else [target]
        modules = [part.rpartition(".")[0] for part in parts if isinstance(part, str) and "--" not in part]
        found[str(name)] = {f"{module}.py" for module in modules}
    return found


def _copy_code(snapshot: Snapshot, folder: Path) -> set[str]:
    """Copy the published remote code that config.json and the tokenizer's name, and what it imports beside it; never run here."""
    waiting: set[str] = set()
    for name in ("config.json", "tokenizer_config.json"):
        try:
            stated = json.loads(snapshot.file(name).read_text(encoding="utf-8"))
        except (ModelError, ValueError):
            continue
        waiting |= set().union(*_code_of(stated).values())
    copied: set[str] = set()
    while waiting:
        name = waiting.pop()
        # A file of this folder and of no other place.
        if not _CODE.fullmatch(name):
            continue
        try:
            source = snapshot.file(name)
        except ModelError:
            continue
        shutil.copyfile(source, folder / name)
        copied.add(name)
        text = source.read_text(encoding="utf-8", errors="replace")
        waiting |= {f"{module}.py" for module in _IMPORTED.findall(text)} - copied
    return copied


def _copy_companions(snapshot: Snapshot, folder: Path, total: int) -> None:
    """Index and tokenizer files; a model without some of them is no error."""
    index = "model.safetensors.index.json"
    if len(set(snapshot.weight_map.values())) > 1 or "model.safetensors" not in snapshot.weight_map.values():
        content = {"metadata": {"total_size": total}, "weight_map": snapshot.weight_map}
        (folder / index).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in _COMPANIONS:
        try:
            found = snapshot.file(name)
        except ModelError:
            continue
        shutil.copyfile(found, folder / name)
