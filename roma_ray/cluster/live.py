"""How a training worker's progress reaches the driver: lines appended to a file in the stage's folder, which the driver polls.

A file outlives workers and drivers, needs no process of its own, and the storage is shared anyway.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from roma_ray.store.buckets import is_object
from roma_ray.store.logs import append_line, put_again, whole_lines

FILE = ".live.jsonl"
_SECONDS_BETWEEN_LINES = 0.3
# To a bucket, which is sent all lines again with each: as a training gets long, they get rarer.
_BYTES_A_SECOND = 20_000


class LiveWriter:
    """The first worker's side."""

    def __init__(self, folder: str | Path, token: str, done: int) -> None:
        """`token` names the driver's run; `done` questions were trained on before this worker started."""
        self.path, self.token, self.done = Path(folder) / FILE, token, done
        self.last = 0.0
        # A bucket takes its time for each line, and training need not wait for it.
        self._writing = ThreadPoolExecutor(1, "live") if is_object(self.path) else None
        self._written: Future[None] | None = None
        self._write({"done": done, "note": ""})

    def advance(self, count: int, note: str) -> None:
        """`count` more questions are done; written at most a few times a second."""
        self.done += count
        busy = self._written is not None and not self._written.done()
        wait = max(_SECONDS_BETWEEN_LINES, put_again(self.path) / _BYTES_A_SECOND)
        if not busy and time.monotonic() - self.last >= wait:
            self._write({"done": self.done, "note": note})

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch ended."""
        self._write({"done": self.done, "note": "", "epoch": record})

    def _write(self, line: dict[str, Any]) -> None:
        self.last = time.monotonic()
        text = json.dumps({"run": self.token, **line})
        if self._writing is None:
            append_line(self.path, text)
        else:
            self._written = self._writing.submit(append_line, self.path, text)

    @staticmethod
    def note_up(folder: str | Path, token: str) -> None:
        """The worker's process runs; the model comes next."""
        append_line(Path(folder) / FILE, json.dumps({"run": token, "up": True}))


class LiveReader:
    """The driver's side: calls `report` once for each epoch, earlier runs' epochs included, and `advance` as work is done."""

    def __init__(
        self,
        folder: str | Path,
        token: str,
        report: Callable[[dict[str, Any]], None],
        advance: Callable[[int, str], None],
    ) -> None:
        self.path, self.token, self.report, self.advance = Path(folder) / FILE, token, report, advance
        self.told: set[int] = set()
        self.done: int | None = None
        self.stands = "they wait for nodes with room, or for their processes to start and import their libraries"
        self.up: float | None = None
        """When the first worker's process ran and had imported its libraries."""
        self.first: float | None = None
        """When a worker first told of work done (`time.monotonic`)."""
        self.offset = 0

    def poll(self) -> None:
        """Pass on what is new."""
        lines, self.offset = whole_lines(self.path, self.offset)
        for line in lines:
            self._take(json.loads(line))

    def _take(self, line: dict[str, Any]) -> None:
        if "epoch" in line:
            self.tell(line["epoch"])
        if line["run"] != self.token:
            return
        if "up" in line:
            self.up = self.up or time.monotonic()
            self.stands = "they load the model, and look at their data"
            return
        if self.done is not None and line["done"] != self.done:
            self.first = self.first or time.monotonic()
            # The count falls after a worker's restart, which goes back to the last checkpoint.
            self.advance(line["done"] - self.done, line["note"])
        self.done = line["done"]

    def tell(self, record: dict[str, Any]) -> None:
        """Report an epoch unless that was done."""
        if record["epoch"] not in self.told:
            self.told.add(record["epoch"])
            self.report(record)
