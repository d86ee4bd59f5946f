"""What a method's answers cost: floating-point operations and time a question, the trunk included."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from roma_ray.baselines.bench import Bench, QuestionCost
from roma_ray.engine.forward import lay_out
from roma_ray.moe.passes import run_packed

SAMPLE = 32
"""Questions whose operations are counted."""


def _grouped(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    """Operations of a matrix product whose rows are shared out among experts: each row meets one expert's matrix."""
    groups = left[0] if len(left) == len(right) == 3 else 1
    return 2 * groups * left[-2] * left[-1] * right[-1]


# torch counts no grouped products by itself: without these a GPU's experts would cost nothing.
_GROUPED: dict[Any, Any] = {torch.ops.aten._grouped_mm: _grouped}


def counted(rows: Sequence[int], answer: Callable[[Sequence[int]], object]) -> float:
    """Floating-point operations a question of `answer` over a sample of rows, as torch counts matrix products."""
    sample = list(rows)[:SAMPLE]
    with FlopCounterMode(display=False, custom_mapping=_GROUPED) as counter:
        answer(sample)
    return counter.get_total_flops() / len(sample)


def trunk_cost(bench: Bench, rows: Sequence[int]) -> QuestionCost:
    """What lies below the tuned experts costs a question: paid by every method that starts from cached activations."""
    cut = bench.setup.cut
    sample = list(rows)[:SAMPLE]
    trunk = bench.setup.model.load(0, cut + 1, with_lm_head=False)
    layout = lay_out([bench.data.prompts[row] for row in sample], prefix=bench.data.states.prefix)

    def run(_rows: Sequence[int] = ()) -> None:
        with torch.inference_mode():
            run_packed(trunk, layout.packing, after_attention=[cut], keep=[])

    flops = counted(sample, run)
    run()
    started = time.monotonic()
    run()
    return QuestionCost(flops, (time.monotonic() - started) / len(sample))
