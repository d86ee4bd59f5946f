"""JSON lines, plain or gzipped, one object a line. A broken line spoils itself only; a broken gzip the file."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from roma_ray.borders.documents import first_repeated
from roma_ray.borders.text import printable
from roma_ray.errors import QuestionError
from roma_ray.questions.records import BadRow
from roma_ray.questions.shapes import Take

MAX_LINE_BYTES = 8 * 2**20
"""Longer lines are set aside without being held in memory."""

_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"


class EmptyLine(BadRow):
    """A line of nothing but blanks."""


def jsonl_rows(path: Path, *, name: str, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Take]:
    """Each line of the file as what makes its row; `name` stands for the file in errors.

    Raises:
        QuestionError: the file cannot be opened or read to its end.
    """
    number = 0
    try:
        with _opened(path) as stream:
            for line in _lines(stream, max_line_bytes):
                number += 1
                yield partial(_row, line, max_line_bytes)
    except (OSError, EOFError, zlib.error) as error:
        raise QuestionError(f"{name} cannot be read after line {number}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
        return f"the gzip data are truncated or corrupt ({error})"
    return str(error)


def _opened(path: Path) -> BinaryIO | gzip.GzipFile:
    """The file's bytes, unpacked when it is gzipped: its first bytes say so, whatever its name."""
    with path.open("rb") as stream:
        packed = stream.read(2) == _GZIP
    if packed:
        return gzip.open(path, "rb")
    if path.name.lower().endswith(".gz"):
        raise gzip.BadGzipFile("the file's name ends in .gz, but it is not gzipped")
    return path.open("rb")


def _lines(stream: BinaryIO | gzip.GzipFile, max_line_bytes: int) -> Iterator[bytes]:
    """The lines without their ends. An over-long one is cut just above the limit; the rest of it is read and let go."""
    if stream.read(len(_BOM)) != _BOM:
        stream.seek(0)
    while line := stream.readline(max_line_bytes + 2):
        rest = line
        while not rest.endswith(b"\n") and (rest := stream.readline(2**16)):
            pass
        yield line.removesuffix(b"\n")


def _row(line: bytes, max_line_bytes: int) -> dict[str, Any]:
    if len(line) > max_line_bytes:
        raise BadRow(f"the line is longer than {max_line_bytes} bytes")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"invalid UTF-8 at byte {error.start + 1} of the line") from None
    if not text.strip():
        raise EmptyLine("the line is empty")
    try:
        row = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise BadRow("invalid JSON: nested too deeply") from None
    except BadRow:
        raise
    except json.JSONDecodeError as error:
        raise BadRow(f"invalid JSON: {error.msg} at character {error.pos + 1}") from None
    except ValueError as error:
        # Python's own limit on the digits of an integer.
        raise BadRow(f"invalid JSON: {printable(str(error))}") from None
    if not isinstance(row, dict):
        hint = "; one object a line, not a list of them" if isinstance(row, list) else ""
        raise BadRow(f"the line is not a JSON object{hint}")
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = first_repeated(key for key, _ in pairs)
    if twice is not None:
        raise BadRow(f"the field `{printable(twice, 40)}` occurs twice")
    return dict(pairs)
