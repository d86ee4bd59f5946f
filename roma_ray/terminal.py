"""Whatever the command line shows: lines and tables on stdout, and in a terminal one bar a stage with rate and time left.

All printing goes through here: names come from strangers' files, so nothing is markup and nothing reaches a terminal as a command.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from roma_ray.borders.text import clean, encodable
from roma_ray.engine.progress import LineProgress, Meter, Pace, Silence
from roma_ray.errors import with_addresses


def say(text: str, *, error: bool = False) -> None:
    """Print a line on stdout, or on stderr, made safe to show. Raises OSError where the stream cannot be written."""
    stream = sys.stderr if error else sys.stdout
    print(encodable(clean(with_addresses(text)), stream.encoding), file=stream, flush=True)


def _shown(text: str, console: Console) -> Text:
    """A text as rich lays it out: what comes from data is never markup."""
    return Text(encodable(clean(with_addresses(text)), console.encoding))


class _Pace(ProgressColumn):
    """Units a second and the time left, once work has begun."""

    def render(self, task: Task) -> Text:
        pace: Pace = task.fields["pace"]
        rate, left = pace.rate, pace.left
        if rate is None or left is None:
            return Text("" if pace.begun else "starting")
        minutes, seconds = divmod(round(left), 60)
        return Text(f"{rate:,.{0 if rate >= 100 else 1}f}/s {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left")


class LiveProgress:
    """Progress with rich bars on stderr."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        self.console.print(_shown(text, self.console), soft_wrap=True)

    @contextmanager
    def meter(self, name: str, total: float, unit: str, done: float = 0) -> Iterator[Meter]:
        plain = Column(no_wrap=True)
        columns: Sequence[Any] = (
            TextColumn("{task.description:>9}", markup=False, table_column=plain),
            # As wide as the others leave room for.
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}", markup=False, table_column=plain),
            _Pace(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[note]}", markup=False, table_column=plain),
        )
        with Progress(*columns, console=self.console, transient=True, expand=True) as bars:
            task = bars.add_task(
                clean(name), total=total, completed=int(done), unit=clean(unit), note="", pace=Pace(total, done)
            )
            yield _LiveMeter(bars, task)


class _LiveMeter:
    def __init__(self, bars: Progress, task: Any) -> None:
        self.bars, self.task = bars, task

    def advance(self, amount: float, note: str = "", seconds: float | None = None) -> None:
        self.bars.tasks[0].fields["pace"].advance(amount, seconds)
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
            # Of a long name nothing is cut: it goes over several lines.
            wraps = {"no_wrap": True} if number else {"overflow": "fold"}
            table.add_column(_shown(name, self.console), justify="left" if number < 2 else "right", **wraps)
        for row in _fitting(rows, self._heights(header, rows), max(4, self.console.height - 6)):
            cells = [_shown(cell, self.console) for cell in row]
            table.add_row(*cells, style="" if row[1] == "running" else "dim" if row[1] == "waiting" else None)
        self._live.start()
        self._live.update(table)

    def _heights(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
        """How many lines each row takes beside the other columns, which stay whole."""
        others = [max(cell_len(clean(cell)) for cell in column) for column in zip(header, *rows, strict=True)][1:]
        room = max(1, self.console.width - sum(width + 3 for width in others) - 4)
        return [len(_shown(row[0], self.console).wrap(self.console, room, overflow="fold")) for row in rows]


def _fitting(rows: Sequence[Sequence[str]], heights: Sequence[int], most: int) -> list[Sequence[str]]:
    """As many rows as fit into `most` lines, in their order: failed and running ones before finished ones before those that wait."""
    rank = {"failed": 0, "running": 0, "waiting": 2}
    chosen: list[int] = []
    for n in sorted(range(len(rows)), key=lambda n: (rank.get(rows[n][1], 1), -n if rows[n][1] == "done" else n)):
        if chosen and sum(heights[m] for m in chosen) + heights[n] > most:
            break
        chosen.append(n)
    return [rows[n] for n in sorted(chosen)]


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> None:
    """Print a table on stdout: drawn in a terminal, plain aligned text elsewhere. The first `names` columns hold names.

    What is wider than the terminal becomes several tables below one another: no figure is cut or broken.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    # As they are drawn: what an encoding lacks is written with more letters.
    header, *rows = [[_shown(cell, console).plain for cell in line] for line in (header, *rows)]
    for number, (columns, lines) in enumerate(stacked(header, rows, names, console.width)):
        table = Table(title=None if number else _shown(title, console), title_justify="left")
        for name, figure in columns:
            # Only names may go over several lines.
            wraps = {"no_wrap": True} if figure else {"overflow": "fold"}
            table.add_column(Text(name), justify="right" if figure else "left", **wraps)
        for line in lines:
            table.add_row(*map(Text, line), end_section=False)
        console.print(table)


Columns = list[tuple[str, bool]]
"""Names of columns, and whether each holds figures."""


def stacked(
    header: Sequence[str], rows: Sequence[Sequence[str]], names: int, width: int
) -> list[tuple[Columns, list[list[str]]]]:
    """A table as one or several that fit into `width`: each begins with the names, or with a number that stands for them.

    Only where a name alone is too wide does a table not fit.
    """
    widths = [max(map(cell_len, column)) for column in zip(header, *rows, strict=True)]
    keys, figures = list(range(names)), list(range(names, len(header)))
    numbered = _width(widths, keys) > width // 2 and _width(widths, [*keys, *figures]) > width
    mark = len(str(len(rows))) if numbered else 0
    parts = (keys, figures) if numbered else (figures,)
    groups = []
    for part in parts:
        room = width - (mark + 3 if numbered else _width(widths, keys) - 1)
        groups += [chosen if numbered else [*keys, *chosen] for chosen in _filled(widths, part, room)]
    result = []
    for chosen in groups:
        columns: Columns = [(header[n], n >= names) for n in chosen]
        lines = [[row[n] for n in chosen] for row in rows]
        if numbered:
            columns = [("#", False), *columns]
            lines = [[str(number + 1), *line] for number, line in enumerate(lines)]
        result.append((columns, lines))
    return result


def _width(widths: Sequence[int], columns: Sequence[int]) -> int:
    """Of a drawn table: each cell has a blank on both sides and a line."""
    return sum(widths[n] + 3 for n in columns) + 1


def _filled(widths: Sequence[int], columns: Sequence[int], room: int) -> list[list[int]]:
    """The columns in their order, as many together as the room holds."""
    groups: list[list[int]] = [[]]
    for n in columns:
        if groups[-1] and _width(widths, [*groups[-1], n]) > room:
            groups.append([])
        groups[-1].append(n)
    return groups
