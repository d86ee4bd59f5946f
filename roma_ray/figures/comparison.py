"""A comparison of runs as Markdown, HTML or CSV."""

from __future__ import annotations

import csv
import io
from html import escape

from roma_ray.evaluation.compare import MACRO, Cell, Comparison, Row, plain

# Format -> suffix of its files.
FORMATS = {"markdown": "md", "html": "html", "csv": "csv"}
_OTHER_PIN = "≠ pin"
_ABSENT = "–"
_LEGEND = (
    "Scores in percent with standard errors; differences to the first column with paired bootstrap 95 % intervals; p: exact "
    f"McNemar. {_OTHER_PIN}: other questions, prompts or metric than the row's first score, not comparable with it. {_ABSENT}: a "
    f"run without this benchmark. {MACRO}: over the n benchmarks that all runs share."
)
_STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2rem}table{border-collapse:collapse}th,td{padding:.3rem .7rem;text-align:right;"
    "border-bottom:1px solid #ccc;white-space:nowrap}th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}"
)


def render(comparison: Comparison, form: str) -> str:
    """The comparison as text in one of FORMATS."""
    if form == "csv":
        return _csv(comparison)
    header, rows = _cells(comparison)
    if form == "html":
        lines = ["".join(f"<th>{escape(text)}</th>" for text in header)]
        lines += ["".join(f"<td>{escape(text)}</td>" for text in row) for row in rows]
        table = "\n".join(f"<tr>{line}</tr>" for line in lines)
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Comparison</title><style>{_STYLE}</style>\n'
            f"<table>\n{table}\n</table>\n<p>{escape(_LEGEND)}</p></html>\n"
        )
    assert form == "markdown"
    # A label with a bar in it would open another column.
    cells = [[text.replace("|", "\\|") for text in row] for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) + f"\n\n{_LEGEND}\n"


def _cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    header = ["benchmark", "metric", "n", comparison.labels[0]]
    for label in comparison.labels[1:]:
        header += [label, "difference", "p"]
    return header, [_row(row) for row in comparison.rows]


def _row(row: Row) -> list[str]:
    texts = [row.task, row.metric, str(row.n), _score(row.cells[0])]
    for cell in row.cells[1:]:
        texts += [_score(cell), _difference(cell), "" if cell is None or cell.p is None else f"{cell.p:.3g}"]
    return texts


def _score(cell: Cell | None) -> str:
    if cell is None:
        return _ABSENT
    error = "" if cell.stderr is None else f" ± {100 * cell.stderr:.2f}"
    return f"{100 * cell.score:.2f}{error}"


def _difference(cell: Cell | None) -> str:
    if cell is None or cell.difference is None:
        return _OTHER_PIN if cell is not None and cell.other_pin else ""
    assert cell.low is not None
    assert cell.high is not None
    return f"{100 * cell.difference:+.2f} [{100 * cell.low:+.2f}, {100 * cell.high:+.2f}]"


def _csv(comparison: Comparison) -> str:
    table = plain(comparison)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    return stream.getvalue()
