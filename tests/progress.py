"""A progress that keeps what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Told:
    """Lines, and of each meter its total, its unit, where it began, and every step."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.meters: dict[str, tuple[float, str, float]] = {}
        self.counted: list[float] = []
        """Of the meter that was opened last."""
        self.steps: dict[str, list[float]] = {}

    def say(self, text: str) -> None:
        self.lines.append(text)

    @contextmanager
    def meter(self, name: str, total: float, unit: str, done: float = 0) -> Iterator[Told]:
        self.meters[name] = (total, unit, done)
        self.counted = self.steps[name] = []
        yield self

    def advance(self, amount: float, note: str = "", seconds: float | None = None) -> None:
        self.counted.append(amount)
