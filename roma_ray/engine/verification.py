"""Comparing a sample of the activation cache with a forward pass of the model itself, before it is trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from roma_ray.engine.cache import ActivationCache
from roma_ray.engine.forward import lay_out
from roma_ray.engine.model_spec import ModelSpec
from roma_ray.engine.question_table import read_some_prompts
from roma_ray.engine.streaming import plan_chain
from roma_ray.errors import CacheError
from roma_ray.moe.passes import run_packed
from roma_ray.store.artifacts import MANIFEST, file_digest, write_text
from roma_ray.store.files import exists, read_text

_QUESTIONS = 3
_MEMORY_GB = 2.0
# Median over tokens of the relative difference: rounding stays far below, another model or other tokens are far above.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}


def verify_sample(model: ModelSpec, extraction: str | Path, questions: str | Path, cut: int) -> None:
    """Recompute some questions' states at `cut`, layers streamed, and compare. Once an extraction and cut.

    Raises CacheError when the cache is not this model's.
    """
    folder = Path(extraction)
    mark, now = folder / f".verified-{cut}", file_digest(folder / MANIFEST)
    if exists(mark) and read_text(mark) == now:
        return
    cache = ActivationCache(folder, cut)
    usable = np.flatnonzero(cache.offset >= 0).tolist()
    rows = sorted({usable[int(n)] for n in np.linspace(0, len(usable) - 1, _QUESTIONS)})
    layout = lay_out(read_some_prompts(questions, rows), prefix=cache.prefix)
    states: torch.Tensor | None = None
    with torch.no_grad():
        for start, stop in plan_chain(model, _MEMORY_GB, least=True):
            if start > cut:
                break
            part = model.load(start, min(stop, cut + 1), with_lm_head=False)
            last = part.stop == cut + 1
            out = run_packed(
                part, layout.packing, states, after_attention=[cut] if last else [], keep=[] if last else None
            )
            states = out.after_attention[cut] if last else out.states
    assert states is not None
    cached = cache.packed(rows, layout)
    own, kept = states.float().cpu(), cached.float()
    differences = (own - kept).norm(dim=-1) / own.norm(dim=-1).clamp_min(1e-30)
    worst = float(differences.median())
    if not worst <= max(_TOLERANCE[states.dtype], _TOLERANCE[cached.dtype]):
        raise CacheError(
            f"the activations in {folder} are not those of {model.path} at layer {cut}: a sample of {len(rows)} questions "
            f"differs by {worst:.1%}. Remove the folder and run again to rebuild it."
        )
    write_text(mark, now)
