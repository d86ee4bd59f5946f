"""What a run tells of its speed: the work's, without what came before it."""

from __future__ import annotations

import pytest

from roma_ray.engine import progress
from roma_ray.engine.progress import LineProgress, Pace


class Clock:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_starting_is_no_part_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of 100 in 2 s, after 80 s of starting workers: 50 a second, and 18 s for the other 900."""
    clock = Clock(monkeypatch)
    pace = Pace(1200, 200)
    assert pace.rate is None
    clock.now += 80
    pace.advance(0)
    assert not pace.begun
    clock.now += 2
    pace.advance(100, seconds=2.0)
    assert pace.rate == 50
    assert pace.left == 18
    clock.now += 2
    pace.advance(100, seconds=2.0)
    assert (pace.done, pace.rate, pace.left) == (400, 50, 16)


def test_without_its_seconds_the_first_work_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pace = Pace(10, 0)
    clock.now += 60
    pace.advance(1)
    assert pace.begun
    assert pace.left is None
    clock.now += 3
    pace.advance(1)
    assert (pace.rate, pace.left) == (1 / 3, 24)
    # A restart from a checkpoint takes work back.
    pace.advance(-2)
    assert pace.left is None


def test_lines_tell_that_rate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock(monkeypatch)
    with LineProgress().meter("extract", 1000, "tokens") as meter:
        clock.now += 117
        meter.advance(10, seconds=1.0)
        clock.now += 11
        meter.advance(110, "loss 1.0", seconds=11.0)
    assert capsys.readouterr().err.splitlines() == [
        "extract: 10/1000 tokens, 10.0 tokens/s, 99 s left",
        "extract: 120/1000 tokens, 10.0 tokens/s, 88 s left, loss 1.0",
    ]
