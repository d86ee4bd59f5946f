"""Finding a cluster, counting its workers, and saying what is wrong with it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path

import psutil
import pytest
import ray

from roma_ray.cluster import ray_cluster as module
from roma_ray.cluster.environment import forwarded
from roma_ray.cluster.placement import Need, Node
from roma_ray.cluster.ray_cluster import Cluster, find_address, open_cluster
from roma_ray.cluster.worker_pool import Worker, WorkerPool
from roma_ray.config.schema import Config
from roma_ray.doctor.nodes import examine_cluster
from roma_ray.errors import ConfigError, ModelError, WorkerError
from tests.cluster.support import listening, loopback


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No cluster in the environment; the folder where `ray start` would leave an address."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


def test_where_the_address_comes_from(shell: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option wins over $RAY_ADDRESS, that over a cluster on this machine; one that is gone does not count."""
    assert find_address(None) is None
    with pytest.raises(WorkerError, match="no Ray cluster runs"):
        find_address("auto")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        alive = f"127.0.0.1:{listener.getsockname()[1]}"
        shell.write_text(alive)
        assert find_address(None) == alive
        assert find_address("auto") == alive
        assert find_address("local") is None
    assert find_address(None) is None
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert find_address(None) == find_address("auto") == "head:6379"
    assert find_address("other:1") == "other:1"
    assert find_address("local") is None
    for wrong in ("http://head:8265", "ray://head:10001"):
        with pytest.raises(ConfigError, match="host:6379"):
            find_address(wrong)


class Sized(Cluster):
    """A cluster of given resources."""

    def __init__(self, config: Config, **resources: float) -> None:
        self.config, self.resources, self._started, self.address = config, resources, False, None

    @property
    def connected(self) -> bool:
        return True

    def resource(self, name: str) -> float:
        return self.resources.get(name, 0.0)

    def nodes(self) -> list[Node]:
        return [Node(self.resources)]

    def workers(self, stage: str, wanted: int | None, at_most: int, device: str) -> int:
        return self.place(stage, wanted, at_most, device)[0]


def test_number_of_workers(world: Config) -> None:
    """One a GPU, or the CPUs by threads; never more than have work; too many asked for is an error that says what to lower."""
    assert Sized(world, CPU=8).workers("extract", None, 100, "cpu") == 8
    assert Sized(world, CPU=8).workers("extract", None, 3, "cpu") == 3
    threads = world.model_copy(update={"threads": 4})
    assert Sized(threads, CPU=8).workers("extract", None, 100, "cpu") == 2
    assert Sized(world, CPU=8, GPU=2).workers("extract", None, 100, "cuda") == 2
    assert Sized(world, CPU=0.5, GPU=2).workers("extract", None, 100, "cuda") == 1
    shared = world.model_copy(update={"ray": world.ray.model_copy(update={"gpus_per_worker": 0.25})})
    assert Sized(shared, CPU=8, GPU=2).workers("extract", None, 100, "cuda") == 8
    assert Sized(world, CPU=8).workers("finetune", 2, 100, "cpu") == 2
    with pytest.raises(ConfigError, match=r"ray\.embed_workers.*room\s+for 2 workers"):
        Sized(world, CPU=1).workers("embed", 3, 100, "cpu")


def test_device_of_a_cluster(world: Config) -> None:
    """GPUs are used where there are any, unless the configuration refuses them; asking for absent ones is an error."""
    auto = world.model_copy(update={"device": "auto"})
    wanted = world.model_copy(update={"device": "cuda"})
    assert Sized(auto, CPU=1, GPU=1).device() == "cuda"
    assert Sized(auto, CPU=1).device() == "cpu"
    assert Sized(world, CPU=1, GPU=1).device() == "cpu"
    assert Sized(wanted, CPU=1, GPU=1).device() == "cuda"
    with pytest.raises(ModelError, match="no node of the Ray cluster has a GPU"):
        Sized(wanted, CPU=1).device()


