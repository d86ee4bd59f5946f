"""The border that a stranger's text crosses before it is shown, logged or made a name. Whoever prints goes through here.

Terminals obey control characters (ESC and the C1 set start commands, OSC writes titles and links, CR overwrites a line), bidi
marks turn a line's order round, invisible characters hide a difference, and a lone surrogate cannot be encoded at all.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import reprlib
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

RESERVED = frozenset(
    {"all", "all tasks", "macro average", "trained tasks", "held-out tasks", "other tasks", "all, trained or not"}
)
"""What tables call lines of our own (`all` also in files); no task may be named so."""
MOST_NAME = 512
"""Characters of a name."""

# Zero-width joiners (U+200C, U+200D) stay: Persian, Hindi and emoji need them.
_HIDDEN = "\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f"
_IN_LINES = re.compile(f"[\x00-\x08\x0b-\x1f{_HIDDEN}]")
_IN_A_LINE = re.compile(f"[\x00-\x1f{_HIDDEN}]")
_MARK = "\N{REPLACEMENT CHARACTER}"

_PLAIN = {
    "±": "+/-",
    "−": "-",
    "–": "-",
    "—": "-",
    "─": "-",
    "━": "-",
    "→": "->",
    "…": "...",
    "×": "x",
    "·": ".",
    "≠": "!=",
    "≤": "<=",
    "≥": ">=",
    "λ": "lambda",
    "ε": "epsilon",
    "σ": "sigma",
    "≈": "~",
    "‖": "|",
}
IN_PLAIN = "roma-in-plain"
"""An error handler of codecs: what an encoding lacks is written as the nearest ASCII text, else as a question mark."""


def _in_plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end


codecs.register_error(IN_PLAIN, _in_plain)


class _Short(reprlib.Repr):
    """A value's repr of bounded work: a kilobyte of YAML can mean gigabytes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple, self.maxset = 2, 4, 4, 4, 4
        self.maxstring = self.maxother = 120

    def repr_int(self, x: int, level: int) -> str:
        """Python itself refuses to write an integer of thousands of digits."""
        return repr(x) if abs(x) < 10**40 else "(a huge number)"


_short = _Short()


def brief(value: object) -> str:
    """`value` as Python writes it, long parts of it left out: never more than a few thousand characters of work."""
    return _short.repr(value)


def prepare_streams() -> None:
    """Let both streams take any text: what an ASCII terminal lacks is written in plain letters, never an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=IN_PLAIN)


@contextmanager
def writable_output() -> Iterator[None]:
    """End the process with one message, and exit code 1, where the standard output cannot be written."""
    try:
        yield
    except OSError as error:
        if not _fails(sys.stdout):
            raise
        # What is left in the buffer must not fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(
            f"roma-ray: the standard output cannot be written ({error.strerror}): send it elsewhere. What was computed is kept: "
            "the same command shows it again"
        )


def _fails(stream: TextIO) -> bool:
    """Whether an error came from this stream: then a line end fails as well."""
    try:
        stream.write("\n")
        stream.flush()
    except OSError:
        return True
    return False


def clean(text: str) -> str:
    """`text` safe for a terminal, line ends and tabs kept: each control, bidi mark, hidden character or surrogate is marked."""
    return _IN_LINES.sub(_MARK, text)


def printable(value: object, limit: int | None = 120) -> str:
    """`value` as one line that is safe to show, store and log, cut at `limit` characters."""
    text = value if isinstance(value, str) else brief(value)
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    return _IN_A_LINE.sub(_MARK, text)


def encodable(text: str, encoding: str | None) -> str:
    """`text` with what the encoding lacks in plain letters: an ASCII terminal gets +/- for ±."""
    return text.encode(encoding or "utf-8", IN_PLAIN).decode(encoding or "utf-8")


def name_fault(name: str) -> str | None:
    """Why `name` cannot be one (of a task, a run, a question), or None: it must be short, visible and of one line."""
    if len(name) > MOST_NAME:
        return f"is longer than {MOST_NAME} characters"
    hidden = _IN_A_LINE.search(name)
    if hidden:
        return f"holds the unusable character U+{ord(hidden.group()):04X}"
    return None if name.strip() else "is empty"


def reserved(name: str) -> bool:
    """Whether a task's name would be read as one of our own lines, whatever its case, its width and its blanks."""
    visible = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    return " ".join(visible.split()).casefold() in RESERVED


def with_error(
    value: float, error: float | None, *, scale: float = 100.0, digits: int = 2, signed: bool = False
) -> str:
    """The one form of a figure with its error, in percent unless `scale` says otherwise: `61.96 ± 1.68`, `+2.03 ± 0.91`."""
    text = f"{scale * value:{'+' if signed else ''}.{digits}f}"
    return text if error is None else f"{text} ± {scale * error:.{digits}f}"


def figure(record: Mapping[str, Any], name: str, *, digits: int = 2) -> str:
    """A record's share in percent with the error beside it: `NAME` or `NAME_accuracy`, and `NAME_stderr`. Differences are signed."""
    value = record[name] if name in record else record[f"{name}_accuracy"]
    return with_error(value, record[f"{name}_stderr"], digits=digits, signed=name == "difference")


def duration_text(seconds: float) -> str:
    """A duration as a reader takes it in: `12 s`, `3 min`, `1.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size_text(count: int) -> str:
    """So many bytes as a reader takes them in: `12 B`, `3.4 MB`."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
