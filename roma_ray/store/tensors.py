"""Tensors of the storage: one safetensors file each, put whole, read whole or mapped."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from roma_ray.store.files import local, write_atomically

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

DAMAGED = (OSError, SafetensorError)
"""What reading a missing or damaged file raises; the caller knows the remedy."""


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Put tensors on the CPU as one file. Raises StorageError."""
    from safetensors.torch import save_file

    write_atomically(path, lambda aside: save_file(dict(tensors), aside, metadata=dict(metadata) if metadata else None))


def write_matrix(path: str | Path, name: str, shape: tuple[int, int], parts: Iterable[np.ndarray]) -> None:
    """Put one fp32 tensor on the CPU as a file, from parts of its rows in their order: the bytes that `write_tensors` puts.

    Raises StorageError.
    """
    size = 4 * shape[0] * shape[1]
    header = json.dumps(
        {name: {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}}, separators=(",", ":")
    )
    padded = header.encode() + b" " * (-len(header.encode()) % 8)

    def write(aside: Path) -> None:
        with open(aside, "wb") as stream:
            stream.write(struct.pack("<Q", len(padded)) + padded)
            for part in parts:
                stream.write(part.astype("<f4", copy=False).tobytes())
            assert stream.tell() == 8 + len(padded) + size, "the parts are the whole"

    write_atomically(path, write)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, and its metadata. Raises one of DAMAGED."""
    with safe_open(local(path), framework="pt") as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}, handle.metadata() or {}  # noqa: SIM118 - not a dict


def read_metadata(path: str | Path) -> dict[str, str]:
    """A file's metadata alone. Raises one of DAMAGED."""
    with safe_open(local(path), framework="pt") as handle:
        return handle.metadata() or {}


def shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a file. Raises one of DAMAGED."""
    with safe_open(local(path), framework="pt") as handle:
        return {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118 - not a dict


def mapped(path: str | Path, name: str) -> Any:
    """One tensor of a file, memory-mapped: a slice of it is read when it is taken. Raises one of DAMAGED."""
    return safe_open(local(path), framework="pt").get_slice(name)


def check_extent(path: str | Path) -> dict[str, Any]:
    """A file's header, held against the file's size. Raises OSError, ValueError (no header), EOFError (truncated)."""
    file = local(path)
    total = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length < total else None
        if not isinstance(header, dict):
            raise EOFError("its header is longer than the file")
        end = max((fact["data_offsets"][1] for name, fact in header.items() if name != "__metadata__"), default=0)
    except (struct.error, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"it has no header ({error})") from None
    if total != 8 + length + end:
        raise EOFError(f"it has {total} bytes instead of {8 + length + end}")
    return header
