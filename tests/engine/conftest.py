"""One finished tiny run, shared by the engine tests that only read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from roma_ray.engine.progress import Silence
from roma_ray.engine.setup import resolve
from roma_ray.runs.pipeline import Run, run
from tests.world import make_world


@pytest.fixture(scope="session")
def letter_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root: Path = tmp_path_factory.mktemp("letter")
    return run(resolve(make_world(root)), Silence())


@pytest.fixture(scope="session")
def cloze_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root: Path = tmp_path_factory.mktemp("cloze")
    config = make_world(
        root,
        questions={"sources": [{"path": str(root / "questions.jsonl")}], "prompt": {"format": "cloze"}},
        finetune={"task_loss": "vocabulary"},
    )
    return run(resolve(config), Silence())
