"""Planned batches on Ray actors, each with one loaded model, that write their batches' files themselves.

Batches are handed out in groups, large ones first and single ones at the end, two groups a worker; each worker tells of its
batches as they are done. When a worker dies, its journal on the storage says what it has done and which batch it was at: that
one alone is done again. A batch that killed its worker twice is searched for the rows that do it, and those are set aside.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roma_ray.cluster.batch_worker import ATTEMPTS as ATTEMPTS
from roma_ray.cluster.batch_worker import FAILURE, OPENED, REPORTS, Journal, Order
from roma_ray.cluster.failures import explain, explained, unpacked
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.cluster.starting import IMPORTS, READY, WAITING, Starting, in_words
from roma_ray.cluster.worker_pool import Worker
from roma_ray.cluster.worth import begun_here, share_of
from roma_ray.engine.work import Executor, Report, Work, said_of
from roma_ray.errors import WorkerError
from roma_ray.store.artifacts import note_start
from roma_ray.store.buckets import is_object
from roma_ray.store.files import remove_folder

# Calls that a worker has: one runs, the next one waits for it there, so that no worker waits for the driver.
_CALLS = 2
# A group is this part of a worker's share of what is left, and no more batches than that.
_PART_OF_SHARE, _LARGEST_GROUP = 8, 64
# Deaths in a row of a worker that does not start, or does not open its work.
_OPENINGS = 3


def ray_executor(cluster: Cluster, stage: str, device: str) -> Executor:
    """An executor that spreads a stage's batches over the cluster, where that is worth it. It raises RomaError."""

    def execute(work: Work, batches: Sequence[int], left: float | None) -> Iterator[Report]:
        from ray import cloudpickle

        began, busy, begun = time.monotonic(), 0.0, False
        cluster.connect()
        wanted = getattr(cluster.config.ray, f"{stage}_workers")
        at_most = len(batches) if wanted else min(len(batches), share_of(left) or len(batches))
        count, need = cluster.place(stage, wanted, at_most, device, kept=True)
        cluster.say(f"{work.name}: {len(batches)} batches on {count} worker(s), {device}")
        token, pickled = uuid.uuid4().hex[:12], cloudpickle.dumps(work)
        order = Order(work.name, stage, work.folder, token, pickled, cluster.config.threads)
        # A work without a model comes before its stage's own, and may have fewer batches.
        before = not getattr(work, "loads_model", True)
        workers = cluster.pool.lend(need, count, calls_at_once(work.folder), more_to_come=before)
        handing = HandOut(order, batches, workers, cluster.config.ray.no_progress_seconds, began)
        try:
            with explained(work.name, work.folder, stage), Starting(work.name, handing.stands, cluster.say) as starting:
                for report in handing.reports():
                    starting.over()
                    # What is read from a dead worker's journal says nothing of a start.
                    if handing.start and not begun:
                        begun = True
                        cluster.say(f"{work.name}: {said_of(handing.start)}")
                        note_start(work.folder, handing.start)
                    busy += report.seconds
                    yield report
        finally:
            cluster.pool.keep(handing.leave())
        remove_folder(Path(work.folder) / ATTEMPTS)
        started = sum(seconds for part, seconds in handing.start.items() if part != "first_batch")
        cluster.compare(work.name, time.monotonic() - began, started, busy)

    return begun_here(cluster, stage, device, execute)


def calls_at_once(place: str | Path | None) -> int:
    """Of a storage in a bucket a worker puts one batch while it computes the next; on a file system nothing is gained by it."""
    return 2 if place is not None and is_object(place) else 1


@dataclass(eq=False)
class Call:
    """A group of batches that a worker was handed."""

    name: str
    told: Any
    """Yields references to what the worker tells."""
    left: dict[int, None]
    """Batches that were not reported, in their order."""


@dataclass(eq=False)
class Hand:
    """A worker as the driver sees it."""

    worker: Worker
    rising: Any
    """Ready when its process runs; None from then on."""
    calls: deque[Call] = field(default_factory=deque)
    stand: str = WAITING
    deaths: int = 0
    """In a row, before its work was open."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of its start, by part (`engine/work.py`)."""


