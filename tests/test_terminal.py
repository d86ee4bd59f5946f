"""What a terminal shows of a sweep."""

from __future__ import annotations

import io

from rich.console import Console

from roma_ray.terminal import LiveBoard, LiveProgress


def test_the_live_table_keeps_to_the_screen_and_leaves_room_for_lines_and_bars() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, height=16)
    rows = [(f"trial {n}", "done" if n < 20 else "running" if n < 22 else "waiting", "3/3") for n in range(40)]
    with LiveBoard(console) as board:
        board.show("20 done", ("trial", "state", "epoch"), rows)
        console.print("a line above")
        board.show("21 done", ("trial", "state", "epoch"), rows)
        board.close()
        progress = LiveProgress()
        progress.console = console
        with progress.meter("report", 2, "figures") as meter:
            meter.advance(1)
    text = stream.getvalue()
    last = text[text.rindex("21 done") :]
    shown = [n for n in range(40) if f"trial {n} " in last]
    assert len(shown) == 10
    assert {20, 21} <= set(shown)
    assert 19 in shown
    assert "a line above" in text
