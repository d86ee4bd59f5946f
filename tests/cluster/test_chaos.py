"""A short selection of `make chaos`, on the cluster of these tests; other files here kill workers, nodes and drivers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.config.schema import Config
from roma_ray.runs.pipeline import Run
from tests.chaos.scene import Scene
from tests.chaos.simulated import Nodes
from tests.chaos.storage import artifacts_damaged, may_mount, storage_full


class Connected(Scene):
    """A scene whose drivers are this process, which saves them their imports."""

    def command(self, storage: Path, until: str) -> tuple[int, str]:
        """As `Scene.command`."""
        return self.here(storage, until, "--address", self.nodes.address)


@pytest.fixture
def scene(cluster: Cluster, world: Config, local_run: Run, environment: dict[str, str], tmp_path: Path) -> Scene:
    """The tests' cluster and world, for drivers with one worker."""
    running = SimpleNamespace(address=ray.get_runtime_context().gcs_address)
    config = world.model_copy(update={"ray": world.ray.model_copy(update={"extract_workers": 1})})
    return Connected(Nodes(running, environment), config, local_run, tmp_path)


def test_damaged_artifacts(scene: Scene) -> None:
    """Every stage's largest file and manifest with one bit changed: refused by name; recomputed once they are gone."""
    artifacts_damaged("corrupted", scene)


def test_a_full_storage(scene: Scene, tmp_path: Path) -> None:
    """The disk fills up in extraction; with room again the same command goes on."""
    if not may_mount(tmp_path):
        pytest.skip("only root, where the system lets it, can mount a small disk")
    storage_full(scene)
