"""What a run tells while it works. Quiet lines here; the command line brings a live view with the same three calls."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from roma_ray.text import clean


class Meter(Protocol):
    """Counts one stage's units."""

    def advance(self, amount: float, note: str = "") -> None:
        """`amount` more units are done; `note` is a short live figure such as the loss."""


class Progress(Protocol):
    """Receives what a run tells."""

    def say(self, text: str) -> None:
        """A line that stays."""

    def meter(self, name: str, total: float, unit: str, done: float = 0) -> AbstractContextManager[Meter]:
        """A context manager around `total` units of work, `done` of them finished by an earlier run."""


class LineProgress:
    """Plain lines on stderr, at most one every `interval` seconds: fit for job logs."""

    def __init__(self, interval: float = 10.0) -> None:
        self.interval = interval

    def say(self, text: str) -> None:
        print(clean(text), file=sys.stderr, flush=True)  # noqa: T201 - this class is the place that prints

    @contextmanager
    def meter(self, name: str, total: float, unit: str, done: float = 0) -> Iterator[Meter]:
        yield _LineMeter(self, name, total, unit, done)


class _LineMeter:
    def __init__(self, parent: LineProgress, name: str, total: float, unit: str, done: float) -> None:
        self.parent, self.name, self.total, self.unit, self.done = parent, name, total, unit, done
        self.first = done
        self.start = self.last = time.monotonic()

    def advance(self, amount: float, note: str = "") -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.last >= self.parent.interval and self.done > self.first:
            rate = (self.done - self.first) / (now - self.start)
            left = max(self.total - self.done, 0) / rate
            self.last = now
            tail = f", {note}" if note else ""
            self.parent.say(
                f"{self.name}: {self.done:.0f}/{self.total:.0f} {self.unit}, {rate:.1f} {self.unit}/s, {left:.0f} s left{tail}"
            )


class Silence:
    """Tells nothing."""

    def say(self, text: str) -> None:
        """Drop the line."""

    @contextmanager
    def meter(self, name: str, total: float, unit: str, done: float = 0) -> Iterator[Meter]:
        yield self

    def advance(self, amount: float, note: str = "") -> None:
        """Drop the count."""
