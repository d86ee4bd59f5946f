"""Rows of other shapes as question rows: by a mapping of columns, and ARC's and OpenBookQA's shape without one.

    {"question": "...", "choices": {"text": [...], "label": ["A", ...]}, "answerKey": "B"}             the hub's form
    {"question": {"stem": "...", "choices": [{"text": "...", "label": "A"}, ...]}, "answerKey": "B"}   the authors' files
    {"question_stem": "...", "choices": ..., "answerKey": "2"}                                         OpenBookQA's name

An answer that is one of the labels, letter or digit, is the choice of that label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from roma_ray.borders.text import printable
from roma_ray.config.schema import ColumnsConfig
from roma_ray.questions.free_records import free_question_from_row
from roma_ray.questions.records import BadRow, Question, Rejected, question_from_row, row_id

KEY = "answerKey"
"""The column by which the known shape is told from question rows."""
KNOWN = ("question", "question_stem", "choices", KEY, "id", "task", "split", "context")
"""Columns of the known shape."""
_OPTIONAL = ("context", "id", "task", "split")

Row = Mapping[str, Any]
Take = Callable[[], Row]
"""Makes one row of a file; raises BadRow where it cannot be read, which spoils that row alone."""


def questions_of(
    rows: Iterable[Take],
    *,
    name: str,
    ids: str,
    task: str | None,
    default_task: str,
    split: str | None,
    columns: ColumnsConfig | None,
    hint: str = "",
    free: bool = False,
) -> Iterator[Question | Rejected]:
    """Each row as a `Question` or a `Rejected`; `name` stands for their file, `ids` and the row's number for a missing id.

    `hint` is added to each reason. `free`: the rows have no choices (`free_records`).
    """
    make = free_question_from_row if free else question_from_row
    shape = _asked if free else shaped
    for number, take in enumerate(rows, start=1):
        id = default_id = f"{ids}{number}"
        try:
            row = shape(take(), columns)
            id = row_id(row) or default_id
            yield make(
                row, file=name, line=number, default_id=default_id, task=task, default_task=default_task, split=split
            )
        except BadRow as error:
            yield Rejected(name, number, printable(id), f"{error}{hint}")


def shaped(row: Row, columns: ColumnsConfig | None) -> Row:
    """The row with the fields of a question (`records`); one that is a question row already stays as it is.

    Raises:
        BadRow: a mapped column is not there, or labels and choices do not match.
    """
    if columns is not None:
        return _mapped(row, columns)
    return labelled(row) if KEY in row and "answer" not in row else row


def _asked(row: Row, columns: ColumnsConfig | None) -> Row:
    """The row with the fields of a free-form question. Raises BadRow where a mapped column is not there."""
    if columns is None:
        return row
    found = {name: row[name] for name in ("correct", "choices") if name in row}
    found |= {"question": _at(row, columns.question), "answer": _at(row, columns.answer)}
    return {**found, **_rest(row, columns)}


def top_columns(columns: ColumnsConfig, *, free: bool = False) -> tuple[list[str], list[str]]:
    """The table's columns that a mapping must find, and those that it takes where they are."""
    given = [columns.question, columns.answer, *([] if free else _choice_paths(columns))]
    given += [columns.labels] if columns.labels else []
    given += [path for name in _OPTIONAL if (path := getattr(columns, name))]
    needed = list(dict.fromkeys(path.partition(".")[0] for path in given))
    also = (*_OPTIONAL, "correct", "choices") if free else _OPTIONAL
    return needed, [name for name in also if not getattr(columns, name, None) and name not in needed]


def _choice_paths(columns: ColumnsConfig) -> tuple[str, ...]:
    return (columns.choices,) if isinstance(columns.choices, str) else columns.choices


def _mapped(row: Row, columns: ColumnsConfig) -> Row:
    paths = _choice_paths(columns)
    choices: Any = _at(row, paths[0]) if isinstance(columns.choices, str) else [_at(row, path) for path in paths]
    labels = None
    if columns.labels:
        labels = _at(row, columns.labels)
    elif len(paths) == 1 and paths[0].rpartition(".")[2] == "text":
        labels = _found(row, [*paths[0].split(".")[:-1], "label"])
    answer = _by_label(_at(row, columns.answer), labels, choices)
    if isinstance(answer, str) and isinstance(choices, Sequence) and list(choices).count(answer) == 1:
        # Many sets give the right choice's text.
        answer = list(choices).index(answer)
    return {"question": _at(row, columns.question), "choices": choices, "answer": answer, **_rest(row, columns)}


def _rest(row: Row, columns: ColumnsConfig) -> dict[str, Any]:
    """A mapped row's context, id, task and split, those that there are."""
    found = {}
    for name in _OPTIONAL:
        path = getattr(columns, name)
        value = _at(row, path) if path else row.get(name)
        if value is not None and (path or isinstance(value, str | int)):
            found[name] = value
    return found


def labelled(row: Row) -> dict[str, Any]:
    """A row of the known shape with the fields of a question. Raises BadRow where labels and choices do not match."""
    asked: Any = row.get("question", row.get("question_stem"))
    choices: Any = row.get("choices")
    if isinstance(asked, Mapping):
        asked, choices = asked.get("stem"), asked.get("choices", choices)
    labels = None
    if isinstance(choices, Mapping):
        labels, choices = choices.get("label"), choices.get("text")
    elif isinstance(choices, Sequence) and choices and all(isinstance(choice, Mapping) for choice in choices):
        labels, choices = [choice.get("label") for choice in choices], [choice.get("text") for choice in choices]
    rest = {name: row[name] for name in _OPTIONAL if name in row}
    return {**rest, "question": asked, "choices": choices, "answer": _by_label(row[KEY], labels, choices)}


def _by_label(answer: Any, labels: Any, choices: Any) -> Any:
    """The index of the choice of that label; the answer as it is where there are no labels or it is none of them."""
    if labels is None or answer is None:
        return answer
    if not isinstance(labels, Sequence) or isinstance(labels, str) or not isinstance(choices, Sequence):
        raise BadRow("its choices and their labels do not match")
    named = [str(label).strip() for label in labels]
    if len(named) != len(choices):
        raise BadRow("its choices and their labels do not match")
    key = str(answer).strip()
    if named.count(key) > 1:
        raise BadRow(f"two choices have the label '{printable(key, 40)}'")
    return named.index(key) if key in named else answer


def _at(row: Row, path: str) -> Any:
    """What lies at a dotted path; of a list of objects, the list of what each has there. Raises BadRow."""
    value = _found(row, path.split("."))
    if value is None and path.partition(".")[0] not in row:
        held = ", ".join(printable(name, 40) for name in list(row)[:20])
        raise BadRow(f"no column `{printable(path, 80)}` (the row has {held})")
    return value


def _found(value: Any, parts: Sequence[str]) -> Any:
    for n, part in enumerate(parts):
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [_found(item, parts[n:]) for item in value]
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value
