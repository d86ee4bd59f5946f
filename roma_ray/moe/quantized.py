"""Checkpoints that are published quantized: which are read, and their tensors dequantized one at a time as they are loaded.

MXFP4 (gpt-oss): numbers of 4 bits, two a byte, 32 of a row under one power of two. FP8 (DeepSeek-V3, Qwen3-FP8): e4m3 numbers
under one scale a block. Nothing is multiplied in a narrower type than fp32; MXFP4 is exact in bfloat16, FP8 is rounded once.

Shapes: E experts, R rows, C columns, G groups of N = 32 numbers in B = 16 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from roma_ray.errors import ModelError

# By the 4 bits: sign, two of exponent, one of mantissa.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_GROUP = 32
_EXPONENT_BIAS = 127
_SCALES = {"F32", "BF16", "F16", "F8_E8M0"}
_PLAIN = {"F32", "BF16", "F16", "F64"}

_STREAMED = "extraction.memory_gb streams one that does not fit into memory"
_ORIGINAL = f"use the bfloat16 model that it was made from, which its card names; {_STREAMED}"
_INSTEAD = {
    "awq": ("AWQ", _ORIGINAL),
    "gptq": ("GPTQ", _ORIGINAL),
    "bitsandbytes": (
        "bitsandbytes",
        f"it is packed from a bfloat16 model while that is loaded: use that model; {_STREAMED}",
    ),
    "compressed-tensors": (
        "compressed-tensors",
        f"use the publisher's bfloat16 or block-wise FP8 version (quant_method fp8 in its config.json); {_STREAMED}",
    ),
}


class Stored(Protocol):
    """A tensor of a file, read when it is indexed."""

    @property
    def key(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def kind(self) -> str: ...
    def __getitem__(self, index: Any) -> Tensor: ...


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint's tensors are quantized."""

    name: str
    """Shown: MXFP4 or FP8."""
    block: tuple[int, int]
    """Rows and columns under one scale."""

    def tensors(self, keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The model's own tensors, each with the stored ones that make it: itself, or its numbers and their scales."""
        stored = list(keys)
        known = set(stored)
        found: dict[str, tuple[str, ...]] = {}
        for key in stored:
            if self.name == "MXFP4":
                plain, scales = key.removesuffix("_blocks"), f"{key.removesuffix('_blocks')}_scales"
                of_other = key.endswith("_scales") and f"{key.removesuffix('_scales')}_blocks" in known
            else:
                plain, scales = key, f"{key}_scale_inv"
                of_other = key.removesuffix("_scale_inv") != key and key.removesuffix("_scale_inv") in known
            if not of_other:
                found[plain if scales in known else key] = (key, scales) if scales in known else (key,)
        return found

    def unpacked(self, parts: Sequence[Stored], dtype: torch.dtype) -> Stored | Unpacked:
        """One tensor of the model from what is stored of it. Raises ModelError for parts that do not go together."""
        numbers = parts[0]
        if len(parts) == 1:
            if numbers.kind not in _PLAIN:
                raise ModelError(
                    f"{numbers.key} is stored as {numbers.kind} without scales that {self.name} has for it"
                )
            return numbers
        scales, shape, wanted = parts[1], numbers.shape, numbers.shape[:-1]
        if self.name == "MXFP4":
            kinds = ("U8", {"U8"})
            sound = len(shape) == 4 and shape[-1] * 2 == _GROUP
            shape = (*shape[:1], math.prod(shape[2:]) * 2, *shape[1:2])
        else:
            kinds = ("F8_E4M3", _SCALES)
            sound = len(shape) in (2, 3)
            wanted = (*shape[:-2], *(-(-size // step) for size, step in zip(shape[-2:], self.block, strict=False)))
        if not sound or numbers.kind != kinds[0] or scales.kind not in kinds[1] or scales.shape != wanted:
            raise ModelError(
                f"{numbers.key} ({numbers.kind} {numbers.shape}) and its scales ({scales.kind} {scales.shape}) are not those of "
                f"{self.name} in blocks of {self.block[0]} x {self.block[1]}"
            )
        return Unpacked(self, numbers, scales, shape, dtype)


@dataclass(frozen=True)
class Unpacked:
    """A quantized tensor as the model has it, dequantized when it is indexed, an expert or a matrix at a time."""

    scheme: Scheme
    numbers: Stored
    scales: Stored
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, index: Any) -> Tensor:
        if len(self.shape) == 2:
            return self._matrix(...)[index]
        whole = torch.empty(self.shape, dtype=self.dtype)
        for expert in range(self.shape[0]):
            whole[expert] = self._matrix(expert)
        return whole[index]

    def _matrix(self, place: Any) -> Tensor:
        numbers, scales = self.numbers[place], self.scales[place]
        if self.scheme.name == "MXFP4":
            return unpack_mxfp4(numbers, scales, self.dtype)
        return unpack_fp8(numbers, scales, self.scheme.block, self.dtype)


def unpack_mxfp4(blocks_RGB: Tensor, scales_RG: Tensor, dtype: torch.dtype) -> Tensor:
    """One expert's matrix from its bytes (the low half first) and exponents, uint8, as the model has it: [C, R], C = 32 G."""
    pairs = torch.tensor([[_FP4[byte & 15], _FP4[byte >> 4]] for byte in range(256)])
    numbers_RGN = pairs[blocks_RGB.long()].flatten(-2)
    return torch.ldexp(numbers_RGN, scales_RG.int()[..., None] - _EXPONENT_BIAS).to(dtype).flatten(-2).T


def unpack_fp8(numbers_RC: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A matrix from e4m3 numbers and one scale a block; the last blocks of rows and of columns may be cut short."""
    rows, columns = numbers_RC.shape
    matrix = torch.empty(rows, columns, dtype=dtype)
    for band, start in enumerate(range(0, rows, block[0])):
        scale_C = scales[band].float().repeat_interleave(block[1])[:columns]
        matrix[start : start + block[0]] = numbers_RC[start : start + block[0]].float() * scale_C
    return matrix


def scheme_of(values: Mapping[str, Any], where: str) -> Scheme | None:
    """What a config.json says of quantization; None for a plain model. Raises ModelError for what is not read here."""
    text = values.get("text_config")
    places = [values, text] if isinstance(text, dict) else [values]
    names = ("quantization_config", "compression_config")
    stated = next((place[name] for place in places for name in names if place.get(name) is not None), None)
    if stated is None:
        return None
    if not isinstance(stated, dict):
        stated = {"quant_method": stated}
    packed = stated.get("load_in_4bit") or stated.get("load_in_8bit")
    method = str(stated.get("quant_method") or ("bitsandbytes" if packed else "unnamed")).lower()
    model_type = str(values.get("model_type"))
    if method == "mxfp4" and model_type == "gpt_oss":
        return Scheme("MXFP4", (1, _GROUP))
    block = stated.get("weight_block_size")
    dynamic = stated.get("activation_scheme", "dynamic") == "dynamic"
    if (
        method == "fp8"
        and dynamic
        and isinstance(block, list)
        and [type(n) for n in block] == [int, int]
        and min(block) > 0
    ):
        return Scheme("FP8", (block[0], block[1]))
    if method == "mxfp4":
        name, instead = "MXFP4 of another layout than gpt-oss's", _ORIGINAL
    elif method == "fp8":
        name, instead = "FP8 that is not block-wise (weight_block_size) with dynamic activations", _ORIGINAL
    else:
        name, instead = _INSTEAD.get(method, (repr(method)[:60], _ORIGINAL))
    raise ModelError(
        f"{where} is a quantized checkpoint in {name}, which is not read here: {instead}. Read are gpt-oss's MXFP4 and block-wise "
        "FP8 (DeepSeek-V3, Qwen3-FP8), dequantized as they are loaded."
    )
