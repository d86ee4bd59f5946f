"""Benchmarks from files, for machines without the hub: the data sets' own columns, or question records converted to them.

`DIR/<task>/<split>.jsonl|jsonl.gz|parquet`, or the hub's own layout below `DIR/<task>`: shards
(`validation-00000-of-00001.parquet`) and the folders `data` or that of the data set's configuration (`ARC-Easy`). MMLU's parts
lie in `DIR/mmlu/<subject>/`, or in files with a `subject` column. Or one file `DIR/<task>.jsonl|...` whose rows name their
`split`. A split that two files claim is refused. The stock task definitions stay as they are; only where the rows come from
changes. A benchmark is whole or refused: no row is set aside.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from roma_ray.borders.text import printable
from roma_ray.errors import QuestionError
from roma_ray.questions.jsonl import EmptyLine, jsonl_rows
from roma_ray.questions.parquet import parquet_rows
from roma_ray.questions.records import LETTERS, BadRow, answer_index

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
WHOLE = "*"
# The hub names a split's files `split-00000-of-00002.parquet`.
_FILE = re.compile(
    r"(?P<split>.+?)(?:-(?P<number>\d{5})-of-(?P<count>\d{5}))?(?P<suffix>\.jsonl|\.jsonl\.gz|\.parquet)"
)
# What rows of one file may say besides: a task reads some splits, and data sets have others.
_OTHER_SPLITS = ("train", "validation", "test")


def find_files(folder: Path, task: str, part: str | None, splits: Collection[str]) -> dict[str, list[Path]]:
    """Files of a task by split, those of `splits` alone, or under WHOLE one file that holds all; empty where there are none.

    `part` is the data set's configuration (MMLU's subject), whose files may lie under the group's name. Raises QuestionError
    when several files claim a split, or shards of one are missing.
    """
    group = task.removesuffix(f"_{part}") if part and task.endswith(f"_{part}") else None
    names = [task] if group is None else [task, group]
    # On the hub `all` holds every part of MMLU. A link to a folder that is looked into anyway is no second claim.
    inners = ("", "data", part or "", *(["all"] if group else []))
    places: dict[Path, Path] = {}
    for place in (folder / name / inner for name in names for inner in inners):
        places.setdefault(place.resolve(), place)
    claims: dict[str, dict[object, list[Path]]] = {}
    for place in places.values():
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            match = _FILE.fullmatch(file.name)
            if match and match["split"] in splits and file.is_file():
                # Shards of one number and kind are one claim.
                claims.setdefault(match["split"], {}).setdefault((place, match["count"], match["suffix"]), []).append(
                    file
                )
    for name in names if group is None else [task, f"{group}/{part}", group]:
        for suffix in SUFFIXES:
            if (whole := folder / f"{name}{suffix}").is_file():
                claims.setdefault(WHOLE, {})[whole] = [whole]
    return _unambiguous(claims, task)


def _unambiguous(claims: Mapping[str, Mapping[object, list[Path]]], task: str) -> dict[str, list[Path]]:
    """The one claim to each split. Raises QuestionError."""
    for split, found in claims.items():
        # One file that holds all is a rival of every other.
        rivals = [files[0] for name in (claims if WHOLE in claims else [split]) for files in claims[name].values()]
        if len(rivals) > 1:
            what = "rows" if WHOLE in claims else f"{split} split"
            raise QuestionError(
                f"{task}'s {what} could be read from {' or '.join(map(str, rivals[:3]))}: keep one of them in --data-dir"
            )
        (files,) = found.values()
        shards = [match for file in files if (match := _FILE.fullmatch(file.name)) and match["count"]]
        if shards and [int(shard["number"]) for shard in shards] != list(range(int(shards[0]["count"]))):
            raise QuestionError(
                f"{files[0].parent} holds {len(shards)} of the {int(shards[0]['count'])} shards of {task}'s {split} split"
            )
    return {split: next(iter(found.values())) for split, found in claims.items()}


def read_splits(
    files: Mapping[str, Sequence[Path]], task: str, part: str | None, default: str, splits: Collection[str]
) -> dict[str, list[Row]]:
    """Rows of `splits` in the data set's columns; rows of one file without a `split` are of `default`. Raises QuestionError."""
    found: dict[str, list[Row]] = {}
    for name, file in ((name, file) for name, some in files.items() for file in some):
        for line, row in _rows(file):
            if part is not None and "subject" in row and task.endswith(f"_{part}") and row["subject"] != part:
                continue
            split = name if name != WHOLE else row.get("split") or default
            if split not in splits:
                if split in _OTHER_SPLITS:
                    continue
                known = ", ".join(sorted({*splits, *_OTHER_SPLITS}))
                raise QuestionError(f"{file}, row {line}: its split is {printable(str(split), 40)!r}, none of {known}")
            try:
                found.setdefault(split, []).append(to_hub_row(task, row))
            except BadRow as error:
                raise QuestionError(f"{file}, row {line}: {error}") from None
    return found


def _rows(file: Path) -> Iterator[tuple[int, Row]]:
    """The numbered rows of a JSON-lines or Parquet file, blank lines left out. Raises QuestionError at the first bad one."""
    name, parquet = str(file), file.name.endswith(".parquet")
    rows = parquet_rows(file, name=name, questions=False) if parquet else jsonl_rows(file, name=name)
    for number, take in enumerate(rows, start=1):
        try:
            yield number, dict(take())
        except EmptyLine:
            continue
        except BadRow as error:
            raise QuestionError(f"{file}, row {number}: {error}") from None


