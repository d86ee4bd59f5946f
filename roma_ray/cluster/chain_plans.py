"""How a model is divided among the workers of a chain, what each of them needs of its node, and how many chains there is room for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from roma_ray.cluster.failures import explained
from roma_ray.cluster.placement import Need, chains, inventory, need_of, room
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.engine.chain import balanced, layer_parameters
from roma_ray.engine.model_spec import ModelSpec
from roma_ray.errors import ConfigError
from roma_ray.store.artifacts import Store

_GIB = 2**30
# What a worker on a CPU takes beside its weights: its libraries, and a batch's activations.
_PROCESS_GIB = 1.0
_SPARE = 1.15
# Of a GPU's memory, at most so much for weights: activations and the allocator's own take the rest.
_OF_A_GPU = 0.7
# Which setting asks for the chains of a stage.
_SETTINGS = {"extract": "extraction.chain", "finetune": "finetune.chain"}


@dataclass(frozen=True)
class ChainPlan:
    """A model's slices, each on a worker of its own, and how many such chains work side by side."""

    ranges: tuple[tuple[int, int], ...]
    """Layers [start, stop) of each slice."""
    weights: tuple[int, ...]
    """Bytes of each slice's weights."""
    needs: tuple[Need, ...]
    copies: int

    @property
    def workers(self) -> int:
        """Of all chains."""
        return self.copies * len(self.ranges)

    def __str__(self) -> str:
        shown = ", ".join(
            f"{start}-{stop - 1} ({size / 1e9:.2f} GB)"
            for (start, stop), size in zip(self.ranges, self.weights, strict=True)
        )
        return f"{self.copies} chain(s) of {len(self.ranges)} slices, layers {shown}"


