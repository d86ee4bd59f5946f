"""What every test starts from: no hub, no telemetry, one thread, a storage of its own, property tests that repeat."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from roma_ray.runs.pipeline import Run
    from tests.bucket import Proxy

# Before any library reads them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MLFLOW_DISABLE_TELEMETRY="true",
    RAY_USAGE_STATS_ENABLED="0",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The first example of a test pays for its imports, so a deadline says more about the machine than about the code.
settings.register_profile("roma", deadline=None, derandomize=True)
settings.load_profile("roma")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For parallel runs: a file's tests stay together, and so do all of a folder that share what takes long to make.

    xdist's own groups are marks that it writes into the ids of tests; pytest 9.2 no longer takes them from there.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((folder for folder in ("tests/cluster", "tests/tracking") if file.startswith(folder)), file)

    # In the order of their names: the longest folder begins early.
    config.option.loadscopereorder = False
    return Together(config, log)


@pytest.fixture(autouse=True)
def _own_storage(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test, and no command that it starts, may reach the user's own storage, cluster or tracking server."""
    folder = tmp_path_factory.getbasetemp() / "default-storage"
    monkeypatch.setenv("ROMA_RAY_STORAGE", str(folder))
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture(scope="session")
def letter_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One finished tiny run, shared by the tests that only read it."""
    return _finished(tmp_path_factory.mktemp("letter"))


@pytest.fixture(scope="session")
def cloze_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same of choices that are scored as continuations."""
    root = tmp_path_factory.mktemp("cloze")
    questions = {"sources": [{"path": str(root / "questions.jsonl")}], "prompt": {"format": "cloze"}}
    return _finished(root, questions=questions, finetune={"task_loss": "vocabulary"})


def _finished(root: Path, **sections: Any) -> Run:
    # Heavy, and not wanted by most tests.
    from roma_ray.engine.progress import Silence
    from roma_ray.engine.setup import resolve
    from roma_ray.runs.pipeline import run
    from tests.world import make_world

    return run(resolve(make_world(root, **sections)), Silence())


@pytest.fixture(scope="session")
def _bucket_server() -> Iterator[Proxy]:
    from tests.bucket import bucket_server

    with bucket_server() as proxy:
        yield proxy


@pytest.fixture
def bucket(_bucket_server: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Proxy:
    """A bucket through a proxy that behaves, credentials for it, and a scratch of the test's own."""
    from tests.bucket import CREDENTIALS

    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ROMA_RAY_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("ROMA_RAY_LEASE_SECONDS", "4")
    _bucket_server.reset()
    return _bucket_server
