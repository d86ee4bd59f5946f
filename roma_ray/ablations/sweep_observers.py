"""Who follows a sweep: the live table of a terminal, the lines of a log. (The tracker: `tracker.py`.)"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from roma_ray.ablations.sweep import DONE, FAILED, RUNNING, STOPPED, State, Sweep, SweepObserver
from roma_ray.ablations.sweep_report import progress_line
from roma_ray.borders.text import duration_text
from roma_ray.engine.progress import Progress

HEADER = ("trial", "state", "epoch", "validation %", "test gain", "time")


class Board(Protocol):
    """Where the table of trials is shown."""

    def show(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Replace what is shown."""

    def close(self) -> None:
        """Leave what is shown as it is."""


class Lines(SweepObserver):
    """A line for each trial that starts, ends an epoch or ends: for logs."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._said: dict[str, tuple[str, int]] = {}

    def changed(self, sweep: Sweep, state: State) -> None:
        now = (state.state, state.epoch)
        if self._said.get(state.trial.id) != now:
            self._said[state.trial.id] = now
            self.progress.say(f"[{progress_of(sweep)}] {progress_line(state)}")


class LiveTable(SweepObserver):
    """The table of trials on a board."""

    def __init__(self, board: Board) -> None:
        self.board = board

    def started(self, sweep: Sweep) -> None:
        self.board.show(*table_of(sweep))

    def changed(self, sweep: Sweep, state: State) -> None:
        self.board.show(*table_of(sweep))


def table_of(sweep: Sweep) -> tuple[str, Sequence[str], list[Sequence[str]]]:
    """The title, header and rows of the table of trials."""
    return progress_of(sweep), HEADER, [_row(state) for state in sweep.states.values()]


def _row(state: State) -> tuple[str, ...]:
    seconds = state.seconds
    if seconds is None and state.began is not None:
        seconds = time.monotonic() - state.began
    return (
        state.trial.name,
        state.state,
        f"{state.epoch}/{state.planned.epochs}" if state.epoch else "",
        "" if state.validation_accuracy is None else f"{100 * state.validation_accuracy:.2f}",
        "" if state.test_difference is None else f"{100 * state.test_difference:+.2f}",
        "" if seconds is None else duration_text(seconds),
    )


def progress_of(sweep: Sweep) -> str:
    """How many trials are in which state, and how long the rest will take."""
    counts = Counter(state.state for state in sweep.states.values())
    text = ", ".join(f"{counts[name]} {name}" for name in (DONE, RUNNING, STOPPED, FAILED) if counts[name]) or "0 done"
    total = len(sweep.states) + max(0, sweep.missing_samples - len([s for s in sweep.having(RUNNING) if s.values]))
    left = seconds_left(sweep)
    return f"{text} of {total} trials" + (f", about {duration_text(left)} left" if left is not None else "")


def seconds_left(sweep: Sweep) -> float | None:
    """From the epochs that this run of the command has done, and how many trials work at a time; None where nothing tells."""
    now = time.monotonic()
    mine = [s for s in sweep.states.values() if s.began is not None]
    done = sum(s.epoch for s in mine)
    if not done:
        return None
    spent = sum((s.seconds if s.seconds is not None else now - (s.began or now)) for s in mine)
    todo = sum(s.planned.epochs - s.epoch for s in sweep.states.values() if s.state in (RUNNING, "waiting"))
    todo += sweep.missing_samples * max(s.planned.epochs for s in sweep.states.values()) if sweep.missing_samples else 0
    return todo * spent / done / max(1, len(sweep.having(RUNNING))) if todo else None
