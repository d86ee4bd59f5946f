"""Which nodes a stage's workers get, counted; on real (simulated) nodes in test_nodes.py."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roma_ray.cluster import chain_plans as chains_module
from roma_ray.cluster import ray_cluster as module
from roma_ray.cluster.chain_plans import ChainPlan, plan_chains
from roma_ray.cluster.placement import Need, Node, chains, inventory, main_kind, matches, need_of, room
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.cluster.ray_runners import _elsewhere
from roma_ray.cluster.worker_pool import Worker
from roma_ray.config.ray_settings import PlacementConfig
from roma_ray.config.schema import Config
from roma_ray.engine.devices import device_kind, mixed_devices
from roma_ray.engine.setup import resolve
from roma_ray.errors import ConfigError

GIB = 2**30
A100 = Node({"CPU": 16, "GPU": 2, "memory": 64 * GIB, "accelerator_type:A100": 1}, {"gpu-vendor": "nvidia"})
MI300X = Node(
    {"CPU": 16, "GPU": 8, "memory": 64 * GIB, "accelerator_type:AMD-Instinct-MI300X-OAM": 1}, {"gpu-vendor": "amd"}
)
PLAIN = Node({"CPU": 8, "memory": 32 * GIB})
MIXED = [A100, A100, MI300X, PLAIN]


class Mixed(Cluster):
    """A cluster of given nodes."""

    def __init__(self, config: Config, nodes: list[Node]) -> None:
        self.config, self.found, self._started, self.address = config, nodes, False, None
        self.said: list[str] = []
        self.say = self.said.append

    def nodes(self) -> list[Node]:
        return self.found

    def resource(self, name: str) -> float:
        return sum(node.resources.get(name, 0.0) for node in self.found)


def with_ray(world: Config, **settings: object) -> Config:
    return world.model_copy(update={"device": "cuda", "ray": world.ray.model_copy(update=settings)})


def test_room_is_counted_node_by_node() -> None:
    """Two nodes with half a worker's room each hold none; every resource counts."""
    assert room(MIXED, Need(0.5, 1)) == 12
    assert room(MIXED, Need(8, 0.5)) == 6
    assert room([Node({"CPU": 1}), Node({"CPU": 1})], Need(1.5)) == 0
    assert room(MIXED, Need(1, memory_gib=30)) == 7
    assert room(MIXED, Need(1, 1, accelerator="A100")) == 4
    assert room(MIXED, Need(1, labels={"gpu-vendor": "amd"})) == 16
    assert room(MIXED, Need(1, 1, accelerator="H100")) == 0
    assert room([Node({"CPU": 1, "GPU": 1})], Need(0.1, 0.1)) == 10


@given(st.floats(0.01, 4), st.just(0.0) | st.floats(0.01, 2), st.integers(1, 5))
def test_what_has_room_can_be_packed(cpus: float, gpus: float, copies: int) -> None:
    """Workers counted on a node never need more than it has."""
    fit = room([A100] * copies, Need(cpus, gpus)) / copies
    assert fit * cpus <= A100.resources["CPU"] * (1 + 1e-6)
    assert fit * gpus <= A100.resources["GPU"] * (1 + 1e-6)
    assert fit == int(fit)


@pytest.mark.parametrize(
    ("value", "wanted", "fits"),
    [
        ("amd", "amd", True),
        ("amd", "nvidia", False),
        (None, "amd", False),
        ("amd", "!amd", False),
        (None, "!amd", True),
        ("b", "in(a, b)", True),
        ("c", "in(a,b)", False),
        ("c", "!in(a,b)", True),
        (None, "in(a,b)", False),
    ],
)
def test_labels_match_as_in_ray(value: str | None, wanted: str, fits: bool) -> None:
    assert matches(value, wanted) == fits


