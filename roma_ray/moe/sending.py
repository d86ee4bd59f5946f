"""Sending small tables to a GPU without waiting for the work that is queued there."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device, in a type where one is given. From the host to a GPU by pinned memory: a plain copy would wait for
    all that the GPU still has to do, and leave it idle until the host has caught up."""
    held = pinned(tensor, device)
    waits_for_nothing = torch.device(device).type == "cuda" and held.device.type == "cpu"
    return held.to(device, non_blocking=waits_for_nothing).to(dtype or tensor.dtype)


def pinned(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor that is to go to a GPU, in memory from which the copy waits for nothing; any other as it is."""
    target = torch.device(device)
    if target.type != "cuda" or tensor.device.type != "cpu" or tensor.is_pinned():
        return tensor
    # Without it a thread other than the main one would open the first GPU, whichever this process works on.
    with torch.cuda.device(target):
        return tensor.pin_memory()
