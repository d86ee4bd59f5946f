"""Encoded questions are written a row group at a time, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roma_ray.engine.question_table import read_prompts
from roma_ray.errors import ConfigError, QuestionError, RomaError
from roma_ray.questions.asked import AskedQuestions
from roma_ray.questions.prompts import Prompt
from roma_ray.questions.records import Question, Rejected
from roma_ray.stages import question_writer
from roma_ray.stages.encoding import encoded_schema
from roma_ray.stages.question_writer import QuestionWriter

COUNT = 50


def asked(count: int = COUNT, splits: tuple[str, ...] = ("train", "validation", "test")) -> AskedQuestions:
    questions = [
        Question(f"q{n}", f"t{n % 2}", f"Q{n}?", ("x", "y"), n % 2, split=splits[n % len(splits)]) for n in range(count)
    ]
    return AskedQuestions([("q.jsonl", iter([Rejected("q.jsonl", 1, "bad", "no answer"), *questions]))])


def encoded(questions: AskedQuestions, at_once: int = 7, unusable: int = 10) -> Iterator[pa.Table]:
    """Every so many questions one has no prompt."""
    rows = []
    for n, question in enumerate(questions.questions()):
        row = {name: getattr(question, name) for name in ("id", "task", "split", "question", "choices", "file", "line")}
        if n % unusable == 0:
            rows.append({**row, "reason": f"too long: {n}"})
        else:
            asked = {"prompt_ids": range(n % 7 + 1), "choice_ids": [[1], [2, 3]], "choice_chars": [1, 1], "answer": 0}
            rows.append({**row, **asked, "truncated": n == 3})
    for start in range(0, len(rows), at_once):
        yield pa.Table.from_pylist(rows[start : start + at_once], encoded_schema(free=False))


def prompts(questions: AskedQuestions) -> list[Prompt]:
    return [
        Prompt(q.id, q.task, q.split, tuple(range(n % 7 + 1)), ((1,), (2, 3)), (1, 1), 0, n == 3)
        for n, q in enumerate(questions.questions())
        if n % 10
    ]


@pytest.mark.parametrize(("group", "at_once"), [(10, 4), (10, 100), (1000, 7)])
def test_rows_and_counts_do_not_depend_on_the_groups(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, group: int, at_once: int
) -> None:
    monkeypatch.setattr(question_writer, "PART_ROWS", group)
    questions = asked()
    with QuestionWriter(questions, free=False) as writer:
        writer.write(tmp_path / "q.parquet", encoded(questions, at_once), ())
        faults = writer.faults.table().to_pylist()
    expected = prompts(questions)
    assert list(read_prompts(tmp_path / "q.parquet")) == expected
    file = pq.ParquetFile(tmp_path / "q.parquet")
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == {
        10: [10, 10, 10, 10, 5],
        1000: [45],
    }[group]
    table = file.read().to_pydict()
    assert table["row"] == list(range(45))
    assert table["question"] == [f"Q{n}?" for n in range(COUNT) if n % 10]
    assert [fault["reason"] for fault in faults] == ["no answer", *(f"too long: {n}" for n in range(0, COUNT, 10))]
    assert writer.used_N.tolist() == [n % 10 > 0 for n in range(COUNT)]
    assert (writer.rows, writer.truncated, writer.splits.total()) == (45, 1, 45)
    assert set(writer.task_splits) == {(p.task, p.split) for p in expected}


@pytest.mark.parametrize(
    ("questions", "unusable", "held_out", "error", "said"),
    [
        (asked(), 1, (), QuestionError, r"none of the 50 questions has a usable prompt. The first: too long: 0"),
        (asked(splits=("train", "test")), 10, (), QuestionError, "no usable validation questions among 45"),
        (asked(), 10, ("unheard",), ConfigError, "no question is of a task 'unheard'"),
    ],
)
def test_what_training_could_not_use_is_not_written(
    tmp_path: Path,
    questions: AskedQuestions,
    unusable: int,
    held_out: tuple[str, ...],
    error: type[RomaError],
    said: str,
) -> None:
    with QuestionWriter(questions, free=False) as writer, pytest.raises(error, match=said):
        writer.write(tmp_path / "q.parquet", encoded(questions, unusable=unusable), held_out)
    assert list(tmp_path.iterdir()) == []
