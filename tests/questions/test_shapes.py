"""Rows of other shapes: by a mapping of columns from files and the hub, ARC's and OpenBookQA's without one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from roma_ray.config.loading import load_config, parse_config
from roma_ray.config.schema import QuestionSource
from roma_ray.errors import ConfigError, QuestionError
from roma_ray.questions.readers import read_questions
from roma_ray.questions.records import Question, Rejected

TEXTS = ["heat", "salt", "a lid"]
HUB = {"id": "a1", "question": "What boils?", "choices": {"text": TEXTS, "label": ["A", "B", "C"]}, "answerKey": "B"}
DIGITS = {**HUB, "id": "a2", "choices": {"text": TEXTS, "label": ["1", "2", "3"]}, "answerKey": "2"}
STEM = {"id": "a3", "question_stem": "What boils?", "choices": HUB["choices"], "answerKey": "B"}
AUTHORS = {
    "id": "a4",
    "question": {
        "stem": "What boils?",
        "choices": [{"text": t, "label": k} for t, k in zip(TEXTS, "ABC", strict=True)],
    },
    "answerKey": "B",
}
MINE = {"q": {"text": "What boils?"}, "options": [{"t": t} for t in TEXTS], "gold": 1, "no": 7}


def read(path: Path, **source: Any) -> tuple[list[Question], list[Rejected]]:
    return read_questions([QuestionSource(path=str(path), **source)])


def jsonl(path: Path, *rows: Mapping[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def assert_right(questions: Iterable[Question], count: int) -> None:
    found = list(questions)
    assert len(found) == count
    for question in found:
        assert (question.question, question.choices, question.answer) == ("What boils?", tuple(TEXTS), 1)


def test_the_known_shape_is_read_without_a_mapping(tmp_path: Path) -> None:
    questions, rejected = read(jsonl(tmp_path / "arc.jsonl", HUB, DIGITS, STEM, AUTHORS))
    assert not rejected
    assert_right(questions, 4)
    assert [q.id for q in questions] == ["a1", "a2", "a3", "a4"]


@pytest.mark.parametrize("row", [HUB, DIGITS, STEM], ids=["hub", "digits", "stem"])
def test_the_known_shape_is_read_from_parquet(row: dict[str, Any], tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "arc.parquet")
    questions, rejected = read(tmp_path / "arc.parquet")
    assert not rejected
    assert_right(questions, 1)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (HUB, {"question": "question", "choices": "choices.text", "answer": "answerKey"}),
        (DIGITS, {"choices": "choices.text", "answer": "answerKey"}),
        (MINE, {"question": "q.text", "choices": "options.t", "answer": "gold"}),
        (
            {"question": "What boils?", "a": "heat", "b": "salt", "c": "a lid", "answer": "B"},
            {"choices": ["a", "b", "c"]},
        ),
        ({"question": "What boils?", "choices": TEXTS, "right": "salt"}, {"answer": "right"}),
        (
            {"question": "What boils?", "choices": TEXTS, "keys": ["x", "y", "z"], "right": "y"},
            {"answer": "right", "labels": "keys"},
        ),
    ],
    ids=["arc", "digits", "nested", "several columns", "text", "labels"],
)
def test_a_mapping_reads_any_shape_alike_from_both_kinds_of_file(
    row: dict[str, Any], columns: dict[str, Any], tmp_path: Path
) -> None:
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    for path in (jsonl(tmp_path / "rows.jsonl", row), tmp_path / "rows.parquet"):
        questions, rejected = read(path, columns=columns)
        assert not rejected
        assert_right(questions, 1)


def test_names_of_optional_fields_are_mapped_or_taken_where_they_are(tmp_path: Path) -> None:
    row = {**MINE, "id": 7, "topic": "kitchen", "fold": "dev", "passage": "Water."}
    columns = {
        "question": "q.text",
        "choices": "options.t",
        "answer": "gold",
        "task": "topic",
        "split": "fold",
        "context": "passage",
    }
    ((question,), _) = read(jsonl(tmp_path / "rows.jsonl", row), columns=columns)
    assert (question.id, question.task, question.split, question.context) == ("7", "kitchen", "validation", "Water.")


@pytest.mark.parametrize(
    ("row", "columns", "reason"),
    [
        ({**HUB, "answerKey": "E"}, None, "out of range"),
        ({**HUB, "choices": {"text": TEXTS, "label": ["A", "B"]}}, None, "labels do not match"),
        (
            {**HUB, "choices": {"text": TEXTS, "label": ["A", "A", "B"]}, "answerKey": "A"},
            None,
            "two choices have the label 'A'",
        ),
        ({**HUB, "choices": {"text": TEXTS}, "answerKey": "2"}, None, "number written as a text"),
        ({"answerKey": "A"}, None, "no field `question`"),
        (
            MINE,
            {"question": "q.text", "choices": "options.t", "answer": "key"},
            "no column `key` (the row has q, options, gold, no)",
        ),
        (MINE, {"question": "q", "choices": "options.t", "answer": "gold"}, "the question is an object"),
    ],
)
def test_a_row_that_does_not_fit_is_set_aside_with_the_reason(
    row: dict[str, Any], columns: dict[str, Any] | None, reason: str, tmp_path: Path
) -> None:
    good = (
        {"question": "What boils?", "choices": TEXTS, "answer": "B"}
        if columns is None
        else MINE | {"key": 1, "q": {"text": "x"}}
    )
    path = jsonl(tmp_path / "rows.jsonl", row, good)
    if columns is None or "key" in columns.values():
        _, (rejected,) = read(path, columns=columns)
        assert reason in rejected.reason
    else:
        with pytest.raises(QuestionError, match=reason):
            read(path, columns=columns)


def test_a_mapping_that_misses_a_parquet_file_s_columns_is_told_with_those_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([MINE]), tmp_path / "rows.parquet")
    with pytest.raises(QuestionError, match=r"no column `answer` \(its columns: q, options, gold, no\)"):
        read(tmp_path / "rows.parquet", columns={"question": "q.text", "choices": "options.t"})


def test_any_data_set_of_the_hub_is_read(tmp_path: Path) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def hub(path: str, subset: str | None, part: str) -> Iterable[Mapping[str, Any]]:
        asked.append((path, subset, part))
        return [{**HUB, "id": f"{part}-{n}"} for n in range(5)]

    sources = [
        QuestionSource(dataset="allenai/ai2_arc", subset="ARC-Easy", limit=3),
        QuestionSource(dataset="allenai/ai2_arc", subset="ARC-Easy", part="test"),
    ]
    questions, rejected = read_questions(sources, loader=hub)
    assert not rejected
    assert asked == [("allenai/ai2_arc", "ARC-Easy", "train"), ("allenai/ai2_arc", "ARC-Easy", "test")]
    assert [q.split for q in questions] == ["train"] * 3 + ["test"] * 5
    assert {q.task for q in questions} == {"ai2_arc/ARC-Easy"}
    assert_right(questions, 8)


def test_a_hub_data_set_of_another_shape_says_how_it_is_read() -> None:
    with pytest.raises(QuestionError, match="`columns` says where"):
        read_questions([QuestionSource(dataset="some/set")], loader=lambda *_: [MINE])
    columns = {"question": "q.text", "choices": "options.t", "answer": "gold"}
    questions, _ = read_questions([QuestionSource(dataset="some/set", columns=columns)], loader=lambda *_: [MINE])
    assert_right(questions, 1)
    with pytest.raises(ConfigError, match="owner/name"):
        read_questions([QuestionSource(dataset="ai2_arc")], loader=lambda *_: [])


@pytest.mark.parametrize(
    "source",
    [
        {"path": "x.jsonl", "subset": "a"},
        {"path": "x.jsonl", "part": "test"},
        {"dataset": "openbookqa", "part": "test"},
        {"dataset": "openbookqa", "columns": {"question": "q"}},
        {"path": "x.jsonl", "columns": {"questoin": "q"}},
    ],
)
def test_settings_that_would_do_nothing_are_refused(source: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        QuestionSource(**source)


# -- the format belongs to the model -----------------------------------------------------------------------------------


def test_the_embedded_model_is_asked_in_its_own_format() -> None:
    sources = {"sources": [{"path": "q.jsonl"}]}
    assert parse_config({"model": {"path": "assets:model"}, "questions": sources}).questions.prompt.format == "cloze"
    assert parse_config({"model": {"path": "other"}, "questions": sources}).questions.prompt.format == "letter"
    said = {**sources, "prompt": {"format": "letter", "max_tokens": 99}}
    assert parse_config({"model": {"path": "assets:model"}, "questions": said}).questions.prompt.format == "letter"
    kept = parse_config({"model": {"path": "assets:model"}, "questions": {**sources, "prompt": {"max_tokens": 99}}})
    assert (kept.questions.prompt.format, kept.questions.prompt.max_tokens) == ("cloze", 99)
    assert load_config().questions.prompt.format == "cloze"
