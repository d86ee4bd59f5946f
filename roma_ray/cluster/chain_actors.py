"""A chain of actors on Ray: each holds one slice of the model and hands every batch's states to the next through Ray's object store.

The driver sees references and reports, never states. Several batches are on their way at once, so that all actors work. An
actor that dies costs the batches on their way through its chain; it is made anew, and the others keep their weights.
"""

from __future__ import annotations

import pickle
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from roma_ray.cluster.batch_actors import ATTEMPTS
from roma_ray.cluster.chain_plans import ChainPlan, plan_chains
from roma_ray.cluster.environment import quiet_libraries
from roma_ray.cluster.failures import chain as wrapped
from roma_ray.cluster.failures import explain, explained, packed, unpacked
from roma_ray.cluster.placement import Need
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.cluster.starting import IMPORTS, MODEL, READY, Roll, Starting
from roma_ray.engine.chain import Handed, links_of
from roma_ray.engine.extractor import ExtractWork
from roma_ray.engine.model_spec import set_threads
from roma_ray.engine.work import Executor, Report, Work
from roma_ray.errors import WorkerError
from roma_ray.store.buckets import is_object
from roma_ray.store.files import remove_folder
from roma_ray.store.uploads import in_background

# Of a batch on its way through an actor that dies: after so many deaths it goes alone, after as many more the run ends.
_DEATHS = 2
_OPENINGS = 3
# Batches on their way, for each slice: one is worked on, and one waits where it is needed next.
_DEPTH = 2


@dataclass(frozen=True)
class Failed:
    """What went wrong in an actor, in place of what it would have left: the actors behind it pass it on."""

    packed: dict[str, str]


class Link(Protocol):
    """A picklable description of what one actor of a chain does."""

    def open(self) -> Callable[[Any, Any], Any]:
        """Load what every batch needs; returns the function that does one batch, given what the actor before left of it."""


class SliceActor:
    """An actor: opens its link when it is asked whether it is ready, then does batch after batch."""

    def __init__(self, link: bytes, roll: str | None, threads: int) -> None:
        """`link` is pickled: its libraries are imported when this actor can say so, in the folder `roll`."""
        quiet_libraries()
        self.link, self.threads = link, threads
        self.roll = None if roll is None else Roll(roll)
        self.do: Callable[[Any, Any], Any] | None = None
        self.computing = threading.Lock()

    def ready(self) -> Failed | None:
        """Load the slice unless that was done; what went wrong, if anything did."""
        try:
            with self.computing:
                if self.do is None:
                    self._note(IMPORTS)
                    link: Link = pickle.loads(self.link)
                    set_threads(self.threads)
                    self._note(MODEL)
                    self.do = link.open()
                    self._note(READY)
        except Exception as error:  # noqa: BLE001 - the border of the process; the driver raises it
            return Failed(packed(error))
        return None

    def _note(self, state: str) -> None:
        if self.roll is not None:
            self.roll.note(state)

    def run(self, batch: Any, before: Any) -> Any:
        """Do one batch, given what the actor before left of it: what is left now, or what went wrong, here or there."""
        if isinstance(before, Failed):
            return before
        assert self.do is not None
        try:
            with self.computing:
                # A setting of the thread, and results depend on it.
                set_threads(self.threads)
                with in_background() as uploads:
                    left = self.do(batch, before)
            uploads.wait()
        except Exception as error:  # noqa: BLE001 - as above
            return Failed(packed(error))
        return left


