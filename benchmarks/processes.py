"""What the benchmarks of many questions share: workers that are processes, their memory and the driver's, gates, clocks."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DRIVER_GIB, WORKER_GIB = 4.0, 8.0


class Memory:
    """The peak of this process's own memory and of what of it is resident, in GiB, looked at every tenth of a second."""

    def __init__(self) -> None:
        self.own = self.resident = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def look(self) -> tuple[float, float]:
        """Both peaks until now."""
        facts = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        own, resident = (float(facts[name].split()[0]) / 2**20 for name in ("RssAnon", "VmRSS"))
        self.own, self.resident = max(self.own, own), max(self.resident, resident)
        return self.own, self.resident

    def _watch(self) -> None:
        while True:
            self.look()
            time.sleep(0.1)


def work_off(work: Any, queue: Any, reports: Any) -> None:
    """A worker: does batches until there are none, then says what memory and CPU it took."""
    memory = Memory()
    do = work.open()
    while (batch := queue.get()) is not None:
        reports.put(do(batch))
    reports.put((*memory.look(), cpu_seconds()))


class Workers:
    """An executor of processes; afterwards it knows their peaks and its own seconds."""

    def __init__(self, count: int) -> None:
        self.count, self.peaks, self.seconds, self.busy, self.cpu = count, [], 0.0, 0.0, 0.0

    def __call__(self, work: Any, batches: Sequence[int]) -> Iterator[Any]:
        began, context = time.monotonic(), multiprocessing.get_context("spawn")
        queue, reports = context.Queue(), context.Queue()
        for batch in [*batches, *[None] * self.count]:
            queue.put(batch)
        processes = [context.Process(target=work_off, args=(work, queue, reports)) for _ in range(self.count)]
        for process in processes:
            process.start()
        while len(self.peaks) < self.count:
            said = reports.get(timeout=3600)
            if isinstance(said, tuple):
                self.peaks.append(said[:2])
                self.cpu += said[2]
                continue
            self.busy += said.seconds
            yield said
        for process in processes:
            process.join()
        self.seconds = time.monotonic() - began


@contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Note the seconds that the block takes."""
    began = time.monotonic()
    yield
    times[name] = time.monotonic() - began


def cpu_seconds() -> float:
    """Of this process until now, its threads included."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def memory_gates(found: dict[str, Any]) -> None:
    """Print the peaks of driver and workers; ends with exit code 1 where one is over its gate."""
    own, resident = found["driver_gib"]
    print(f"  driver: own memory {own:.2f} GiB, resident {resident:.2f} (gate: own {DRIVER_GIB:g})")
    for own_worker, resident_worker in found["worker_gib"]:
        print(f"  worker: own memory {own_worker:.2f} GiB, resident {resident_worker:.2f} (gate: own {WORKER_GIB:g})")
    if own > DRIVER_GIB or any(peak > WORKER_GIB for peak, _ in found["worker_gib"]):
        sys.exit("a gate is missed")