def test_extraction_takes_any_gpu_and_finetuning_one_kind(world: Config) -> None:
    """On a mixed cluster: all GPUs for extraction, the kind with the most room for training, said aloud."""
    cluster = Mixed(with_ray(world), MIXED)
    workers, need = cluster.place("extract", None, 100, "cuda")
    assert (workers, need.accelerator) == (12, None)
    workers, need = cluster.place("finetune", None, 100, "cuda")
    assert (workers, need.accelerator) == (8, "AMD-Instinct-MI300X-OAM")
    assert need.resources()["accelerator_type:AMD-Instinct-MI300X-OAM"] == 0.001
    assert "AMD-Instinct-MI300X-OAM, of A100" in cluster.said[-1]
    named = Mixed(with_ray(world, finetune=PlacementConfig(accelerator="A100")), MIXED)
    assert named.place("finetune", None, 100, "cuda")[0] == 4
    # Alike GPUs need no name, and a CPU run asks for no GPU's kind.
    assert main_kind([A100, A100, PLAIN], Need(1, 1)) == (None, ["A100"])
    assert need_of("finetune", named.config.ray, "cpu").accelerator is None
    # NCCL wants a whole GPU for each worker.
    assert need_of("finetune", with_ray(world, gpus_per_worker=0.25).ray, "cuda").gpus == 1


def test_what_cannot_be_had_fails_at_once_with_what_there_is(world: Config) -> None:
    """Each kind of need, with the cluster's inventory in the message."""
    for placement in (
        PlacementConfig(accelerator="H100"),
        PlacementConfig(labels={"pool": "fast"}),
        PlacementConfig(memory_gib=500),
    ):
        with pytest.raises(ConfigError) as caught:
            Mixed(with_ray(world, extract=placement), MIXED).place("extract", None, 9, "cuda")
        text = str(caught.value)
        assert "2 x (16 CPU, 2 GPU A100, 64 GiB, gpu-vendor=nvidia)" in text
        assert "1 x (16 CPU, 8 GPU AMD-Instinct-MI300X-OAM, 64 GiB, gpu-vendor=amd)" in text
        assert "1 x (8 CPU, 32 GiB)" in text
        assert "room for 0 workers" in text
    assert inventory([]) == "no live node"
    assert "of unknown kind" in inventory([Node({"GPU": 1})])


