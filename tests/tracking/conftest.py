"""What the tests of tracking share: a database with MLflow's tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from roma_ray.tracking.mlflow import Mlflow
from tests.tracking.support import copied


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables in it: making them takes seconds."""
    root = tmp_path_factory.mktemp("mlflow")
    Mlflow(f"sqlite:///{root}/empty.db", "other", root / "other")
    return root / "empty.db"


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> str:
    return f"sqlite:///{copied(empty_database, tmp_path / 'mlflow.db')}"
