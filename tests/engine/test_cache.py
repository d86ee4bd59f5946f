"""A damaged, truncated or foreign activation shard is a named error, never a wrong number."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from roma_ray.engine.cache import ActivationCache
from roma_ray.errors import ArtifactError, CacheError
from roma_ray.runs.pipeline import Run


@pytest.fixture
def copy(letter_run: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(letter_run.stages["extract"].path, tmp_path / "copy"))


def shard(folder: Path) -> Path:
    return next((folder / "batches").glob("000000.*.safetensors"))


def opened(folder: Path) -> ActivationCache:
    return ActivationCache(folder, int(shard(folder).name.split(".")[1]))


def row_of(folder: Path) -> int:
    return opened(folder).batch.tolist().index(0)


def test_every_truncation_is_found(copy: Path) -> None:
    whole = shard(copy).read_bytes()
    row = row_of(copy)
    for size in (0, 4, 8, 50, len(whole) // 2, len(whole) - 1):
        shard(copy).write_bytes(whole[:size])
        cache = opened(copy)
        with pytest.raises(CacheError):
            cache.states(row)


def test_a_foreign_shard_is_found(copy: Path) -> None:
    row = row_of(copy)
    save_file({"hidden": torch.zeros(3, 32)}, shard(copy))
    cache = opened(copy)
    with pytest.raises(CacheError, match="another run"):
        cache.states(row)
    save_file({"other": torch.zeros(3, 32)}, shard(copy))
    with pytest.raises(CacheError, match="not an activation shard"):
        cache.states(row)
    cache = opened(copy)
    shard(copy).unlink()
    with pytest.raises(CacheError):
        cache.states(row)


def test_a_missing_index_is_an_artifact_error(copy: Path) -> None:
    (copy / "rows.parquet").unlink()
    with pytest.raises(ArtifactError):
        opened(copy)