def test_a_token_that_is_known_is_sent(shell: Path, world: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without RAY_AUTH_MODE Ray would send no token, and the connection would just fail."""
    seen: list[str | None] = []
    monkeypatch.setattr(module.Cluster, "connected", property(lambda self: False))
    monkeypatch.setattr(module.Cluster, "_attach", lambda self, address: seen.append(os.environ.get("RAY_AUTH_MODE")))
    Cluster(world, "head:6379")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    Cluster(world, "head:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    Cluster(world, "head:6379")
    assert seen == [None, "token", "disabled"]


def test_workers_end_with_a_run_in_anothers_connection(cluster: Cluster, world: Config) -> None:
    """A notebook that is connected already keeps its connection, and no worker of the run with its model."""
    with open_cluster(world) as lent:
        (worker,) = lent.pool.lend(Need(0.5), 1, 1)
        assert ray.get(worker.actor.up.remote()) is None
        lent.pool.keep([worker])
    assert ray.is_initialized()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(worker.actor.up.remote())


def test_what_a_run_left_idle_serves_the_next_or_cedes_its_place(cluster: Cluster) -> None:
    """A worker of another run that goes on is left alone."""
    first, second, third = WorkerPool(600), WorkerPool(600), WorkerPool(600)

    def process(worker: Worker) -> int:
        found: int = ray.get(worker.actor.__ray_call__.remote(lambda self: os.getpid()))
        return found

    one, other = first.lend(Need(0.5), 2, 1)
    left, kept = process(one), process(other)
    first.keep([one])
    first.close()
    (claimed,) = second.lend(Need(0.5), 1, 1)
    assert process(claimed) == left
    second.keep([claimed])
    second.close()
    third.release()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(claimed.actor.up.remote())
    assert process(other) == kept
    other.end()


def test_its_own_cluster_leaves_no_token(cluster: Cluster, temporary: Path) -> None:
    """A cluster of our own is closed to others, and does not turn authentication on for the next `ray start`."""
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert not (temporary / ".ray" / "auth_token").exists()
    assert not (temporary / "ray" / "ray_current_cluster").exists()
    assert "its own cluster on this machine" in cluster.describe()


def test_its_own_cluster_is_out_of_the_networks_reach(cluster: Cluster) -> None:
    """Every process of the cluster, workers and the agents' metrics included, listens on this machine's loopback alone."""
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    here = psutil.Process()
    heard: dict[int, list[str]] = {}
    for process in (here, *here.children(recursive=True)):
        # An idle worker may end meanwhile.
        with contextlib.suppress(psutil.NoSuchProcess):
            heard[process.pid] = listening(process)
    assert sum(map(len, heard.values())) > 5
    assert all(loopback(address) for addresses in heard.values() for address in addresses), heard


def test_workers_share_what_their_memory_needs(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heaps a worker, on a cluster of our own; an existing one's workers get the driver's settings, and a job's own win."""
    assert ray.get(ray.remote(lambda: os.environ["MALLOC_ARENA_MAX"]).remote()) == "2"
    monkeypatch.setenv("HF_HOME", "/somewhere")
    assert {"MALLOC_ARENA_MAX": "2", "HF_HOME": "/somewhere"}.items() <= forwarded().items()
    job = {"runtime_env": {"working_dir": "gcs://x.zip", "env_vars": {"HF_HOME": "/elsewhere"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert forwarded()["MALLOC_ARENA_MAX"] == "2"
    assert "HF_HOME" not in forwarded()


def test_doctor_asks_every_node(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node runs a task that reads and writes the storage; nothing is left there."""
    monkeypatch.setenv("RAY_ADDRESS", "local:1")
    monkeypatch.setattr(module.Cluster, "close", lambda self: None)
    checks = list(examine_cluster(None, str(tmp_path / "storage")))
    assert [c.state for c in checks] == ["ok"] * len(checks)
    assert any("reads and writes" in c.detail for c in checks)
    assert list((tmp_path / "storage").iterdir()) == []


def test_doctor_names_the_authentication_trap(shell: Path, tmp_path: Path) -> None:
    """A token file turns authentication on for `ray start`, but not for `ray job submit`."""
    checks = list(examine_cluster(None, str(tmp_path)))
    assert [c.state for c in checks] == ["ok", "ok"]
    (shell.parents[1] / ".ray").mkdir()
    (shell.parents[1] / ".ray" / "auth_token").write_text("secret")
    assert next(examine_cluster(None, str(tmp_path))).state == "note"
