"""The question record, the rejected row, and the rules that decide which a row becomes.

A row is an object with the fields

    question   text
    choices    2 to 26 different, non-empty texts; when every one bears its own letter ("A) ...", "B) ..."), as in the
               reference's evaluation files, the letters are taken off
    answer     the letter of the right choice ("B", "b", "B)", "(B)") or its index, counted from 0, as a JSON integer.
               A number written as a string ("1") is rejected: it would mean choice A to one writer and B to another.
    id         text or integer; without one, the file's name and the line number
    task, split, context   optional texts

Other fields are ignored. Outer blanks of all texts are dropped.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from roma_ray.borders.text import name_fault, printable, reserved

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MIN_CHOICES = 2
MAX_CHOICES = len(LETTERS)

SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "development": "validation",
    "test": "test",
}
"""The names of a split that rows may use, and what each means."""

# C0 controls but tab and line ends, DEL, and lone surrogates: no tokenizer, table or terminal takes them all well.
_UNUSABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_LETTERED = re.compile(r"([A-Z])\)(?:\s+(.*))?", re.DOTALL)
_ANSWER_LETTER = re.compile(r"\(?([A-Za-z])[).]?")


Form = Literal["choices", "question", "prompt", "messages", "text"]
"""What a row is: a multiple-choice question, or one of the free forms of `free_records`."""
Turn = tuple[str, str]
"""(role, content) of a message."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question; `answer` is the right choice's index, `file` and `line` say where it was read.

    A free-form one (`form` is not "choices") has as its `choices` the texts that are accepted as answers, of which the model is
    trained on `answer`, the first.
    """

    id: str
    task: str
    question: str
    choices: tuple[str, ...]
    answer: int
    context: str | None = None
    split: str = "train"
    file: str = field(default="", compare=False)
    line: int = field(default=0, compare=False)
    form: Form = "choices"
    turns: tuple[Turn, ...] = ()
    """The messages before the answer (form "messages"); `question` holds their contents as one text."""
    verdict: bool | None = None
    """Whether the base model answers a free-form question rightly, where the row says so."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that was set aside. Lines count from 1; all texts are safe to print and to store."""

    file: str
    line: int
    id: str
    reason: str


class BadRow(ValueError):
    """A row that cannot be a question, and why. It never leaves this package: it becomes a `Rejected`."""


def make_question(
    *,
    id: str,
    task: str,
    question: object,
    choices: object,
    answer: int,
    context: object = None,
    split: str = "train",
    file: str = "",
    line: int = 0,
    form: Form = "choices",
    turns: tuple[Turn, ...] = (),
    verdict: bool | None = None,
) -> Question:
    """A checked question from its parts; the `choices` of a free-form one are checked already.

    Raises:
        BadRow: an empty question, a wrong number of choices, empty or equal ones, unusable characters, an answer that
            no choice has.
    """
    text = plain_text(question, "question")
    if not text:
        raise BadRow(f"the {'question' if form in ('choices', 'messages') else form} is empty")
    texts = _choices(choices) if form == "choices" else tuple(choices)  # type: ignore[arg-type]
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise BadRow(f"the answer is {kind_of(answer)}, not an index")
    if not 0 <= answer < len(texts):
        raise BadRow(f"answer {answer} is out of range: there are {len(texts)} choices, counted from 0")
    passage = None if context is None else plain_text(context, "context") or None
    task = checked_name(task, "task")
    if reserved(task):
        raise BadRow(f"the task name '{task}' is kept for the tables' own lines; name the task otherwise")
    return Question(checked_name(id, "id"), task, text, texts, answer, passage, split, file, line, form, turns, verdict)


def question_from_row(
    row: Mapping[str, Any],
    *,
    file: str,
    line: int,
    default_id: str,
    task: str | None,
    default_task: str,
    split: str | None,
) -> Question:
    """A question from one row of a file; `task` and `split`, when given, override the row's own.

    Raises:
        BadRow: the row cannot be used; the message says why.
    """
    place = placed(row, default_id=default_id, task=task, default_task=default_task, split=split)
    if row.get("question") is None:
        raise BadRow("no field `question`")
    if row.get("choices") is None:
        raise BadRow(
            "no field `choices`: an open-ended question cannot be scored by its choices (questions.prompt.format=free asks it)"
        )
    choices = _without_letters(_choices(row["choices"]))
    return make_question(
        **place,
        question=row["question"],
        choices=choices,
        answer=answer_index(row.get("answer"), len(choices)),
        context=row.get("context"),
        file=file,
        line=line,
    )


class Belonging(TypedDict):
    """Whose question a row is."""

    id: str
    task: str
    split: str


