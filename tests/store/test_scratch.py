"""Scratch is gone when its user is done."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import NoReturn

import pyarrow as pa
import pytest
import torch

from roma_ray.errors import StorageError
from roma_ray.store import scratch as scratch_module
from roma_ray.store.scratch import ScratchTable, roomy_zeros, scratch_folder


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


@pytest.fixture
def small_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The scratch, in which arrays of more than a hundred bytes lie."""
    monkeypatch.setenv("ROMA_RAY_SCRATCH", str(tmp_path))
    monkeypatch.setattr(scratch_module, "HELD_BYTES", 100)
    return tmp_path


def mapped_in(folder: Path) -> int:
    """Files of a folder that this process has mapped."""
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_a_large_array_lies_in_a_file_without_a_name_for_as_long_as_it_is_used(small_memory: Path) -> None:
    assert torch.equal(roomy_zeros(5, 5), torch.zeros(5, 5))
    assert mapped_in(small_memory) == 0, "a hundred bytes are held"
    whole = roomy_zeros(2, 3, 5)
    assert torch.equal(whole, torch.zeros(2, 3, 5))
    assert mapped_in(small_memory) == 1
    # A kill now leaves nothing.
    assert list(small_memory.iterdir()) == []
    whole[1, 2] = torch.arange(5)
    part = whole[1]
    del whole
    assert part[2].tolist() == [0, 1, 2, 3, 4]
    del part
    assert mapped_in(small_memory) == 0


def test_an_array_has_the_type_that_is_asked_for(small_memory: Path) -> None:
    found = roomy_zeros(20, dtype=torch.float64)
    assert (found.dtype, mapped_in(small_memory)) == (torch.float64, 1)
    assert torch.equal(found, torch.zeros(20, dtype=torch.float64))


def refusing(code: int) -> NoReturn:
    raise OSError(code, os.strerror(code))


def test_an_array_that_the_disk_has_no_room_for_is_refused_before_it_is_written(
    small_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: refusing(errno.ENOSPC))
    with pytest.raises(StorageError, match=r"No space left on device.*\$ROMA_RAY_SCRATCH"):
        roomy_zeros(100)
    assert mapped_in(small_memory) == 0
    assert list(small_memory.iterdir()) == []


@pytest.mark.parametrize("there", [False, True])
def test_room_is_taken_by_writing_where_it_cannot_be_reserved(
    small_memory: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    if there:
        monkeypatch.setattr(os, "posix_fallocate", lambda *_: refusing(errno.EOPNOTSUPP))
    else:
        monkeypatch.delattr(os, "posix_fallocate")
    wide = 2**20 + 3  # more than what is written at once
    found = roomy_zeros(wide)
    assert not found.any()
    found[-1] = 1
    assert (len(found), mapped_in(small_memory)) == (wide, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageError, match=r"\$ROMA_RAY_SCRATCH"):
            roomy_zeros(5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
