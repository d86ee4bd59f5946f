"""Where the heavy stages run: in this process, or, with the runners of `stages`, on a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from roma_ray.engine.finetuning import Trainer, train_here
from roma_ray.engine.work import Executor, serial


def call_here(stage: Callable[..., Any], *arguments: Any, progress: Any) -> Any:
    """Call a stage's function in this process."""
    return stage(*arguments, progress=progress)


@dataclass(frozen=True)
class Runners:
    """Where the heavy stages run."""

    extract: Executor = serial
    embed: Executor = serial
    finetune: Trainer = train_here
    call: Callable[..., Any] = call_here
    """Calls `stage(*arguments, progress=...)` for the stages of one process: neighbors, evaluate."""
    baselines: Executor = serial


LOCAL = Runners()
