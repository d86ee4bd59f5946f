"""A few damaged files through every reader, and the fuzzer itself: it must find what it looks for."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from roma_ray.errors import ModelError
from tests.fuzzing import runner
from tests.fuzzing.runner import Target, fuzz
from tests.fuzzing.targets import TARGETS


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_no_damaged_file_crashes_a_reader_or_passes_unseen(target: Target, tmp_path: Path) -> None:
    count = fuzz(target, 40, 1, tmp_path)
    assert count.total >= 20
    assert count.refused


def refusing(value: Any) -> None:
    raise ModelError("no")


def crashing(value: int) -> None:
    [0][value]


def hanging(value: int) -> None:
    while value > 5:
        time.sleep(0.01)


def believing(value: int) -> None:
    assert value < 5, "accepted"


def mute(value: int) -> None:
    raise ModelError


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (crashing, IndexError),
        (hanging, runner.Hang),
        (believing, AssertionError),
        (mute, runner.SilentRefusal),
    ],
)
def test_the_fuzzer_finds_faults(
    read: Callable[[int], None], found: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "PATIENCE", 0.05)
    with pytest.raises(found):
        fuzz(Target("planted", lambda folder: (st.integers(0, 9), read)), 50, 0, tmp_path)
    assert (tmp_path / runner.LAST).exists()


def test_the_fuzzer_counts(tmp_path: Path) -> None:
    count = fuzz(Target("refusing", lambda folder: (st.integers(), refusing)), 30, 0, tmp_path)
    assert (count.accepted, count.refused) == (0, 30)
