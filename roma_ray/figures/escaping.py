"""Text of strangers in files that others open: Markdown that shows it as it is, CSV that no spreadsheet computes."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from html import escape
from typing import Any

from roma_ray.borders.text import printable

# An underscore within a word is none of Markdown's.
_MARKDOWN = re.compile(r"([\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_]))")
# What a spreadsheet takes for the beginning of a formula, also in full width.
_FORMULA = tuple("=+-@＝＋－＠")


def markdown(text: Any) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no line break, no control characters."""
    line = escape(printable(" ".join(str(text).split()), None), quote=False)
    return _MARKDOWN.sub(r"\\\1", line)


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Rows as CSV."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([_cell(value) for value in row] for row in rows)
    return stream.getvalue()


def _cell(value: Any) -> Any:
    """A text that would be computed gets an apostrophe before it, as spreadsheets write such a text themselves."""
    if not isinstance(value, str):
        return value
    text = printable(value, None)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) and not _number(text) else text


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
