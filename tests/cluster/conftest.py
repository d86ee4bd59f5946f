"""One Ray cluster and one tiny world for the tests of this folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from roma_ray.cluster.ray_cluster import Cluster, open_cluster
from roma_ray.config.schema import Config
from roma_ray.engine.progress import Silence
from roma_ray.engine.setup import Setup, resolve
from roma_ray.runs.pipeline import Run, run
from tests.world import make_world

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def temporary() -> Iterator[Path]:
    """A folder with a short name: the paths of Ray's sockets lie under it and must stay short."""
    folder = Path(tempfile.mkdtemp(prefix="rr-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def environment(temporary: Path) -> dict[str, str]:
    """What processes of these tests run with: Ray's files in the temporary folder, no cluster in sight, no hub."""
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {
        "RAY_TMPDIR": str(temporary),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
    }
    dropped = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "ROMA_RAY_STORAGE")
    return {name: value for name, value in os.environ.items() if name not in dropped} | settings


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Three micro-batches a step, so that three workers have work, and last steps with fewer."""
    return make_world(
        tmp_path_factory.mktemp("world"),
        extraction={"batch_tokens": 256},
        finetune={"epochs": 2, "batch_size": 8, "micro_batch_size": 3, "learning_rate": 0.01, "checkpoint_steps": 2},
    )


@pytest.fixture(scope="session")
def local_run(world: Config) -> Run:
    """The same world run in this process: what every other way of running must equal."""
    return run(resolve(world, device="cpu"), Silence())


@pytest.fixture(scope="session")
def setup(local_run: Run) -> Setup:
    return local_run.setup


@pytest.fixture(scope="session")
def cluster(world: Config, environment: dict[str, str]) -> Iterator[Cluster]:
    """A cluster that this process starts, with three training workers."""
    names = ("RAY_TMPDIR", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "PYTHONPATH")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            patch.delenv(name, raising=False)
        for name in names:
            patch.setenv(name, environment[name])
        # Where Ray would leave a token.
        patch.setenv("HOME", environment["RAY_TMPDIR"])
        settings = world.ray.model_copy(update={"extract_workers": 2, "evaluate_workers": 2, "finetune_workers": 3})
        with open_cluster(world.model_copy(update={"ray": settings}), "new") as opened:
            opened.connect()
            yield opened
