"""How the training workers of one machine find one another: by a file, for that needs no open port.

torch's own store listens on every network address, whichever it is given, and takes anybody's word.
"""

from __future__ import annotations

import datetime
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray.train.backend import Backend
from ray.train.torch import TorchConfig


@dataclass
class OneMachine(TorchConfig):
    """A process group (gloo, NCCL or RCCL) whose workers share this machine's temporary folder."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _ByFile


class _ByFile(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: OneMachine) -> None:
        """Bring the workers together; called again, with a fresh file, after a death."""
        kind = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo"
        self.file = Path(tempfile.gettempdir()) / f"roma-ray-{uuid.uuid4().hex}"
        size, seconds = len(worker_group), backend_config.timeout_s
        joining = [
            worker_group.execute_single_async(rank, _join, kind, rank, size, str(self.file), seconds)
            for rank in range(size)
        ]
        ray.get(joining)

    def on_shutdown(self, worker_group: Any, backend_config: OneMachine) -> None:
        """The workers end."""
        self.file.unlink(missing_ok=True)


def _join(kind: str, rank: int, size: int, file: str, seconds: int) -> None:
    timeout = datetime.timedelta(seconds=seconds)
    dist.init_process_group(kind, init_method=f"file://{file}", rank=rank, world_size=size, timeout=timeout)
