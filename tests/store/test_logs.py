"""Append logs: whole lines only, also after a kill in the middle of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from roma_ray.errors import StorageError
from roma_ray.store.logs import append_line, whole_lines


def test_lines_come_back_once_and_whole(tmp_path: Path) -> None:
    log = tmp_path / "folder" / "log"
    assert whole_lines(log) == ([], 0)
    append_line(log, "one")
    append_line(log, "zwei ü")
    lines, offset = whole_lines(log)
    assert lines == ["one", "zwei ü"]
    with log.open("ab") as stream:
        stream.write(b"half")
    assert whole_lines(log, offset) == ([], offset)
    append_line(log, "three")
    assert whole_lines(log, offset) == (["half", "three"], log.stat().st_size)


def test_a_place_that_takes_no_line_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        append_line(tmp_path / "file" / "log", "one")
