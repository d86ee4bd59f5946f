"""torch's FlashAttention for ragged batches, where the device, its torch and the call are served by it.

Shapes: N queries, T flat tokens, G sequences, H heads, C head width.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional


def serves(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> bool:
    """Whether it serves a call on [1, H, N, C] queries: half precision on a GPU, heads of one width for queries and values
    (DeepSeek's are not), and a small call of the kind has succeeded on this device."""
    width = query.shape[-1]
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if width != value.shape[-1] or width > 256 or width % 8:
        return False
    return succeeds(str(query.device), query.dtype, query.shape[1], key.shape[1], width, window is not None)


@cache
def succeeds(device: str, dtype: torch.dtype, heads: int, key_heads: int, width: int, windowed: bool) -> bool:
    """Try a call of this kind, forward and backward, once a process: the module came with torch 2.10, its scale, window and
    shared heads later, and a device may have no kernel for one of them (ROCm's)."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            query = torch.zeros(16, heads, width, device=device, dtype=dtype, requires_grad=True)
            key = torch.zeros(16, key_heads, width, device=device, dtype=dtype)
            ends = torch.tensor([0, 8, 16], device=device, dtype=torch.int32)
            out = _call(query, key, key, ends, 8, 4 if windowed else None, 1.0)
            torch.autograd.grad(out.float().sum(), query)
    except (ImportError, TypeError, RuntimeError, NotImplementedError):
        return False
    return True


def varlen(
    query_NHC: Tensor,
    key_NHC: Tensor,
    value_NHC: Tensor,
    counts_G: Tensor,
    longest: int,
    window: int | None,
    scale: float,
) -> Tensor:
    """Causal attention within consecutive sequences of these lengths, without any padding; returns [N, H, C]."""
    ends = functional.pad(counts_G.cumsum(0), (1, 0)).to(torch.int32)
    return _call(query_NHC.contiguous(), key_NHC, value_NHC, ends, longest, window, scale)


def _call(
    query_NHC: Tensor, key_NHC: Tensor, value_NHC: Tensor, ends: Tensor, longest: int, window: int | None, scale: float
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query_NHC,
        key_NHC,
        value_NHC,
        ends,
        ends,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query_NHC.shape[1] != key_NHC.shape[1],
    )
    assert isinstance(out, Tensor)
    return out
