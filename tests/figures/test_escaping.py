"""Names that strangers write, in files that others open: Markdown, HTML and spreadsheets."""

from __future__ import annotations

import csv
import io
import re
from html import unescape

import numpy as np
import pytest
from markdown_it import MarkdownIt

from roma_ray.borders.text import clean, printable
from roma_ray.evaluation.run_comparison import ComparedModel, Comparison, compare_columns
from roma_ray.figures.comparison_page import render
from roma_ray.figures.escaping import csv_text, markdown
from tests.hostile import COMMANDS, DISGUISES, FORMULAS, MARKDOWN, MARKUP, SURROGATES, obeyed

NAMES = [*MARKDOWN, *MARKUP, *FORMULAS, *COMMANDS, *DISGUISES, *SURROGATES, "a_b_c", "__init__", "x\\", "$x$", "acc*"]


def compared(name: str) -> Comparison:
    """A comparison of two runs on a task, both under this name."""
    generator = np.random.default_rng(0)
    values = [{n: float(v) for n, v in enumerate(generator.integers(0, 2, 20))} for _ in range(2)]
    columns = [
        ComparedModel(f"{name}{n}" if n else name, {(name, "acc"): v}, {name: "pin"}) for n, v in enumerate(values)
    ]
    return compare_columns(columns)


def cells_of(html: str) -> list[list[str]]:
    """The table's cells as a browser shows them; anything that is no table's tag fails."""
    table = html[html.index("<table>") : html.index("</table>")]
    assert set(re.findall(r"</?([a-z0-9]+)", table)) <= {"table", "thead", "tbody", "tr", "th", "td"}, table
    rows = re.findall(r"<tr>(.*?)</tr>", table, flags=re.DOTALL)
    return [[unescape(c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.DOTALL)] for row in rows]


@pytest.mark.parametrize("name", NAMES)
def test_a_comparison_shows_any_name_as_it_is(name: str) -> None:
    found = compared(name)
    pages = {
        "markdown": MarkdownIt("commonmark", {"html": True})
        .enable(["table", "strikethrough"])
        .render(render(found, "markdown")),
        "html": render(found, "html"),
    }
    for form, page in pages.items():
        cells = cells_of(page)
        assert len({len(row) for row in cells}) == 1, page
        shown = [" ".join(cell.split()) for cell in (cells[1][0], cells[0][3], cells[0][4])]
        wanted = " ".join(name.split()) if form == "markdown" else name
        wanted = " ".join((printable(wanted, None) if form == "markdown" else clean(wanted)).split())
        assert shown[:2] == [wanted, wanted], form
        assert not obeyed(page), form
    text = render(found, "csv")
    rows = list(csv.reader(io.StringIO(text)))
    assert len(rows) == 2
    assert not obeyed(text)
    for cell in (rows[1][0], *rows[0]):
        assert not cell.lstrip().startswith(tuple("=+-@＝＋－＠"))


@pytest.mark.parametrize("value", ["-1.5", "+2", "1e-3", "-inf", -3, 0.5, None, "a=b", "–", "x"])
def test_figures_and_plain_texts_stay_as_they_are(value: object) -> None:
    assert next(csv.reader(io.StringIO(csv_text([[value]]))), [""]) == ["" if value is None else str(value)]


@pytest.mark.parametrize("value", [*FORMULAS, " =1", "\t=1", "-x", "+", "-1 2", "@a"])
def test_no_cell_is_a_formula(value: str) -> None:
    cell = next(csv.reader(io.StringIO(csv_text([[value]]))))[0]
    assert cell.lstrip().lstrip("'\N{REPLACEMENT CHARACTER}") in value
    assert cell.lstrip()[0] not in "=+-@＝＋－＠\t\r"


def test_a_name_with_underscores_stays_readable() -> None:
    assert markdown("arc_easy acc_norm") == "arc_easy acc_norm"
    assert markdown("_x_ __y__") == r"\_x\_ \_\_y\_\_"