class HandOut:
    """The batches of a work, handed out to workers."""

    def __init__(
        self, order: Order, batches: Sequence[int], workers: Sequence[Worker], patience: float, began: float
    ) -> None:
        """`patience`: seconds without anything told after which the work is given up; `began`: when its workers were asked for."""
        import ray

        self.order, self.patience = order, patience
        self.waiting = deque(int(batch) for batch in batches)
        self.missing = set(self.waiting)
        self.before: dict[int, tuple[str, ...]] = {}
        """What attempts on a batch have left that ended with their worker."""
        self.sent = ray.put(order)
        self.hands = [Hand(worker, worker.actor.up.remote()) for worker in workers]
        self.start: dict[str, float] = {}
        """Seconds of each part of the start, of the worker that did the first batch."""
        self._began, self._calls = began, 0

    def stands(self) -> str:
        """How far the workers are, in words."""
        return in_words(Counter(hand.stand for hand in self.hands), len(self.hands))

    def reports(self) -> Iterator[Report]:
        """Each batch's report, once. Raises RomaError."""
        import ray

        while self.missing:
            self._hand_out()
            # The later one of two calls is heard when the first has ended.
            sources = {hand.rising or hand.calls[0].told: hand for hand in self.hands if hand.rising or hand.calls}
            if not ray.wait(list(sources), num_returns=1, timeout=self.patience)[0]:
                raise WorkerError(
                    f"{self.order.name}: nothing was done for {self.patience:.0f} s (ray.no_progress_seconds): {self.stands()}. Look at "
                    "the cluster (`ray status`, `roma-ray doctor`), and run the same command again: finished work is kept."
                )
            for source in ray.wait(list(sources), num_returns=len(sources), timeout=0)[0]:
                yield from self._hear(sources[source])

    def _hand_out(self) -> None:
        up = [hand for hand in self.hands if hand.rising is None]
        for calls in range(_CALLS):
            for hand in up:
                # The last ones go to whoever is free, or soon will be.
                if len(hand.calls) == calls and self.waiting and (calls == 0 or len(self.waiting) > len(self.hands)):
                    self._call(hand, self._group())

    def _group(self) -> list[int]:
        size = min(_LARGEST_GROUP, len(self.waiting) // (_PART_OF_SHARE * len(self.hands)))
        group = [self.waiting.popleft()]
        # What may kill its worker goes alone.
        while self.waiting and len(group) < size and not {group[0], self.waiting[0]} & self.before.keys():
            group.append(self.waiting.popleft())
        return group

    def _call(self, hand: Hand, group: list[int]) -> None:
        self._calls += 1
        name = f"{self._calls:06d}"
        method = hand.worker.actor.run.options(num_returns="streaming")
        told = method.remote(self.sent, name, group, self.before.get(group[0], ()))
        hand.calls.append(Call(name, told, dict.fromkeys(group)))

    def _hear(self, hand: Hand) -> Iterator[Report]:
        """What a worker tells next. Raises RomaError."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            if hand.rising is not None:
                ray.get(hand.rising)
                hand.rising, hand.stand = None, IMPORTS
                hand.seconds = {"workers": time.monotonic() - self._began}
                return
            kind, value = ray.get(next(hand.calls[0].told))
        except StopIteration:
            ended = hand.calls.popleft()
            assert not ended.left, f"batches {list(ended.left)} were not reported"
            return
        except RayTaskError:
            raise
        except RayError as error:
            yield from self._died(hand, error)
            return
        if kind == REPORTS:
            if not self.start:
                known = sum(hand.seconds.values())
                self.start = {**hand.seconds, "first_batch": max(0.0, time.monotonic() - self._began - known)}
            yield from self._new(hand.calls[0], value)
        elif kind == FAILURE:
            raise unpacked([value], self.order.name, self.order.folder)
        else:
            hand.stand = READY if kind == OPENED else value
            if kind == OPENED:
                hand.deaths, hand.seconds = 0, {**hand.seconds, **value}

    def _new(self, call: Call, told: Sequence[Mapping[str, Any]]) -> Iterator[Report]:
        for fields in told:
            report = Report(**fields)
            # Of a worker that only seemed dead a batch may come twice.
            if report.batch in call.left:
                del call.left[report.batch]
                self.missing.discard(report.batch)
                yield report

    def _died(self, hand: Hand, error: Any) -> Iterator[Report]:
        """Put another worker in the place of one that died, and what it has not done before all that waits. Raises WorkerError."""
        opening = hand.rising is not None
        for call in reversed(hand.calls):
            left = Journal(self.order, call.name).read()
            yield from self._new(call, left.done)
            self.waiting.extendleft(reversed([batch for batch in call.left if batch != left.batch]))
            if left.batch in call.left:
                self.before[left.batch] = (*self.before.get(left.batch, ()), *left.lines)
                self.waiting.appendleft(left.batch)
            opening = opening or left.opening
        hand.deaths = hand.deaths + 1 if opening else 0
        if getattr(error, "actor_init_failed", False) or hand.deaths >= _OPENINGS:
            raise self._does_not_open(hand, error)
        hand.calls.clear()
        hand.worker.end()
        hand.worker.start()
        hand.rising, hand.stand = hand.worker.actor.up.remote(), WAITING

    def _does_not_open(self, hand: Hand, error: Any) -> Exception:
        name = self.order.name
        if hand.rising is not None:
            return explain(error, name, self.order.folder, self.order.stage)
        return WorkerError(
            f"{name}: loading the model killed its worker {hand.deaths} times; most likely memory ran out. Use nodes with more memory, "
            f"or fewer workers on a node (ray.{self.order.stage}_workers, ray.gpus_per_worker)."
        )

    def leave(self) -> list[Worker]:
        """End the workers that have something under way; the others."""
        at_work = [h for h in self.hands if h.rising is not None or any(call.left for call in h.calls)]
        for hand in at_work:
            hand.worker.end()
        return [hand.worker for hand in self.hands if hand not in at_work]
