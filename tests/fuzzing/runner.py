"""Running a reader on many damaged inputs: what counts as a failure, and how one is kept."""

from __future__ import annotations

import pickle
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from roma_ray.errors import RomaError

# Seconds that any one input may take: readers of kilobytes need milliseconds.
PATIENCE = 20
_MEMORY = 4 << 30
LAST = "last-input.pickle"


@dataclass(frozen=True)
class Target:
    """A reader under test."""

    name: str
    open: Callable[[Path], tuple[st.SearchStrategy[Any], Callable[[Any], None]]]
    """Given an empty folder, the strategy of its inputs and the function that reads one.

    The function returns when the input was accepted and is what it must be, raises RomaError when it was refused, and
    anything else (AssertionError for a silent acceptance) when the reader is at fault.
    """
    share: int = 10
    """Its part of all inputs, relative to the others'."""


class Hang(Exception):
    """A reader did not come back."""


class SilentRefusal(Exception):
    """A refusal that gives no reason."""


@dataclass
class Count:
    """How many inputs a reader took and how many it refused."""

    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0

    @property
    def total(self) -> int:
        return self.accepted + self.refused


def fuzz(target: Target, inputs: int, start: int, folder: Path) -> Count:
    """Read `inputs` damaged inputs; the last one is kept in the folder. Raises what the reader should not have raised."""
    count = Count()
    strategy, read = target.open(folder)
    last = folder / LAST

    @seed(start)
    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        derandomize=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(value: Any) -> None:
        last.write_bytes(pickle.dumps(value))
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        try:
            read(value)
            count.accepted += 1
        except RomaError as error:
            if not str(error).strip():
                raise SilentRefusal(type(error).__name__) from error
            count.refused += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            count.slowest = max(count.slowest, time.monotonic() - began)

    before = signal.signal(signal.SIGALRM, _hang)
    try:
        one()
    finally:
        signal.signal(signal.SIGALRM, before)
    return count


def limit_memory() -> None:
    """From here on this process may take so much memory more, and no file may make a reader ask for all of it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _hang(signum: int, frame: Any) -> None:
    raise Hang(f"no answer within {PATIENCE} s")
