"""Scratch is gone when its user is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from roma_ray.errors import StorageError
from roma_ray.store.scratch import ScratchArray, scratch_folder


def test_a_scratch_folder_is_removed() -> None:
    with scratch_folder() as folder:
        (folder / "x").write_text("x")
    assert not folder.exists()


def test_a_scratch_array_lies_in_a_file_that_goes(tmp_path: Path) -> None:
    array = ScratchArray(tmp_path, 5, 3)
    array.values[[3, 1]] = 2.0
    assert array.values.sum(axis=1).tolist() == [0, 6, 0, 6, 0]
    assert [file.stat().st_size for file in tmp_path.iterdir()] == [60]
    array.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match="cannot write"):
        ScratchArray(tmp_path / "nowhere", 5, 3)
