"""Scratch is gone when its user is done."""

from __future__ import annotations

import resource
from pathlib import Path

import pyarrow as pa
import pytest

from roma_ray.errors import StorageError
from roma_ray.store.scratch import ScratchTable, scratch_folder


def test_a_scratch_folder_is_removed() -> None:
    with scratch_folder() as folder:
        (folder / "x").write_text("x")
    assert not folder.exists()


@pytest.mark.parametrize("mapped", [False, True])
def test_a_scratch_table_lies_in_a_file_without_a_name(tmp_path: Path, mapped: bool) -> None:
    table = ScratchTable(pa.schema([("n", pa.int64())]), tmp_path)
    table.append(pa.table({"n": [3, 1]}))
    # A kill now leaves nothing.
    assert list(tmp_path.iterdir()) == []
    table.append(pa.table({"n": [2]}))
    reader = table.finish(mapped=mapped)
    assert list(tmp_path.iterdir()) == []
    assert reader.get_batch(1).column("n").to_pylist() == [2]
    assert reader.read_all().column("n").to_pylist() == [3, 1, 2]


def test_a_scratch_table_that_nobody_reads_goes_too(tmp_path: Path) -> None:
    ScratchTable(pa.schema([("n", pa.int64())]), tmp_path).close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match="cannot write"):
        ScratchTable(pa.schema([("n", pa.int64())]), tmp_path / "nowhere")


@pytest.mark.parametrize("scratch", [False, True])
def test_a_full_disk_is_told_with_the_place_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scratch: bool
) -> None:
    monkeypatch.setenv("ROMA_RAY_SCRATCH", str(tmp_path / "scratch"))
    table = ScratchTable(pa.schema([("n", pa.int64())]), None if scratch else tmp_path)
    remedy = r"scratch: .*\$ROMA_RAY_SCRATCH" if scratch else "--storage"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageError, match=remedy):
            table.append(pa.table({"n": range(5000)}))
        with pytest.raises(StorageError, match=remedy):
            table.finish(mapped=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
