"""Work that is a list of planned batches: what a worker opens once and then does batch by batch.

The serial executor is here; the Ray one wraps the same objects. Each batch writes its own files, so a resume does only the
batches that have none, and who does which batch changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from roma_ray.engine.setup import Setup
from roma_ray.store.artifacts import Stage, note_start
from roma_ray.store.uploads import Uploads, in_background


@dataclass(frozen=True)
class Report:
    """What a finished batch tells the driver."""

    batch: int
    rows: int
    tokens: int
    errors: int
    seconds: float


@dataclass(frozen=True)
class Job:
    """A stage that is to be filled: what its function is handed, and every worker of it. Picklable."""

    setup: Setup
    stages: Mapping[str, Stage]
    """All that the stage is made of, by name."""
    stage: Stage

    @property
    def name(self) -> str:
        """Shown in progress and errors."""
        return self.stage.name

    @property
    def folder(self) -> str:
        """The stage's folder, on storage that every worker sees."""
        return str(self.stage.path)


class Work(Protocol):
    """A picklable description of batch-wise work."""

    @property
    def name(self) -> str:
        """Shown in progress and errors."""

    @property
    def folder(self) -> str:
        """The stage's folder, on storage that every worker sees."""

    def open(self) -> Callable[[int], Report]:
        """Load what every batch needs (a model), once a process; returns the function that does one batch."""


class Executor(Protocol):
    """Runs batches somewhere; yields their reports in any order."""

    def __call__(self, work: Work, batches: Sequence[int]) -> Iterator[Report]: ...


def serial(work: Work, batches: Sequence[int]) -> Iterator[Report]:
    """Run the batches in this process, in order."""
    if batches:
        yield from one_by_one(timed_open(work), batches)


def timed_open(work: Work) -> Callable[[int], Report]:
    """The opened work, whose first batch notes in the stage's folder how long it took, and opening before it. Raises what `open` does."""
    began, opened = time.monotonic(), work.open()
    loaded, first = time.monotonic() - began, True

    def do(batch: int) -> Report:
        nonlocal first
        report = opened(batch)
        if first:
            note_start(work.folder, {"model": loaded, "first_batch": report.seconds})
            first = False
        return report

    return do


PARTS = {
    "workers": "workers",
    "imports": "imports",
    "model": "model",
    "first_batch": "first batch",
    "first_step": "data and first step",
}
"""What a start is made of, in words."""


def said_of(seconds: Mapping[str, float]) -> str:
    """How long a start took, and what for, in words."""
    parts = ", ".join(f"{words} {seconds[part]:.1f}" for part, words in PARTS.items() if part in seconds)
    return f"{sum(seconds.values()):.1f} s to start: {parts}"


def one_by_one(do: Callable[[int], Report], batches: Iterable[int]) -> Iterator[Report]:
    """Do batches in their order. What a bucket takes of one is put while the next is computed; a batch is reported when it is there."""
    before: tuple[Report, Uploads] | None = None
    try:
        for batch in batches:
            with in_background() as uploads:
                report = do(batch)
            if before is not None:
                before[1].wait()
                yield before[0]
            before = (report, uploads) if uploads.begun else None
            if before is None:
                yield report
        if before is not None:
            before[1].wait()
            yield before[0]
    finally:
        if before is not None:
            before[1].end()
