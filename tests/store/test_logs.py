"""Append logs: whole lines only, also after a kill in the middle of one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from roma_ray.cluster import live
from roma_ray.cluster.live import LiveWriter
from roma_ray.errors import StorageError
from roma_ray.store.buckets import as_path
from roma_ray.store.logs import append_line, put_again, whole_lines
from tests.bucket import Proxy


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


def test_of_a_log_in_a_bucket_only_what_is_new_is_read(bucket: Proxy) -> None:
    log = as_path(bucket.address("logs/new")) / "log"
    append_line(log, "x" * 100_000)
    lines, offset = whole_lines(log)
    assert (len(lines), offset, put_again(log)) == (1, 100_001, 100_001)
    before = bucket.received
    assert whole_lines(log, offset) == ([], offset)
    append_line(log, "two")
    assert whole_lines(log, offset) == (["two"], offset + 4)
    assert bucket.received - before < 10_000


def test_a_long_trainings_progress_is_told_more_rarely_to_a_bucket(
    bucket: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: now[0]))
    writer = LiveWriter(as_path(bucket.address("logs/live")), "run", 0)
    told = []
    for length in (100, 40_000):
        writer.epoch({"x": "y" * length})
        assert writer._written is not None
        writer._written.result()
        now[0] += 1.0
        writer.advance(1, "")
        told.append(writer.last == now[0])
        writer._written.result()
    assert told == [True, False]