class ActorChain:
    """One chain of actors, in a placement group of its own: started, made anew where they died, and ended."""

    actor: ClassVar[type[SliceActor]] = SliceActor
    setting: ClassVar[str] = "extraction.chain"
    in_order: ClassVar[bool] = False
    """Whether an actor's calls must run in the order in which they were made."""

    def __init__(
        self, links: Sequence[Link], needs: Sequence[Need], name: str, folder: str, roll: str | None, threads: int
    ):
        import ray
        from ray import cloudpickle
        from ray.util.placement_group import placement_group

        self.links = [cloudpickle.dumps(link) for link in links]
        self.needs, self.name, self.folder, self.roll, self.threads = needs, name, folder, roll, threads
        labels = [dict(need.labels) for need in needs]
        # Near one another where that can be: they hand much on.
        self.group = placement_group(
            [need.resources() for need in needs],
            strategy="PACK",
            **({"bundle_label_selector": labels} if any(labels) else {}),
        )
        self.kind = ray.remote(self.actor)
        self.actors = [self._start(number) for number in range(len(links))]
        self.loaded, self.openings = [False] * len(links), [0] * len(links)
        self.asked: dict[Any, int] = {}
        """References of answers to `ready`, and which actor's."""
        self.ask()

    @property
    def ready(self) -> bool:
        """Whether all actors have said so since they were asked."""
        return not self.asked

    def ask(self) -> None:
        """Ask all actors whether they are ready: whoever is dead will be found."""
        self.asked = {actor.ready.remote(): number for number, actor in enumerate(self.actors)}

    def hear(self, answer: Any) -> None:
        """An answer to `ready` has come. A dead actor is made anew. Raises RomaError."""
        import ray

        number = self.asked.pop(answer)
        try:
            failure = ray.get(answer)
        except ray.exceptions.RayError as error:
            if not died(error):
                raise
            self._revive(number, error)
            return
        if failure is not None:
            raise unpacked([failure.packed], self.name, self.folder)
        self.loaded[number], self.openings[number] = True, 0

    def send(self, batch: int) -> Any:
        """Send a batch through all actors; returns the reference of what the last one leaves. Each gets the one before's reference."""
        left = None
        for actor in self.actors:
            left = actor.run.remote(batch, left)
        return left

    def close(self) -> None:
        """End the actors and give their places back."""
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.group)

    def _start(self, number: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        options = {k: v for k, v in self.needs[number].options().items() if v is not None and k != "label_selector"}
        place = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=number)
        # On a file system nothing is gained by two calls at a time; to a bucket one batch is put while the next is computed.
        at_once = 2 if is_object(self.folder) and not self.in_order else 1
        started = self.kind.options(scheduling_strategy=place, max_concurrency=at_once, **options)
        return started.remote(self.links[number], self.roll, self.threads)

    def _revive(self, number: int, death: BaseException) -> None:
        """Make a dead actor anew. Raises WorkerError where its slice has killed too many while it was loaded."""
        self.openings[number] += not self.loaded[number]
        if self.openings[number] >= _OPENINGS:
            said = explain(death, self.name, self.folder)
            raise WorkerError(
                f"{self.name}: loading slice {number + 1} of {len(self.actors)} killed its worker {_OPENINGS} times; most likely memory "
                f"ran out. Take more slices ({self.setting}), or nodes with more memory. What Ray says: {said}"
            )
        self.loaded[number] = False
        self.actors[number] = self._start(number)
        self.asked[self.actors[number].ready.remote()] = number


def died(error: BaseException) -> bool:
    """Whether an error comes of the death of an actor or its node, or of the loss of what they held."""
    from ray import exceptions as ray_errors

    deaths = (
        ray_errors.RayActorError,
        ray_errors.ObjectLostError,
        ray_errors.OutOfMemoryError,
        ray_errors.NodeDiedError,
        ray_errors.WorkerCrashedError,
        ray_errors.LocalRayletDiedError,
    )
    return any(isinstance(found, deaths) for found in wrapped(error))