def test_nodes_are_waited_for_where_the_cluster_scales(world: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request goes to the autoscaler and is taken back; with nodes that never come the error says so."""
    asked: list[dict[str, object]] = []
    cluster = Mixed(with_ray(world, wait_seconds=60, extract=PlacementConfig(labels={"gpu-vendor": "amd"})), [PLAIN])

    def request(**arguments: object) -> None:
        asked.append(arguments)
        cluster.found = [PLAIN, MI300X]

    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", request)
    monkeypatch.setattr(module, "_NODES_POLL_SECONDS", 0.0)
    assert cluster.place("extract", 3, 100, "cuda")[0] == 3
    assert asked == [
        {"bundles": [{"CPU": 0.5, "GPU": 1.0}] * 3, "bundle_label_selectors": [{"gpu-vendor": "amd"}] * 3},
        {"bundles": []},
    ]
    cluster.place("extract", 3, 100, "cuda")
    assert len(asked) == 2
    times = iter([0.0, 0.0, 61.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    with pytest.raises(ConfigError, match="room for 8 workers"):
        cluster.place("extract", 9, 100, "cuda")


def test_devices_have_a_kind_and_mixtures_a_warning() -> None:
    assert device_kind("cpu").split()[0] in ("x86_64", "aarch64", "arm64")
    assert mixed_devices("extract", ["NVIDIA H100"]) is None
    assert "NVIDIA A100 and NVIDIA H100" in (mixed_devices("extract", ["NVIDIA A100", "NVIDIA H100"]) or "")


def planned(cluster: Cluster, world: Config, slices: Any, device: str = "cpu", **limits: Any) -> ChainPlan:
    """The plan for the world's tiny model, as its extraction would have it."""
    spec = resolve(world, device="cpu").model
    return plan_chains(cluster, "extract", spec, slices, limits.get("limit_gb"), limits.get("at_most", 99), device)


def test_a_chain_is_placed_as_a_whole_wherever_each_worker_has_room() -> None:
    """Against one node's room, and over nodes that each hold a part; half a chain is none."""
    small, large = Need(1, memory_gib=10), Need(1, memory_gib=40)
    assert chains([PLAIN], [small] * 2) == 1
    assert chains([PLAIN], [small] * 4) == 0
    assert chains([PLAIN, PLAIN], [small] * 4) == 1
    # The large one takes the only place that it has, whatever comes first in the chain.
    assert chains([A100, PLAIN], [small, small, small, large]) == 1
    assert chains(MIXED, [Need(1, 1)] * 4) == 3
    assert chains(MIXED, [Need(1, 1, accelerator="A100")] * 4) == 1
    assert chains(MIXED, [Need(1, labels={"gpu-vendor": "amd"})] * 3) == 5
    assert chains([], [small]) == 0


def test_a_models_slices_are_counted_with_their_memory(world: Config) -> None:
    """Each worker asks for its weights and its process; workers, batches and cores bound the chains."""
    nodes = [Node({"CPU": 8, "memory": 4.1 * GIB})] * 2
    cluster = Mixed(world, nodes)
    plan = planned(cluster, world, 3)
    assert [start for start, _ in plan.ranges[1:]] == [stop for _, stop in plan.ranges[:-1]]
    assert sum(plan.weights) == resolve(world, device="cpu").model.weight_bytes()
    assert all(need.memory_gib is not None and 1.0 <= need.memory_gib < 1.1 for need in plan.needs)
    assert (plan.copies, plan.workers) == (2, 6)
    assert planned(cluster, world, 3, at_most=1).copies == 1
    assert planned(Mixed(with_ray(world, extract_workers=5), nodes), world, 3).copies == 1
    assert planned(Mixed(with_ray(world, cpus_per_worker=4), nodes), world, 2).copies == 2
    assert planned(Mixed(world, [Node({"CPU": 3, "memory": 64 * GIB})]), world, 2).copies == 1
    assert "layers 0-" in str(plan)


@pytest.mark.parametrize(
    ("ray", "nodes", "slices", "limit", "text"),
    [
        ({}, [PLAIN], 7, None, "7 slices, and there are 6 layers to divide"),
        ({}, [Node({"CPU": 1})], 2, None, "no room for a chain of 2 workers.*It has: 1 x .1 CPU, 0 GiB"),
        ({}, [Node({"CPU": 1})], "auto", None, "no room for a chain of 6 workers"),
        ({}, [PLAIN], 2, 1e-5, "more than extraction.memory_gb=1e-05"),
        ({}, [PLAIN], "auto", 1e-5, "largest layer has .*extraction.memory_gb is 1e-05"),
        (
            {"extract": PlacementConfig(memory_gib=1e-6)},
            [PLAIN],
            2,
            None,
            "the 1e-06 GiB that ray sets aside for a worker",
        ),
        ({"extract": PlacementConfig(memory_gib=0.9)}, [PLAIN], "auto", None, "a worker's memory holds 0.00 GB"),
        ({"extract_workers": 1}, [PLAIN], 2, None, "1 workers make 0 chain.s. of 2 slices"),
        ({"extract_workers": 8, "cpus_per_worker": 2}, [PLAIN], 2, None, "make 4 chain.*has room for 2"),
        ({"extract": PlacementConfig(labels={"pool": "fast"})}, [PLAIN], 2, None, "label pool=fast"),
    ],
)
def test_a_chain_that_cannot_be_had_fails_at_once(
    ray: dict[str, Any], nodes: list[Node], slices: Any, limit: float | None, text: str, world: Config
) -> None:
    with pytest.raises(ConfigError, match=text):
        planned(Mixed(with_ray(world, **ray), nodes), world, slices, limit_gb=limit)


def test_a_chain_gets_the_places_of_kept_workers(world: Config) -> None:
    ended: list[str] = []

    class Kept(Worker):
        def end(self) -> None:
            ended.append(self.actor)

    cluster = Mixed(world, [PLAIN])
    cluster.pool.keep([Kept(Need(1), 1, actor="of an earlier stage")])
    planned(cluster, world, 2)
    assert ended == ["of an earlier stage"]
    assert len(cluster.pool) == 0


def test_nodes_for_all_chains_are_waited_for(world: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many chains as are named, and as have batches; else one."""
    awaited: list[int] = []
    monkeypatch.setattr(Mixed, "await_room", lambda self, need, workers: awaited.append(workers))
    for workers, at_most in ((4, 100), (5, 100), (4, 1), (None, 100)):
        planned(Mixed(with_ray(world, extract_workers=workers), [PLAIN]), world, 2, at_most=at_most)
    planned(Mixed(world, [PLAIN]), world, "auto")
    assert awaited == [4, 4, 2, 2]


def test_a_task_with_the_only_gpu_asks_for_no_other(world: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of another GPU would wait for the one that asks."""
    import ray

    class Task:
        def get_accelerator_ids(self) -> dict[str, list[str]]:
            return {"GPU": ["0"]}

    monkeypatch.setattr(ray, "get_runtime_context", Task)
    monkeypatch.setattr(chains_module, "_gpu_bytes", lambda: 7)
    alone = Mixed(with_ray(world), [Node({"CPU": 4, "GPU": 1})])
    assert chains_module.gpu_bytes(alone, "finetune", Need(0.5, 1.0)) == 7


@pytest.mark.parametrize(("chain", "tries"), [(2, 0), (None, None)])
def test_a_task_that_lends_a_chain_is_tried_once(
    world: Config, monkeypatch: pytest.MonkeyPatch, chain: int | None, tries: int | None
) -> None:
    """The places of a dead task's chain stay with the driver's job: a second try would wait for them."""
    finetune = world.finetune.model_copy(update={"chain": chain})
    cluster = Mixed(with_ray(world).model_copy(update={"finetune": finetune}), [Node({"CPU": 4, "GPU": 1})])
    monkeypatch.setattr(cluster, "connect", lambda: None)
    options = _elsewhere(cluster, "cuda")
    assert options is not None
    assert (options.get("max_retries"), options["num_gpus"]) == (tries, 1.0)
    assert _elsewhere(cluster, "cpu") is None


def test_auto_takes_as_few_slices_as_hold_the_model(world: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the limit, by what Ray sets aside, by the nodes' memory; on GPUs by theirs, of one kind."""
    weights = resolve(world, device="cpu").model.weight_bytes()
    assert len(planned(Mixed(world, [PLAIN]), world, "auto").ranges) == 1
    limited = planned(Mixed(world, [PLAIN]), world, "auto", limit_gb=0.6 * weights / 1e9)
    assert len(limited.ranges) == 2
    assert max(limited.weights) <= 0.6 * weights
    # The process takes a GiB; of what is left a slice's weights take all but a margin.
    aside = PlacementConfig(memory_gib=1 + 0.7 * weights / GIB)
    assert len(planned(Mixed(with_ray(world, extract=aside), [PLAIN]), world, "auto").ranges) == 2
    asked: list[Need] = []

    def gpu_of(cluster: Cluster, stage: str, need: Need) -> int:
        asked.append(need)
        return int(weights)

    monkeypatch.setattr(chains_module, "gpu_bytes", gpu_of)
    cluster = Mixed(with_ray(world), MIXED)
    plan = planned(cluster, world, "auto", "cuda")
    assert (len(plan.ranges), plan.copies) == (2, 4)
    assert asked[0].accelerator == "AMD-Instinct-MI300X-OAM"
    assert {need.accelerator for need in plan.needs} == {"AMD-Instinct-MI300X-OAM"}
    assert any("extract: on AMD-Instinct-MI300X-OAM" in line for line in cluster.said)
    # Workers that share a GPU share its memory.
    shared = planned(Mixed(with_ray(world, gpus_per_worker=0.5), MIXED), world, "auto", "cuda")
    assert len(shared.ranges) >= 3
    assert shared.needs[0].gpus == 0.5

    # Six layers of a GiB on nodes that hold a process and two of them each, with their margin.
    monkeypatch.setattr(chains_module, "layer_parameters", lambda model: [GIB // 4] * 6)
    third = Node({"CPU": 8, "memory": 4.1 * GIB})
    assert planned(Mixed(world, [third] * 3), world, "auto").ranges == ((0, 2), (2, 4), (4, 6))
    with pytest.raises(ConfigError, match=r"no room for a chain of 6 workers, the largest of .* 2\.15 GiB of memory"):
        planned(Mixed(world, [third] * 2), world, "auto")
