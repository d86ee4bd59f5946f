"""A comparison of runs as Markdown, HTML or CSV."""

from __future__ import annotations

from html import escape

from roma_ray.borders.text import clean
from roma_ray.evaluation.measures import Measure, form_of
from roma_ray.evaluation.run_comparison import MACRO, Cell, Comparison, Row, plain
from roma_ray.evaluation.statistics import p_value
from roma_ray.figures.escaping import csv_text, markdown

# Format -> suffix of its files.
FORMATS = {"markdown": "md", "html": "html", "csv": "csv"}
_OTHER_PIN = "≠ pin"
_ABSENT = "–"
_LEGEND = (
    "Scores with standard errors over questions, shares in percent; gold_logp: the right answer's log-likelihood in nats a token, "
    "choice_logp: its log-probability among the choices, in nats. *: the metric by which the run chooses its answers. Differences "
    "to the first column with paired bootstrap 95 % intervals; p: exact McNemar of right and wrong answers, a paired t-test of other "
    f"values. {_OTHER_PIN}: other questions, prompts or metric than the row's first score, not comparable with it. {_ABSENT}: a "
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
        lines = ["".join(f"<th>{escape(clean(text))}</th>" for text in header)]
        lines += ["".join(f"<td>{escape(clean(text))}</td>" for text in row) for row in rows]
        table = "\n".join(f"<tr>{line}</tr>" for line in lines)
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Comparison</title><style>{_STYLE}</style>\n'
            f"<table>\n{table}\n</table>\n<p>{escape(_LEGEND)}</p></html>\n"
        )
    assert form == "markdown"
    # Names are strangers'; figures are ours, and stay as they are read in a terminal.
    named = [[markdown(row[0]), markdown(row[1]), *row[2:]] for row in rows]
    cells = [list(map(markdown, header)), ["---"] * len(header), *named]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) + f"\n\n{markdown(_LEGEND)}\n"


def _cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    header = ["benchmark", "metric", "n", comparison.labels[0]]
    for label in comparison.labels[1:]:
        header += [label, "difference", "p"]
    return header, [_row(row) for row in comparison.rows]


def _row(row: Row) -> list[str]:
    measure = form_of(row.metric)
    texts = [row.task, row.metric + ("*" if row.configured else ""), str(row.n), _score(row.cells[0], measure)]
    for cell in row.cells[1:]:
        p = "" if cell is None or cell.p is None else p_value(cell.p)
        texts += [_score(cell, measure), _difference(cell, measure), p]
    return texts


def _score(cell: Cell | None, measure: Measure) -> str:
    return _ABSENT if cell is None else measure.text(cell.score, cell.stderr)


def _difference(cell: Cell | None, measure: Measure) -> str:
    if cell is None or cell.difference is None:
        return _OTHER_PIN if cell is not None and cell.other_pin else ""
    assert cell.low is not None
    assert cell.high is not None
    low, high = (measure.text(value, None, signed=True) for value in (cell.low, cell.high))
    return f"{measure.text(cell.difference, None, signed=True)} [{low}, {high}]"


def _csv(comparison: Comparison) -> str:
    table = plain(comparison)
    return csv_text([table, *zip(*table.values(), strict=True)])