class Flow:
    """Batches on their way through chains of actors."""

    def __init__(self, chains: Sequence[ActorChain], batches: Sequence[int], name: str, patience: float) -> None:
        self.chains, self.name, self.patience = chains, name, patience
        self.waiting, self.suspects = deque(batches), deque[int]()
        self.deaths: Counter[int] = Counter()
        self.flying: list[dict[Any, int]] = [{} for _ in chains]
        """Of each chain: references of what the last actor will leave, and of which batch."""

    def results(self) -> Iterator[tuple[int, Any]]:
        """Each batch with what the last actor left of it, in any order. Raises RomaError."""
        import ray

        heard = time.monotonic()
        while self.waiting or self.suspects or any(self.flying):
            for number in range(len(self.chains)):
                self._fill(number)
            awaited = [ref for chain in self.chains for ref in chain.asked] + [r for fly in self.flying for r in fly]
            left = max(0.0, self.patience - (time.monotonic() - heard))
            if not ray.wait(awaited, num_returns=1, timeout=left)[0]:
                raise WorkerError(
                    f"{self.name}: no batch was finished and no worker got ready for {self.patience:.0f} s (ray.no_progress_seconds). "
                    "See whether nodes are missing or busy with other jobs (`ray status`); the same command goes on"
                )
            heard = time.monotonic()
            for ref in ray.wait(awaited, num_returns=len(awaited), timeout=0)[0]:
                for number, chain in enumerate(self.chains):
                    if ref in chain.asked:
                        chain.hear(ref)
                    elif ref in self.flying[number]:
                        yield from self._landed(number, ref)

    def _fill(self, number: int) -> None:
        """Send batches, as many as the chain should have on their way; one that may have killed an actor goes alone."""
        chain, flying = self.chains[number], self.flying[number]
        if not chain.ready or any(batch in flying.values() for batch in self._alone()):
            return
        if self.suspects and not flying:
            batch = self.suspects.popleft()
            flying[chain.send(batch)] = batch
            return
        while self.waiting and len(flying) < _DEPTH * len(chain.actors):
            batch = self.waiting.popleft()
            flying[chain.send(batch)] = batch

    def _alone(self) -> list[int]:
        return [batch for batch, deaths in self.deaths.items() if deaths >= _DEATHS]

    def _landed(self, number: int, ref: Any) -> Iterator[tuple[int, Any]]:
        """What came of a batch: its result, or a death, which all batches on their way through that chain share."""
        import ray

        chain, flying = self.chains[number], self.flying[number]
        try:
            left = ray.get(ref)
        except ray.exceptions.RayError as error:
            if not died(error):
                raise
            for batch in flying.values():
                self._count_death(batch)
            flying.clear()
            chain.ask()
            return
        batch = flying.pop(ref)
        if isinstance(left, Failed):
            raise unpacked([left.packed], chain.name, chain.folder)
        del self.deaths[batch]
        yield batch, left

    def _count_death(self, batch: int) -> None:
        self.deaths[batch] += 1
        if self.deaths[batch] >= 2 * _DEATHS:
            raise WorkerError(
                f"{self.name}: batch {batch} killed a worker of its chain {self.deaths[batch]} times, at last {_DEATHS} times alone; most "
                "likely memory ran out. Lower extraction.batch_tokens, or take more slices (extraction.chain)"
            )
        if self.deaths[batch] >= _DEATHS:
            self.suspects.append(batch)
        else:
            self.waiting.appendleft(batch)


def chain_executor(cluster: Cluster, device: str) -> Executor:
    """An executor that sends an extraction's batches through chains of slices. It raises RomaError."""

    def execute(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        assert isinstance(work, ExtractWork)
        if not batches:
            return
        cluster.connect()
        extraction = work.setup.config.extraction
        assert extraction.chain is not None
        plan = plan_chains(cluster, "extract", work.model, extraction.chain, extraction.memory_gb, len(batches), device)
        cluster.say(f"extract: {len(batches)} batches through {plan}, {device}")
        for left in run_chains(cluster, plan, links_of(work, plan.ranges), work, batches):
            yield left.report

    return execute


def run_chains(
    cluster: Cluster, plan: ChainPlan, links: Sequence[Link], work: Work, batches: Sequence[int]
) -> Iterator[Handed]:
    """Send batches through as many chains as planned; yields what the last actor leaves of each. Raises RomaError."""
    roll = Roll(Path(work.folder) / ATTEMPTS / uuid.uuid4().hex[:12] / "roll")
    chains: list[ActorChain] = []
    with (
        explained(work.name, work.folder),
        Starting(work.name, lambda: roll.stands(plan.workers), cluster.say) as starting,
    ):
        try:
            for _ in range(plan.copies):
                threads = cluster.config.threads
                chains.append(ActorChain(links, plan.needs, work.name, work.folder, str(roll.folder), threads))
            for _, left in Flow(chains, batches, work.name, cluster.config.ray.no_progress_seconds).results():
                starting.over()
                yield left
        finally:
            for chain in chains:
                chain.close()
    remove_folder(Path(work.folder) / ATTEMPTS)
