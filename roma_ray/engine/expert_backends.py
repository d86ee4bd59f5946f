"""Which experts implementation of transformers is the fastest on a GPU: measured once a model and storage, then kept.

The choice decides the last bits of a forward pass, so it is part of the fingerprints and must not change between runs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from roma_ray.engine.model_spec import ModelSpec
from roma_ray.engine.progress import Progress
from roma_ray.errors import ModelError
from roma_ray.moe.passes import experts_block
from roma_ray.store.artifacts import Store, fingerprint, write_json
from roma_ray.store.files import read_json

# Never batched_mm: it copies every token's expert weights, 20 to 100 times slower at some hundred tokens.
CANDIDATES = ("grouped_mm", "eager")
_TOKENS = 4096
_REPEATS = 5


def kept_backend(store: Store, identity: str, spec: ModelSpec, measure: Callable[[ModelSpec], dict[str, Any]]) -> str:
    """The backend that was measured for this model and type in this storage, measured now where none was."""
    path = backend_file(store, identity, spec.dtype)
    known = None
    with contextlib.suppress(OSError, ValueError):
        known = read_json(path)
    if not isinstance(known, dict) or known.get("backend") not in CANDIDATES:
        known = measure(spec)
        write_json(path, known)
    return str(known["backend"])


def backend_file(store: Store, identity: str, dtype: str) -> Path:
    """Where a model's measurement is kept."""
    return store.root / "backends" / f"{fingerprint({'model': identity, 'dtype': dtype})}.json"


@torch.inference_mode()
def measure_backends(spec: ModelSpec, progress: Progress | None = None) -> dict[str, Any]:
    """Time each candidate on this process's device: one layer's experts over 4,096 random tokens.

    Returns `backend` (the fastest), `milliseconds` by candidate (the best of 5) and the device's name. A candidate that the
    device has no kernel for is left out. Raises ModelError when none runs.
    """
    if progress is not None:
        progress.say("measuring which experts implementation is the fastest on this device")
    layer = spec.first_moe_layer()
    part = replace(spec, experts_backend="eager").load(layer, layer + 1, with_lm_head=False)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _TOKENS, part.model.config.hidden_size, generator=generator).to(part.device, part.dtype)
    block = experts_block(part, layer)
    found: dict[str, float] = {}
    for name in CANDIDATES:
        part.model.set_experts_implementation(name)
        try:
            found[name] = min(_milliseconds(block, hidden) for _ in range(_REPEATS))
        except (RuntimeError, NotImplementedError):
            continue
    if not found:
        raise ModelError("no experts implementation runs on this device; set model.experts_backend=eager")
    cuda = part.device.type == "cuda"
    return {
        "backend": min(found, key=lambda name: found[name]),
        "milliseconds": {name: round(value, 3) for name, value in found.items()},
        "device": torch.cuda.get_device_name(part.device) if cuda else "cpu",
        "torch": torch.__version__,
    }


def _milliseconds(block: torch.nn.Module, hidden: torch.Tensor) -> float:
    block(hidden)
    if hidden.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    block(hidden)
    if hidden.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)
