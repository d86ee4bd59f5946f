"""Progress of a run: the interface, and plain lines on stderr. `terminal.py` implements it as live bars."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from roma_ray.borders.text import clean
from roma_ray.errors import with_addresses


class Meter(Protocol):
    """Counts one stage's units."""

    def advance(self, amount: float, note: str = "", seconds: float | None = None) -> None:
        """`amount` more units are done, in `seconds` where that is known; `note` is a short live figure such as the loss."""


class Progress(Protocol):
    """Receives what a run tells."""

    def say(self, text: str) -> None:
        """A line that stays."""

    def meter(self, name: str, total: float, unit: str, done: float = 0) -> AbstractContextManager[Meter]:
        """A context manager around `total` units of work, `done` of them finished by an earlier run."""


class Pace:
    """Rate and time left. Starting and loading are not counted: the clock starts when the first unit's work began, where its
    seconds are known, else when the first unit was done.
    """

    def __init__(self, total: float, done: float) -> None:
        self.total, self.done = total, done
        self._counted, self._began = done, 0.0
        self.begun = False

    def advance(self, amount: float, seconds: float | None = None) -> None:
        """`amount` more units are done."""
        self.done += amount
        if not self.begun and amount:
            self.begun = True
            self._began = time.monotonic() - (seconds or 0.0)
            self._counted = self.done if seconds is None else self.done - amount

    @property
    def rate(self) -> float | None:
        """Units a second; None where nothing tells yet."""
        seconds = time.monotonic() - self._began
        return (
            (self.done - self._counted) / seconds if self.begun and self.done > self._counted and seconds > 0 else None
        )

    @property
    def left(self) -> float | None:
        """Seconds for the rest; None where nothing tells yet."""
        rate = self.rate
        return None if rate is None else max(self.total - self.done, 0) / rate


class LineProgress:
    """Plain lines on stderr, at most one every `interval` seconds: fit for job logs."""

    def __init__(self, interval: float = 10.0) -> None:
        self.interval = interval

    def say(self, text: str) -> None:
        print(clean(with_addresses(text)), file=sys.stderr, flush=True)  # noqa: T201 - this class is the place that prints

    @contextmanager
    def meter(self, name: str, total: float, unit: str, done: float = 0) -> Iterator[Meter]:
        yield _LineMeter(self, name, total, unit, done)


class _LineMeter:
    def __init__(self, parent: LineProgress, name: str, total: float, unit: str, done: float) -> None:
        self.parent, self.name, self.unit = parent, name, unit
        self.pace = Pace(total, done)
        self.last = time.monotonic()

    def advance(self, amount: float, note: str = "", seconds: float | None = None) -> None:
        pace = self.pace
        pace.advance(amount, seconds)
        now, rate, left = time.monotonic(), pace.rate, pace.left
        if now - self.last >= self.parent.interval and rate is not None:
            self.last = now
            tail = f", {note}" if note else ""
            self.parent.say(
                f"{self.name}: {pace.done:.0f}/{pace.total:.0f} {self.unit}, {rate:.1f} {self.unit}/s, {left:.0f} s left{tail}"
            )


class Silence:
    """Tells nothing."""

    def say(self, text: str) -> None:
        """Drop the line."""

    @contextmanager
    def meter(self, name: str, total: float, unit: str, done: float = 0) -> Iterator[Meter]:
        yield self

    def advance(self, amount: float, note: str = "", seconds: float | None = None) -> None:
        """Drop the count."""
