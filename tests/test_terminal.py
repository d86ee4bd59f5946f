"""What a terminal shows: of a sweep, and of names that strangers chose."""

from __future__ import annotations

import io
import re
import sys

import pytest
from rich.console import Console

from roma_ray.borders.text import clean, encodable, prepare_streams
from roma_ray.engine.progress import LineProgress
from roma_ray.terminal import LiveBoard, LiveProgress, _LiveMeter, print_table, say, stacked
from tests.hostile import MARKDOWN, MARKUP, UNUSABLE, obeyed


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


@pytest.mark.parametrize(("total", "unit"), [(2_860, "questions"), (49_000_000, "tokens"), (8, "figures")])
def test_a_bar_fits_eighty_columns(total: int, unit: str) -> None:
    """On one line, from "starting" to the last unit, with the figures whole."""
    stream = io.StringIO()
    progress = LiveProgress()
    progress.console = Console(file=stream, force_terminal=True, width=80, height=10, color_system=None)
    with progress.meter("finetune", total, unit) as meter:
        assert isinstance(meter, _LiveMeter)
        meter.bars.refresh()
        meter.advance(total // 2, "loss 0.224", seconds=5_000.0)
        meter.bars.refresh()
    lines = [re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", line) for line in re.split("[\r\n]+", stream.getvalue())]
    assert max(map(len, lines)) <= 80
    assert any("starting" in line for line in lines)
    told = [line for line in lines if f"{total // 2:,}/{total:,} {unit}" in line]
    assert all("/s " in line and "1:23:20 left loss 0.224" in line for line in told)
    assert told


@pytest.mark.parametrize("name", [*MARKUP, *UNUSABLE, *MARKDOWN])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_name_is_markup_a_command_or_a_crash(name: str, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {"stdout": io.BytesIO(), "stderr": io.BytesIO()}
    for stream, raw in streams.items():
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(raw, encoding=encoding))
    prepare_streams()
    print_table(name, (name, "n", name), [(name, "1", f"{name} ± 0.1")])
    say(name)
    say(name, error=True)
    LineProgress().say(name)
    LiveProgress().say(name)
    with LineProgress(interval=0).meter(name, 2, "q") as meter:
        meter.advance(1, name)
    with LiveProgress().meter(name, 2, "q") as meter:
        meter.advance(1, name)
    with LiveBoard(Console(stderr=True, width=100)) as board:
        board.show(name, ("trial", "state", name), [(name, "running", name)])
    for stream, raw in streams.items():
        getattr(sys, stream).flush()
        text = raw.getvalue().decode(encoding)
        assert not obeyed(text)
        shown = encodable(clean(name), encoding)
        assert text.count(shown.partition("\n")[0]) >= 4, text


def test_an_ascii_terminal_gets_ascii_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    prepare_streams()
    print_table("λ", ("task", "%"), [("a", "61.96 ± 0.10"), ("b", "−1.00 ± 0.10")])
    sys.stdout.flush()
    lines = raw.getvalue().decode("ascii").rstrip().splitlines()
    assert "61.96 +/- 0.10" in "\n".join(lines)
    assert len({len(line) for line in lines[1:]}) == 1, "the columns are in line"


HEADER = ("learning_rate", "weight", "validation %", "test %", "gain over base", "difference to centre", "p", "p, Holm")
ROWS = [
    ("7e-05", "auto", "57.00 ± 3.50", "61.96 ± 1.68", "+0.24 ± 0.52", "-12.03 ± 0.91", "< 1e-6", "0.0346"),
    ("0.0007", "0.01", "56.50 ± 3.51", "59.96 ± 1.69", "+10.24 ± 0.52", "centre", "", ""),
]


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_a_wide_table_is_stacked_and_no_figure_is_cut_or_broken(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table("settings", HEADER, ROWS, names=2)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, shown.splitlines())) <= width
    for cell in (*HEADER, *(cell for row in ROWS for cell in row)):
        assert cell in shown, cell
    tables = stacked(HEADER, ROWS, 2, width)
    assert (len(tables) == 1) == (width == 140)
    # Which setting is which stands in every part.
    assert all([name for name, _ in columns][:2] == ["learning_rate", "weight"] for columns, _ in tables)


def test_names_that_take_the_width_are_numbered_and_folded() -> None:
    names = ("layers", "neighbors", "training set")
    row = ("F2M3", "ε = 0.3 on the cosine, as the paper has it", "30 %", "57.00 ± 3.50", "61.96 ± 1.68")
    tables = stacked((*names, "validation %", "test %"), [row, row], 3, 60)
    assert [[name for name, _ in columns] for columns, _ in tables] == [
        ["#", "layers", "neighbors"],
        ["#", "training set"],
        ["#", "validation %", "test %"],
    ]
    assert [line[0] for line in tables[2][1]] == ["1", "2"]


def test_a_long_name_in_the_live_table_is_folded_and_the_table_keeps_to_the_screen() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, height=16)
    name = "gradient_ratio=0.3, learning_rate=0.0007, weight=auto, seed {}"
    rows = [(name.format(n), "running" if n == 7 else "waiting", "1/3", "57.00", "+10.24", "12 min") for n in range(9)]
    with LiveBoard(console) as board:
        board.show("0 done", ("trial", "state", "epoch", "validation %", "test", "time"), rows)
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).rpartition("0 done")[2]
    lines = last.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 16
    assert "…" not in last
    assert "seed 7" in " ".join(line.split("│")[1].strip() for line in lines if line.count("│") > 2)
