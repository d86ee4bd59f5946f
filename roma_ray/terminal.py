"""Whatever the command line shows: lines and tables on stdout, and in a terminal one bar a stage with rate and time left.

All printing goes through here: names come from strangers' files, so nothing is markup and nothing reaches a terminal as a command.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from roma_ray.engine.progress import LineProgress, Meter, Silence
from roma_ray.text import clean, encodable


def say(text: str, *, error: bool = False) -> None:
    """Print a line on stdout, or on stderr, made safe to show. Raises OSError where the stream cannot be written."""
    stream = sys.stderr if error else sys.stdout
    print(encodable(clean(text), stream.encoding), file=stream, flush=True)


def _shown(text: str, console: Console) -> Text:
    """A text as rich lays it out: what comes from data is never markup."""
    return Text(encodable(clean(text), console.encoding))


class _Rate(ProgressColumn):
    """Units a second since this process took up the work."""

    def render(self, task: Task) -> Text:
        done = task.completed - task.fields["first"]
        speed = done / task.elapsed if task.elapsed else 0.0
        return Text(f"{speed:,.1f} {task.fields['unit']}/s")


class LiveProgress:
    """Progress with rich bars on stderr."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        self.console.print(_shown(text, self.console), soft_wrap=True)

    @contextmanager
    def meter(self, name: str, total: float, unit: str, done: float = 0) -> Iterator[Meter]:
        columns: Sequence[Any] = (
            TextColumn("{task.description:>9}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(clean(name), total=total, completed=int(done), unit=unit, note="", first=done)
            yield _LiveMeter(bars, task)


class _LiveMeter:
    def __init__(self, bars: Progress, task: Any) -> None:
        self.bars, self.task = bars, task

    def advance(self, amount: float, note: str = "") -> None:
        self.bars.update(self.task, advance=amount, note=clean(note))


def open_progress(quiet: bool) -> LiveProgress | LineProgress | Silence:
    """A live view in a terminal, plain lines in a log, nothing when quiet."""
    if quiet:
        return Silence()
    return LiveProgress() if sys.stderr.isatty() else LineProgress()


class LiveBoard:
    """A table that is redrawn in place on stderr; lines are printed above it. Long ones show their busiest part."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, refresh_per_second=2)

    def __enter__(self) -> LiveBoard:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the table as it is; lines and bars go on below it."""
        self._live.stop()

    def show(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Replace what is shown; the second column is a row's state."""
        table = Table(title=_shown(title, self.console), title_justify="left")
        for number, name in enumerate(header):
            table.add_column(_shown(name, self.console), justify="left" if number < 2 else "right", no_wrap=True)
        for row in _fitting(rows, max(4, self.console.height - 6)):
            cells = [_shown(cell, self.console) for cell in row]
            table.add_row(*cells, style="" if row[1] == "running" else "dim" if row[1] == "waiting" else None)
        self._live.start()
        self._live.update(table)


def _fitting(rows: Sequence[Sequence[str]], most: int) -> list[Sequence[str]]:
    """As many rows as fit, in their order: failed and running ones before finished ones before those that wait."""
    rank = {"failed": 0, "running": 0, "waiting": 2}
    chosen = sorted(range(len(rows)), key=lambda n: (rank.get(rows[n][1], 1), -n if rows[n][1] == "done" else n))[:most]
    return [rows[n] for n in sorted(chosen)]


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout: drawn in a terminal, plain aligned text elsewhere."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    table = Table(title=_shown(title, console), title_justify="left")
    for number, name in enumerate(header):
        table.add_column(_shown(name, console), justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*(_shown(cell, console) for cell in row), end_section=False)
    console.print(table)
