"""The workers of one finetuning run over torch.distributed, and how they stop together when one of them fails."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class PeerFailed(Exception):
    """Another worker failed; it tells why."""


class TorchWorld:
    """The workers of a process group (gloo on CPU, NCCL or RCCL on GPUs)."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device

    def gather(self, mine: list[Tensor], total: int) -> list[Tensor]:
        """All workers' micro-batch vectors in plan order; worker r holds numbers r, r + size, ... Raises PeerFailed.

        Vectors are 1-D fp32 and of one length. Nothing is added here: the caller adds all of them in plan order, so that the
        number of workers changes no bit.
        """
        assert len(mine) == len(range(self.rank, total, self.size))
        width = self.agree(width=len(mine[0]) if mine else 0)
        if self.size == 1:
            return mine
        # A worker may have fewer micro-batches than others, or none: all send stacks of one shape.
        stack_MW = torch.zeros(-(-total // self.size), width, device=self.device)
        for number, vector in enumerate(mine):
            stack_MW[number] = vector
        stacks = [torch.empty_like(stack_MW) for _ in range(self.size)]
        dist.all_gather(stacks, stack_MW)
        return [stacks[number % self.size][number // self.size] for number in range(total)]

    def agree(self, *, width: int = 0) -> int:
        """Wait for all workers; the largest `width`. Raises PeerFailed when one of them has failed."""
        widths = self._flags(width)
        if min(widths) < 0:
            raise PeerFailed
        return max(widths)

    def fail(self) -> None:
        """Tell the others, at whatever point they wait next, that this worker stops."""
        self._flags(-1)

    def _flags(self, mine: int) -> list[int]:
        flag = torch.tensor([mine], device=self.device)
        flags = [torch.empty_like(flag) for _ in range(self.size)]
        dist.all_gather(flags, flag)
        return [int(f) for f in flags]

    def collect(self, value: Any) -> list[Any]:
        """Every worker's value (plain data), by rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """The first worker's value (plain data)."""
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]
