"""Checkpoints quantized by literal loops in the published layouts, and what their numbers mean, by the same loops backwards."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def fp8(block: tuple[int, int]) -> dict[str, object]:
    """The quantization_config of DeepSeek-V3 and Qwen3-FP8."""
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(block)}


def four_bits(value: float) -> int:
    nearest = min(range(8), key=lambda code: abs(FP4[code] - abs(value)))
    return nearest + 8 * (value < 0)


def pack_matrix(matrix_RC: Tensor) -> tuple[list, list]:
    """Bytes [R, G, 16] and exponents [R, G] of one matrix: neighbors of a row share a byte, the first in its low half."""
    blocks, scales = [], []
    for row in matrix_RC.tolist():
        groups = [row[start : start + 32] for start in range(0, len(row), 32)]
        exponents = [math.ceil(math.log2(max(abs(v) for v in group) / 6)) + 127 for group in groups]
        codes = [[four_bits(v / 2.0 ** (e - 127)) for v in group] for group, e in zip(groups, exponents, strict=True)]
        blocks.append([[code[n] | code[n + 1] << 4 for n in range(0, 32, 2)] for code in codes])
        scales.append(exponents)
    return blocks, scales


def by_hand_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """[E, C, R] in fp64, a number at a time."""
    experts = []
    for expert_blocks, expert_scales in zip(blocks.tolist(), scales.tolist(), strict=True):
        rows = []
        for groups, exponents in zip(expert_blocks, expert_scales, strict=True):
            row = []
            for group, exponent in zip(groups, exponents, strict=True):
                for byte in group:
                    for code in (byte % 16, byte // 16):
                        row.append(math.ldexp(math.copysign(FP4[code % 8], -1 if code >= 8 else 1), exponent - 127))
            rows.append(row)
        experts.append([[row[c] for row in rows] for c in range(len(rows[0]))])
    return torch.tensor(experts, dtype=torch.float64)


def quantize_mxfp4(folder: str | Path) -> dict[str, Tensor]:
    """Quantize a gpt-oss checkpoint's experts in place; returns every tensor as the model has it then, experts in fp64."""
    path = Path(folder) / "model.safetensors"
    stored, plain = {}, {}
    for key, tensor in load_file(path).items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[key] = plain[key] = tensor.contiguous()
            continue
        packed = [pack_matrix(expert.T) for expert in tensor.float()]
        blocks, scales = (torch.tensor([part[n] for part in packed], dtype=torch.uint8) for n in (0, 1))
        stored |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        plain[key] = by_hand_mxfp4(blocks, scales)
    save_file(stored, path, metadata={"format": "pt"})
    state(folder, MXFP4)
    return plain


def quantize_fp8(
    folder: str | Path, block: tuple[int, int], scale_dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Quantize a checkpoint's projections in place; returns every tensor as the model has it then, those in fp32."""
    path = Path(folder) / "model.safetensors"
    stored, plain = {}, {}
    for key, tensor in load_file(path).items():
        stored[key] = plain[key] = tensor
        if not key.endswith("_proj.weight") and "kv_a_proj_with_mqa" not in key:
            continue
        rows, columns = tensor.shape
        numbers = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]), dtype=scale_dtype)
        meant = torch.empty(rows, columns)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                place = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
                part = tensor[place].float()
                scales[i, j] = part.abs().max() / 448
                numbers[place] = (part / scales[i, j].float()).to(torch.float8_e4m3fn)
                meant[place] = numbers[place].float() * scales[i, j].float()
        stored |= {key: numbers, f"{key}_scale_inv": scales}
        plain[key] = meant
    save_file(stored, path, metadata={"format": "pt"})
    state(folder, fp8(block))
    return plain


def state(folder: str | Path, quantization: object) -> None:
    """Say in a folder's config.json that it is quantized; no type is named, as in gpt-oss's."""
    file = Path(folder) / "config.json"
    values = json.loads(file.read_text())
    values.pop("dtype", None)
    file.write_text(json.dumps({**values, "quantization_config": quantization}))