def plan_chains(
    cluster: Cluster,
    stage: str,
    model: ModelSpec,
    slices: int | Literal["auto"],
    limit_gb: float | None,
    at_most: int,
    device: str,
    *,
    first: int = 0,
) -> ChainPlan:
    """The chains that a stage gets, at most `at_most` of them: what a cluster of this size can hold of a model of that size.

    `limit_gb`: most weights of a slice; `first`: the first layer that they hold. Raises ConfigError, with what the cluster has, where
    there is no room.
    """
    # Kept workers hold the places that the chain's need, and would until they are ended.
    cluster.pool.release()
    sizes = [count * getattr(torch, model.dtype).itemsize for count in layer_parameters(model)[first:]]
    setting = _SETTINGS[stage]
    need = need_of(stage, cluster.config.ray, device)
    wanted = getattr(cluster.config.ray, f"{stage}_workers")
    if slices != "auto":
        # On a cluster that scales: the number is named, as that of other stages' workers.
        asked = max(1, min((wanted or slices) // slices, at_most))
        cluster.await_room(_of_slice(need, -(-sum(sizes) // slices)), asked * slices)
    need = cluster.of_one_kind(stage, need)
    if slices == "auto":
        most = _weights_of_a_worker(cluster, stage, need)
        plan = _fewest(cluster, sizes, need, most, limit_gb, setting)
        cluster.say(f"{setting}=auto: {len(plan.ranges)} slices{_why(most, limit_gb)}")
    else:
        plan = _divided(cluster, sizes, need, slices, limit_gb, setting)
    plan = replace(plan, ranges=tuple((start + first, stop + first) for start, stop in plan.ranges))
    if wanted is None:
        cores = max(1, cluster.cores() // cluster.config.threads // len(plan.ranges))
        return replace(plan, copies=min(at_most, plan.copies if need.gpus else min(plan.copies, cores)))
    copies = wanted // len(plan.ranges)
    if not 1 <= copies <= plan.copies:
        raise ConfigError(
            f"ray.{stage}_workers: {wanted} workers make {copies} chain(s) of {len(plan.ranges)} slices, and the cluster has room for "
            f"{plan.copies}, a worker of {max(plan.needs, key=lambda n: n.memory_gib or 0.0)}. It has: {inventory(cluster.nodes())}. Set "
            f"ray.{stage}_workers to a multiple of {len(plan.ranges)} that fits, or leave it out"
        )
    return replace(plan, copies=min(copies, at_most))


def _divided(
    cluster: Cluster, sizes: Sequence[int], need: Need, slices: int, limit_gb: float | None, setting: str
) -> ChainPlan:
    """The chain of so many slices. Raises ConfigError where it cannot be, or has no room."""
    if slices > len(sizes):
        raise ConfigError(
            f"{setting}: {slices} slices, and there are {len(sizes)} layers to divide: a slice holds one at least"
        )
    plan = _chain_of(cluster, sizes, need, slices)
    largest = max(plan.weights)
    if limit_gb is not None and largest > limit_gb * 1e9:
        raise ConfigError(
            f"{setting}: of {slices} slices the largest holds {largest / 1e9:.2f} GB of weights, more than "
            f"extraction.memory_gb={limit_gb:g}. Take more slices, chain=auto, or leave memory_gb out"
        )
    if not need.gpus and need.memory_gib is not None and largest > need.memory_gib * _GIB:
        raise ConfigError(
            f"{setting}: of {slices} slices the largest holds {largest / _GIB:.2f} GiB of weights, more than "
            f"the {need.memory_gib:g} GiB that ray sets aside for a worker (memory_gib of its stage). Take more slices, or raise it"
        )
    if not plan.copies:
        raise _no_room(cluster, plan, setting)
    return plan


def _fewest(
    cluster: Cluster, sizes: Sequence[int], need: Need, most: float | None, limit_gb: float | None, setting: str
) -> ChainPlan:
    """The chain of as few slices as fit. Raises ConfigError where no number does."""
    bounds = [bound for bound in (most, None if limit_gb is None else limit_gb * 1e9) if bound is not None]
    plan = None
    for slices in range(1, len(sizes) + 1):
        candidate = _chain_of(cluster, sizes, need, slices)
        if all(max(candidate.weights) <= bound for bound in bounds):
            plan = candidate
            if plan.copies:
                return plan
    if plan is None:
        raise ConfigError(
            f"{setting}=auto: the largest layer has {max(sizes) / 1e9:.2f} GB of weights, and a worker may hold "
            f"{min(bounds) / 1e9:.2f} GB{_why(most, limit_gb)}. Use workers with more memory, or raise what bounds it"
        )
    raise _no_room(cluster, plan, setting)


def _chain_of(cluster: Cluster, sizes: Sequence[int], need: Need, slices: int) -> ChainPlan:
    """So many slices, and as many chains of them as there is room for: maybe none."""
    ranges = tuple(balanced(sizes, slices))
    weights = tuple(sum(sizes[start:stop]) for start, stop in ranges)
    needs = tuple(_of_slice(need, size) for size in weights)
    return ChainPlan(ranges, weights, needs, chains(cluster.nodes(), needs))


def _of_slice(need: Need, weights: int) -> Need:
    """What the worker with a slice needs: on a CPU memory too, so that not all slices come to lie on one node that cannot hold them."""
    if need.gpus or need.memory_gib is not None:
        return need
    return replace(need, memory_gib=round(_PROCESS_GIB + _SPARE * weights / _GIB, 3))


def _weights_of_a_worker(cluster: Cluster, stage: str, need: Need) -> float | None:
    """Bytes of weights that a worker can hold; None where the nodes' memory alone says so."""
    if need.gpus:
        return _OF_A_GPU * min(1.0, need.gpus) * gpu_bytes(cluster, stage, need)
    if need.memory_gib is None:
        return None
    return max(0.0, need.memory_gib - _PROCESS_GIB) * _GIB / _SPARE


def _why(most: float | None, limit_gb: float | None) -> str:
    """What bounded the slices, in words."""
    parts = [] if most is None else [f"a worker's memory holds {most / 1e9:.2f} GB of weights"]
    parts += [] if limit_gb is None else [f"extraction.memory_gb is {limit_gb:g}"]
    return f" ({'; '.join(parts)})" if parts else ""


def _no_room(cluster: Cluster, plan: ChainPlan, setting: str) -> ConfigError:
    largest = max(plan.needs, key=lambda need: need.memory_gib or 0.0)
    streamed = (
        ", or stream the model instead (extraction.memory_gb without chain)" if setting == _SETTINGS["extract"] else ""
    )
    return ConfigError(
        f"{setting}: the cluster has no room for a chain of {len(plan.ranges)} workers, the largest of {largest}. It has: "
        f"{inventory(cluster.nodes())}. Take more slices, add nodes (ray.wait_seconds where the cluster starts them itself, with a "
        f"number of slices){streamed}"
    )


def gpu_bytes(cluster: Cluster, stage: str, need: Need) -> int:
    """The memory of a GPU as a worker of this need finds it."""
    import ray

    if room(cluster.nodes(), need) < 2 and ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        # Of a task that has the only one: it would wait for itself.
        return _gpu_bytes()
    options = {key: value for key, value in need.options().items() if value is not None}
    with explained(stage, Store(cluster.config.storage).root):
        found: int = ray.get(ray.remote(**options)(_gpu_bytes).remote())
    return found


def _gpu_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).total_memory)
