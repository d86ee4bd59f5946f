"""A model as every worker loads it: where it is, its numeric settings, which layers of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roma_ray.moe.slices import Slice


@dataclass(frozen=True)
class ModelSpec:
    """Everything a worker needs to load a slice of the model; small and picklable."""

    path: str
    revision: str | None
    dtype: str
    experts_backend: str
    attention: str
    device: str
    threads: int
    checks: str = ""
    """Folder of the storage where this model's self-checks lie; nothing is checked on load without one."""

    def first_moe_layer(self) -> int:
        """Whole-model index of the first layer with a router. Raises ModelError."""
        return int(model_facts_of(self.path, self.revision)["moe_layers"][0])

    def weight_bytes(self) -> int:
        """What the weights take in memory, from the configuration alone. Raises ModelError."""
        import torch

        from roma_ray.moe.whole import model_sizes

        sizes = model_sizes(self.path, revision=self.revision)
        return (sum(sizes.layers) + sizes.embedding + sizes.head) * int(getattr(torch, self.dtype).itemsize)

    def storage_note(self) -> str | None:
        """What is to be known of the memory of a model that is stored quantized; None for a plain one. Raises ModelError."""
        from roma_ray.moe.snapshot import open_snapshot

        scheme = open_snapshot(self.path, self.revision).scheme
        if scheme is None:
            return None
        size = f"{self.weight_bytes() / 1e9:.1f} GB of weights in {self.dtype}"
        return f"{self.path} is stored in {scheme.name} and dequantized as it is loaded: {size}"

    def numeric_identity(self) -> dict[str, Any]:
        """The settings, beside the weights, that decide the bits of a forward pass, for fingerprints."""
        identity: dict[str, Any] = {
            "dtype": self.dtype,
            "experts_backend": self.experts_backend,
            "attention": self.attention,
            "device": self.device,
        }
        return {**identity, "threads": self.threads} if self.device == "cpu" else identity

    def load(self, start: int, stop: int | None, *, with_lm_head: bool) -> Slice:
        """Layers [start, stop) on this process's device, evaluation mode, frozen; loaded, or held since an earlier work. Raises
        ModelError.
        """
        from roma_ray.engine.held_slices import holding

        if (held := holding()) is not None:
            key = (self, start, stop, with_lm_head)
            return held.take(key, lambda: self._load(start, stop, with_lm_head=with_lm_head))
        return self._load(start, stop, with_lm_head=with_lm_head)

    def _load(self, start: int, stop: int | None, *, with_lm_head: bool) -> Slice:
        import torch
        from transformers.utils import logging

        from roma_ray.moe.slices import load_slice

        logging.disable_progress_bar()
        set_threads(self.threads)
        # Whatever mode the caller is in: the self-check differentiates.
        with torch.inference_mode(False), torch.enable_grad():
            part = load_slice(
                self.path,
                start=start,
                stop=stop,
                dtype=getattr(torch, self.dtype),
                device=self.device,
                revision=self.revision,
                experts_backend=self.experts_backend,
                attention=self.attention,
                with_lm_head=with_lm_head,
            )
            if self.checks:
                from roma_ray.engine.kept_selfchecks import ensure_checked

                ensure_checked(part, self.checks)
        return part


def set_threads(threads: int) -> None:
    """Give this process the configured number of CPU threads: sums depend on it in their last bits."""
    import torch

    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


@lru_cache(maxsize=8)
def model_facts_of(path: str, revision: str | None) -> dict[str, Any]:
    """Layers, their width and which have routers, of a model's configuration. Raises ModelError."""
    from roma_ray.moe.slices import model_facts

    return model_facts(path, revision=revision)
