"""What every test starts from: no hub, no telemetry, one thread, a storage of its own, property tests that repeat."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from roma_ray.runs.pipeline import Run

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For parallel runs: a file's tests stay together, and so do all of a folder that share what takes long to make."""
    groups = {"cluster": "ray", "tracking": "mlflow"}
    for item in items:
        place = item.path.relative_to(Path(__file__).parent)
        item.add_marker(pytest.mark.xdist_group(groups.get(place.parts[0], str(place))))


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
