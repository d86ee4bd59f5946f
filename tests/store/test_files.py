"""Files of the storage: what an object store can do, and nothing is seen half."""

from __future__ import annotations

from pathlib import Path

import pytest

from roma_ray.errors import StorageError
from roma_ray.store import files


def test_what_is_put_is_got_listed_and_removed(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert files.listed(folder) == files.below(folder) == []
    files.write_text(folder / "x.txt", "ü")
    files.write_json(folder / "y.json", {"n": 1})
    files.write_bytes(folder / "z" / "deep.bin", b"\0\1")
    assert files.read_text(folder / "x.txt") == "ü"
    assert files.read_json(folder / "y.json") == {"n": 1}
    assert files.read_bytes(folder / "z" / "deep.bin") == files.local(folder / "z" / "deep.bin").read_bytes() == b"\0\1"
    assert [path.name for path in files.listed(folder)] == ["x.txt", "y.json", "z"]
    assert [path.name for path in files.listed(folder, "*.json")] == ["y.json"]
    assert [path.name for path in files.below(tmp_path)] == ["x.txt", "y.json", "deep.bin"]
    assert files.size(folder / "x.txt") == 2
    assert (files.free_bytes(folder) or 0) > 0
    assert files.exists(folder)
    files.remove(folder / "x.txt")
    files.remove(folder / "x.txt")
    files.drop_empty(folder)
    assert files.exists(folder / "y.json"), "a folder that holds something was removed"
    files.remove_folder(folder)
    assert not files.exists(folder)


def test_only_the_first_creates(tmp_path: Path) -> None:
    assert files.create(tmp_path / "when", "first")
    assert not files.create(tmp_path / "when", "second")
    assert files.read_text(tmp_path / "when") == "first"


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    files.write_text(tmp_path / "x", "old")

    def fail(aside: Path) -> None:
        aside.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        files.write_atomically(tmp_path / "x", fail)
    assert files.read_text(tmp_path / "x") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