def to_hub_row(task: str, row: Row) -> Row:
    """A row in the data set's own columns; question records of the eight named benchmarks are converted. Raises BadRow."""
    for name, (own, convert) in _CONVERTERS.items():
        if task == name or (name == "mmlu" and task.startswith("mmlu_")):
            if name in ("mmlu", "gsm8k"):
                return convert(row)
            if not own.keys() <= row.keys():
                return convert(row)
            for column, valid in own.items():
                if not valid(row[column]):
                    raise BadRow(f"its {column} is {printable(repr(row[column]), 40)}, which {name} has not")
            return row
    return row


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: type(value) in {type(v) for v in values} and value in values


def _endings(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(map(_text, value))


def _labelled(value: Any) -> bool:
    return (
        isinstance(value, dict) and _endings(value.get("text")) and len(value.get("label") or ()) == len(value["text"])
    )


def _parts(row: Row, count: int | None = None, *, context: bool = False) -> tuple[str, list[str], int]:
    """(question, choices, answer's index) of a question record."""
    question, choices = row.get("question"), row.get("choices")
    if not isinstance(question, str) or not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise BadRow(
            f"its columns ({', '.join(sorted(row)[:8])}) are neither the data set's own nor those of a question record "
            "(question, choices, answer)"
        )
    if count is not None and len(choices) != count:
        raise BadRow(f"{len(choices)} choices; this benchmark's questions have {count}")
    if row.get("context") and not context:
        raise BadRow("this benchmark's questions have no context; put it into the question")
    return question, choices, answer_index(row.get("answer"), len(choices))


def _arc(row: Row) -> Row:
    question, choices, answer = _parts(row)
    labels = list(LETTERS[: len(choices)])
    return {
        "id": str(row.get("id", "")),
        "question": question,
        "choices": {"text": choices, "label": labels},
        "answerKey": labels[answer],
    }


def _hellaswag(row: Row) -> Row:
    question, choices, answer = _parts(row)
    activity, separator, context = question.partition(": ")
    if not separator:
        raise BadRow("a HellaSwag record's question is written as `activity: context`")
    # The stock prompt joins ctx_a and ctx_b by a blank; with all in the first, the blank is stripped again.
    return {"activity_label": activity, "ctx_a": context, "ctx_b": "", "endings": choices, "label": str(answer)}


def _piqa(row: Row) -> Row:
    question, choices, answer = _parts(row, 2)
    return {"goal": question, "sol1": choices[0], "sol2": choices[1], "label": answer}


def _winogrande(row: Row) -> Row:
    question, choices, answer = _parts(row, 2)
    if "_" not in question:
        raise BadRow("a WinoGrande record's question has the blank as `_`")
    return {"sentence": question, "option1": choices[0], "option2": choices[1], "answer": str(answer + 1)}


def _boolq(row: Row) -> Row:
    question, choices, answer = _parts(row, 2, context=True)
    if [c.lower() for c in choices] != ["no", "yes"]:
        raise BadRow("a BoolQ record's choices are no and yes, in this order")
    # The stock prompt adds the question mark, which records have already.
    return {
        "question": question.removesuffix("?"),
        "passage": row.get("context") or row.get("passage") or "",
        "label": answer,
    }


def _mmlu(row: Row) -> Row:
    question, choices, answer = _parts(row, 4)
    return {"question": question, "subject": str(row.get("subject", "")), "choices": choices, "answer": answer}


def _gsm8k(row: Row) -> Row:
    if "choices" in row:
        raise BadRow("a GSM8K record has no choices: its answer is the number")
    question, answer, solution = row.get("question"), row.get("answer"), row.get("solution", "")
    if not isinstance(question, str) or not isinstance(answer, str) or not isinstance(solution, str):
        raise BadRow("a GSM8K record has the texts question, answer (the number) and solution")
    if "####" in answer:
        return {"question": question, "answer": answer}
    return {"question": question, "answer": solution if "####" in solution else f"{solution}\n#### {answer}".lstrip()}


_Columns = dict[str, Callable[[Any], bool]]
_ARC: _Columns = {"question": _text, "choices": _labelled, "answerKey": _text}
# Task -> (the data set's columns that the stock task reads, conversion of a question record).
_CONVERTERS: dict[str, tuple[_Columns, Callable[[Row], Row]]] = {
    "arc_challenge": (_ARC, _arc),
    "arc_easy": (_ARC, _arc),
    "hellaswag": (
        {
            "activity_label": _text,
            "ctx_a": lambda value: isinstance(value, str),
            "ctx_b": lambda value: isinstance(value, str),
            "endings": _endings,
            # Text on the hub, numbers in its authors' files; the stock task takes both.
            "label": _one_of(*"0123", 0, 1, 2, 3),
        },
        _hellaswag,
    ),
    "piqa": ({"goal": _text, "sol1": _text, "sol2": _text, "label": _one_of(0, 1)}, _piqa),
    "winogrande": ({"sentence": _text, "option1": _text, "option2": _text, "answer": _one_of("1", "2")}, _winogrande),
    "boolq": ({"question": _text, "passage": _text, "label": _one_of(0, 1)}, _boolq),
    "mmlu": ({}, _mmlu),
    "gsm8k": ({}, _gsm8k),
}
