"""Where the heavy stages run: in this process, or, with the runners of `cluster`, on a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from roma_ray.engine.heads import FRESH, Heads
from roma_ray.engine.work import Executor, serial
from roma_ray.store.artifacts import Stage

Trainer = Callable[[Any, Callable[[dict[str, Any]], None], Callable[[int, str], None]], None]
"""Runs a `TrainJob`'s workers somewhere, passing on each epoch's record and each step's progress (questions, a note)."""


def call_here(name: str, function: Callable[..., Any], *arguments: Any, progress: Any) -> Any:
    """Call a function in this process."""
    return function(*arguments, progress=progress)


def unheard(stage: Stage) -> None:
    """Tell nobody."""


def expect_nothing(stage: str) -> None:
    """Nothing is to be started beforehand."""


@dataclass(frozen=True)
class Runners:
    """Where the heavy stages run."""

    encode: Executor = serial
    """Of many questions: their prompts."""
    extract: Executor = serial
    chain: Executor | None = None
    """Extracts with a chain of slices (`extraction.chain`). None: in this process, where there is no chain."""
    embed: Executor = serial
    search: Executor = serial
    """Of neighbors in a large S."""
    finetune: Trainer | None = None
    """None: in this process."""
    call: Callable[..., Any] = call_here
    """Calls `function(*arguments, progress=...)`, known by a name, for work of one process: neighbors, repair."""
    evaluate: Executor | None = None
    """None: in this process, with a head from `heads`."""
    baselines: Executor = serial
    heads: Heads = FRESH
    """Where the stages of this process get their head from."""
    on_epoch: Callable[[Stage], None] = unheard
    """Hears of finetuning's epochs once their record is on disk."""

    expect: Callable[[str], None] = expect_nothing
    """Hears which stage's batches come first, while what they are made of is still being made."""

    @property
    def alone(self) -> Runners:
        """What a stage of one process is handed, there: nobody else."""
        return replace(LOCAL, heads=self.heads)


LOCAL = Runners()
