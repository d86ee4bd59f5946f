"""Scratch is gone when its user is done."""

from __future__ import annotations

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
def test_a_scratch_table_lies_in_a_file_whose_name_goes(tmp_path: Path, mapped: bool) -> None:
    table = ScratchTable(pa.schema([("n", pa.int64())]), tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    table.append(pa.table({"n": [3, 1]}))
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
