"""A head over actors: each holds a slice of it below the last one, which is in the process that trains or scores.

States, routing rows and their gradients pass through Ray's object store, from actor to actor where they go on; what all of it
computes is in `moe/head_chain.py` and `moe/links.py`. An actor that dies ends the pass: a training worker dies with it, and all go on
from the checkpoint (`cluster/ray_training.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from roma_ray.cluster.chain_actors import ActorChain, Failed, SliceActor, died
from roma_ray.cluster.chain_plans import ChainPlan, plan_chains
from roma_ray.cluster.failures import explain, explained, unpacked
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.config.schema import Config
from roma_ray.engine.chain import Flat
from roma_ray.engine.heads import Heads
from roma_ray.engine.model_spec import ModelSpec
from roma_ray.errors import ModelError, WorkerError
from roma_ray.moe.head_chain import Chain
from roma_ray.moe.links import HeldSlice
from roma_ray.moe.slices import Slice
from roma_ray.store.artifacts import Store


@dataclass(frozen=True)
class HeadLink:
    """What one actor holds of a head. Picklable."""

    model: ModelSpec
    start: int
    stop: int
    first: bool
    keep: bool

    def open(self) -> Callable[[str, tuple[Any, ...]], Any]:
        """Load the slice; returns what calls a method of its `HeldSlice`, with arguments and value as they travel."""
        part = self.model.load(self.start, self.stop, with_lm_head=False)
        link = HeldSlice(part, first=self.first, keep=self.keep)

        def call(method: str, arguments: tuple[Any, ...]) -> Any:
            if failed := next((one for one in arguments if isinstance(one, Failed)), None):
                return failed
            try:
                return _wired(getattr(link, method)(*map(_received, arguments)))
            except torch.OutOfMemoryError as error:
                raise ModelError(
                    f"memory ran out in layers {self.start} to {self.stop - 1} of the head: take more slices (finetune.chain), "
                    "finetune.chain_activations: recompute, or a smaller finetune.micro_batch_size or extraction.batch_tokens"
                ) from error

        return call


class HeadActor(SliceActor):
    """An actor that holds a slice of a head."""

    def serve(self, parts: int, method: str, *arguments: Any) -> Any:
        """Call a method; its value in so many parts, or what went wrong, here or in an actor below or above, in each of them."""
        left = self.run(method, arguments)
        return (left,) * parts if isinstance(left, Failed) and parts > 1 else left


class HeadActors(ActorChain):
    """The actors of one head."""

    actor: ClassVar[type[SliceActor]] = HeadActor
    setting: ClassVar[str] = "finetune.chain"
    in_order: ClassVar[bool] = True

    def stand(self, patience: float) -> None:
        """Wait until all have loaded their slices, at most so many seconds from one to the next. Raises RomaError."""
        import ray

        while not self.ready:
            waited = time.monotonic()
            answers, _ = ray.wait(list(self.asked), num_returns=1, timeout=patience)
            if not answers:
                raise WorkerError(
                    f"{self.name}: no worker with a slice of the head got ready for {time.monotonic() - waited:.0f} s "
                    "(ray.no_progress_seconds). See whether nodes are missing or busy with other jobs (`ray status`)"
                )
            self.hear(answers[0])


class ActorLinks:
    """Links in actors; a handle is Ray's reference, or what a call was given."""

    def __init__(self, actors: HeadActors) -> None:
        self.actors = actors

    def __len__(self) -> int:
        return len(self.actors.actors)

    def call(self, link: int, method: str, *arguments: Any, parts: int = 1) -> Any:
        serve = self.actors.actors[link].serve.options(num_returns=parts)
        return serve.remote(parts, method, *map(_wired, arguments))

    def get(self, handle: Any) -> Any:
        import ray

        value = ray.get(handle) if isinstance(handle, ray.ObjectRef) else handle
        if isinstance(value, Failed):
            raise unpacked([value.packed], self.actors.name, self.actors.folder)
        return _received(value)


@contextmanager
def head_over(
    plan: ChainPlan, model: ModelSpec, config: Config, *, name: str, folder: str | Path
) -> Iterator[Slice | Chain]:
    """The planned head for as long as the block runs: its last slice here, the others in actors. Raises RomaError."""
    *below, (last, _) = plan.ranges
    if not below:
        yield model.load(last, None, with_lm_head=True)
        return
    keep = config.finetune.chain_activations == "keep"
    links = [HeadLink(model, start, stop, first=n == 0, keep=keep) for n, (start, stop) in enumerate(below)]
    actors = HeadActors(links, plan.needs[:-1], name, str(folder), None, config.threads)
    try:
        part = model.load(last, None, with_lm_head=True)
        actors.stand(config.ray.no_progress_seconds)
        yield Chain(part, ActorLinks(actors))
    finally:
        actors.close()


class ChainHeads(Heads):
    """Lends heads over actors, in the driver or in a task of its cluster."""

    def __init__(self, config: Config, device: str, cluster: Cluster | None = None) -> None:
        self.config, self.device, self.cluster = config, device, cluster

    def __reduce__(self) -> Any:
        # In a task: the cluster is the one that it runs on.
        return ChainHeads, (self.config, self.device)

    @contextmanager
    def lend(self, model: ModelSpec, cut: int) -> Iterator[Slice | Chain]:
        """As above. Raises ConfigError where the cluster has no room."""
        from ray.exceptions import RayError

        slices = self.config.finetune.chain
        assert slices is not None, "heads are divided where the configuration says so"
        cluster = self.cluster or Cluster(self.config)
        cluster.connect()
        folder = Store(self.config.storage).root
        with explained("evaluate", folder):
            plan = plan_chains(cluster, "finetune", model, slices, None, 1, self.device, first=cut)
            try:
                with head_over(plan, model, self.config, name="evaluate", folder=folder) as head:
                    yield head
            except RayError as error:
                if not died(error):
                    raise
                raise WorkerError(
                    f"evaluate: a worker with a slice of the head died, most likely for memory ({explain(error, 'evaluate', folder)}). "
                    "Take more slices (finetune.chain) or a smaller extraction.batch_tokens; the same command goes on where this ended"
                ) from None


def _wired(value: Any) -> Any:
    """A value as it travels: tensors as bytes."""
    if isinstance(value, Tensor):
        return Flat.of(value)
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(map(_wired, value))
    return value


def _received(value: Any) -> Any:
    """What has travelled, as it was."""
    if isinstance(value, Flat):
        return value.tensor()
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(map(_received, value))
    return value