def placed(
    row: Mapping[str, Any], *, default_id: str, task: str | None, default_task: str, split: str | None
) -> Belonging:
    """A row's id, task and split; `task` and `split`, when given, override its own. Raises BadRow."""
    id = row_id(row) or default_id
    row_task = row.get("task")
    if task is None and row_task is not None and not isinstance(row_task, str):
        raise BadRow(f"the task is {kind_of(row_task)}, not a text")
    declared = split_of(row.get("split")) if split is None else split
    return {"id": id, "task": task or row_task or default_task, "split": declared}


def row_id(row: Mapping[str, Any]) -> str | None:
    """The row's own id as a text, or None if it has none.

    Raises:
        BadRow: the id is neither a text nor an integer.
    """
    value = row.get("id")
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow(f"the id is {kind_of(value)}, not a text or an integer")
    return value if isinstance(value, str) else str(value)


def answer_index(answer: object, num_choices: int) -> int:
    """The index of the right choice, from its letter or its 0-based index.

    Raises:
        BadRow: no answer, one out of range, or one that can be read in two ways.
    """
    if answer is None or answer == "":
        raise BadRow("no answer")
    if isinstance(answer, bool) or not isinstance(answer, int | str):
        raise BadRow(f"the answer is {kind_of(answer)}, not a letter or an integer")
    if isinstance(answer, int):
        if not 0 <= answer < num_choices:
            shown = printable(answer) if abs(answer) < 10**18 else "(a huge number)"
            raise BadRow(f"answer {shown} is out of range: there are {num_choices} choices, counted from 0")
        return answer
    match = _ANSWER_LETTER.fullmatch(answer.strip())
    if match:
        index = LETTERS.index(match.group(1).upper())
        if index >= num_choices:
            last = LETTERS[num_choices - 1]
            raise BadRow(f"answer {match.group(1)} is out of range: the {num_choices} choices are A to {last}")
        return index
    shown = printable(answer, 40)
    if re.fullmatch(r"[+-]?\d+", answer.strip()):
        raise BadRow(f"answer '{shown}' is a number written as a text: write a letter, or an integer counted from 0")
    raise BadRow(f"answer '{shown}' is neither a choice's letter nor its index")


def _choices(value: object) -> tuple[str, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise BadRow(f"the choices are {kind_of(value)}, not a list of texts")
    if not MIN_CHOICES <= len(value) <= MAX_CHOICES:
        raise BadRow(f"{len(value)} choices: there must be {MIN_CHOICES} to {MAX_CHOICES}")
    texts = tuple(plain_text(choice, f"choice {LETTERS[i]}") for i, choice in enumerate(value))
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        if not text:
            raise BadRow(f"choice {LETTERS[i]} is empty")
        if text in first:
            raise BadRow(f"choices {LETTERS[first[text]]} and {LETTERS[i]} are equal")
        first[text] = i
    return texts


def _without_letters(choices: tuple[str, ...]) -> tuple[str, ...]:
    """The choices without "A) ", "B) ", ... if each has one. Letters in another order than the choices are refused."""
    matches = [_LETTERED.fullmatch(choice) for choice in choices]
    found = [match for match in matches if match]
    if len(found) < len(choices):
        return choices
    letters = "".join(match.group(1) for match in found)
    if letters != LETTERS[: len(choices)]:
        raise BadRow(
            f"the choices bear the letters {', '.join(letters)}, which are not their own: the answer is ambiguous"
        )
    return tuple(match.group(2) or "" for match in found)


def split_of(value: object) -> str:
    """The part that a row declares. Raises BadRow."""
    if value is None or value == "":
        return "train"
    if not isinstance(value, str):
        raise BadRow(f"the split is {kind_of(value)}, not a text")
    try:
        return SPLITS[value.strip().lower()]
    except KeyError:
        raise BadRow(f"unknown split '{printable(value, 40)}': use train, validation or test") from None


def plain_text(value: object, what: str) -> str:
    """A text without outer blanks. Raises BadRow where it is none, or holds what no table takes."""
    if not isinstance(value, str):
        raise BadRow(f"the {what} is {kind_of(value)}, not a text")
    unusable = _UNUSABLE.search(value)
    if unusable:
        raise BadRow(f"the {what} holds the unusable character U+{ord(unusable.group()):04X}")
    return value.strip()


def checked_name(value: str, what: str) -> str:
    """A name that tables can show. Raises BadRow."""
    fault = name_fault(value)
    if fault:
        raise BadRow(f"the {what} {fault}")
    return value.strip()


def kind_of(value: object) -> str:
    """What a value is, in words."""
    names = {bool: "true or false", int: "a number", float: "a number with a point", str: "a text", list: "a list"}
    if value is None:
        return "missing"
    return names.get(type(value), "an object" if isinstance(value, Mapping) else f"of type {type(value).__name__}")


def seeded_key(seed: int, purpose: str, text: str) -> bytes:
    """16 bytes that order texts at random but the same on every machine; `purpose` keeps two orders independent."""
    data = f"{seed}\0{purpose}\0{text}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=16).digest()
