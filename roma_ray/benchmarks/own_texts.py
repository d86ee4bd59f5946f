"""Texts of the user's own, as documents whose perplexity is asked for: what tuning does to what it was not made for.

A `.txt` file is cut at its blank lines into documents of whole paragraphs, each of at least `PASSAGE` characters, so that there
is something to take an error over; a shorter file is one document. A `.jsonl` file whose rows have a `text` and no `question` holds
a document a row. The model reads a document from its start; only one longer than the model's input is read in windows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from roma_ray.borders.documents import read_text
from roma_ray.borders.text import printable
from roma_ray.errors import QuestionError
from roma_ray.questions.jsonl import EmptyLine, jsonl_rows
from roma_ray.questions.records import BadRow

TEXT = ".txt"
ROWS = (".jsonl", ".jsonl.gz")
PASSAGE = 2000
METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")
"""lm-eval's own, over all documents: the first two are exp of the mean negative log-likelihood a word and a byte."""
_MOST_CHARACTERS = 1 << 28


def is_text(name: str) -> bool:
    """Whether a task's name is a file of texts: by its ending, or of JSON lines by its first row."""
    if name.endswith(TEXT):
        return True
    if not name.endswith(ROWS) or not Path(name).is_file():
        return False
    first = next(_rows(Path(name)), None)
    return first is not None and "text" in first[1] and "question" not in first[1]


def read_documents(path: Path) -> list[str]:
    """The documents of a file of texts. Raises QuestionError: it cannot be read, or a row or the whole holds no text."""
    found = _passages(path) if path.name.endswith(TEXT) else [_document(path, *row) for row in _rows(path)]
    if not found:
        raise QuestionError(f"{path} holds no text")
    return found


def _passages(path: Path) -> list[str]:
    try:
        text = read_text(path, _MOST_CHARACTERS)
    except (OSError, ValueError) as error:
        raise QuestionError(f"the text {path} cannot be read: {error}; it must be UTF-8") from None
    documents: list[str] = []
    waiting: list[str] = []
    for paragraph in filter(str.strip, re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n"))):
        waiting.append(paragraph)
        if sum(map(len, waiting)) >= PASSAGE:
            documents.append("\n\n".join(waiting).strip())
            waiting = []
    # What is left is too short to stand alone.
    if waiting and documents:
        documents[-1] = "\n\n".join([documents[-1], *waiting]).strip()
    elif waiting:
        documents.append("\n\n".join(waiting).strip())
    return documents


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows, blank lines left out. Raises QuestionError at the first bad one."""
    for number, take in enumerate(jsonl_rows(path, name=str(path)), start=1):
        try:
            yield number, dict(take())
        except EmptyLine:
            continue
        except BadRow as error:
            raise QuestionError(f"{path}, row {number}: {error}") from None


def _document(path: Path, number: int, row: dict[str, Any]) -> str:
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise QuestionError(f"{path}, row {number}: its `text` is {printable(text, 40)}, not a text")
    return text
