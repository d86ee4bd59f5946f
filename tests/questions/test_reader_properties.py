"""Whatever the bytes: each line is a question or a rejected row, and nothing but a QuestionError is raised."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from roma_ray.config.schema import QuestionSource
from roma_ray.errors import QuestionError
from roma_ray.questions.free_records import FORMS
from roma_ray.questions.jsonl import jsonl_rows
from roma_ray.questions.readers import read_questions
from roma_ray.questions.records import Question, Rejected
from roma_ray.questions.shapes import questions_of

PROPERTY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["A", "B", "0"])
)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=4), v, max_size=3), max_leaves=8
)
FIELDS = st.sampled_from(["id", "task", "question", "choices", "answer", "context", "split", "other"])
ROWS = st.dictionaries(FIELDS, VALUES, max_size=8)
NEARLY_GOOD = st.fixed_dictionaries(
    {"question": st.text(max_size=6), "choices": st.lists(st.text(max_size=4), max_size=5), "answer": SCALARS},
    optional={"id": SCALARS, "split": st.sampled_from(["train", "dev", "test", "no"]), "context": st.text(max_size=4)},
)
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": SCALARS}) | SCALARS,
    max_size=3,
)
FREE_FIELDS = st.sampled_from(["id", "task", "question", "prompt", "text", "answer", "answers", "correct", "choices"])
FREE_ROWS = st.dictionaries(FREE_FIELDS, VALUES, max_size=6) | st.fixed_dictionaries(
    {"messages": TURNS}, optional={"correct": st.booleans(), "split": st.sampled_from(["train", "no"])}
)
FREE_LINES = st.lists(FREE_ROWS.map(lambda row: json.dumps(row).encode()), max_size=8)
LINES = st.lists(st.binary(max_size=60) | (ROWS | NEARLY_GOOD).map(lambda row: json.dumps(row).encode()), max_size=8)


def check(path: Path, lines_in: int) -> None:
    lines = jsonl_rows(path, name=path.name)
    rows = list(questions_of(lines, name=path.name, ids="", task=None, default_task="t", split=None, columns=None))
    assert [row.line for row in rows] == list(range(1, lines_in + 1))
    for row in rows:
        if isinstance(row, Question):
            assert row.question.strip()
            assert 2 <= len(set(row.choices)) == len(row.choices) <= 26
            assert all(choice.strip() for choice in row.choices)
            assert 0 <= row.answer < len(row.choices)
            assert row.split in ("train", "validation", "test")
            "".join([row.id, row.question, *row.choices, row.context or "", row.task]).encode()
        else:
            assert isinstance(row, Rejected)
            assert row.reason
            f"{row.id}{row.reason}".encode()


@PROPERTY
@given(FREE_LINES)
@example([b'{"text": "\\ud800"}'])
@example([b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'])
def test_every_line_without_choices_is_a_question_or_rejected(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    rows = list(
        questions_of(
            jsonl_rows(path, name="q"),
            name="q",
            ids="",
            task=None,
            default_task="t",
            split=None,
            columns=None,
            free=True,
        )
    )
    assert [row.line for row in rows] == list(range(1, len(lines) + 1))
    for row in rows:
        if isinstance(row, Rejected):
            assert row.reason
            continue
        assert row.form in FORMS
        assert row.question.strip()
        assert row.choices
        assert all(choice.strip() for choice in row.choices)
        assert bool(row.turns) == (row.form == "messages")
        "".join([row.id, row.question, *row.choices, *(content for _, content in row.turns)]).encode()


def outcome(path: Path) -> list[Question] | str:
    """The questions of a file, or the text of its QuestionError; every other exception goes through."""
    try:
        return read_questions([QuestionSource(path=str(path))])[0]
    except QuestionError as error:
        return str(error)


@PROPERTY
@given(LINES)
@example([b""])
@example([b'{"question": "\\ud800", "choices": ["a", "b"], "answer": 0, "id": "\\udfff"}'])
def test_every_line_is_a_question_or_rejected(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "q.jsonl"
    data = b"".join(line + b"\n" for line in lines)
    path.write_bytes(data)
    if data.startswith(b"\x1f\x8b"):
        return
    check(path, data.count(b"\n"))
    path.write_bytes(gzip.compress(data))
    check(path, data.count(b"\n"))


@PROPERTY
@given(st.binary(max_size=400), st.sampled_from(["q.jsonl", "q.jsonl.gz", "q.parquet"]))
@example(b"\x1f\x8b\x08\x00" + b"\x00" * 20, "q.jsonl")
@example(b"PAR1" + b"\x00" * 40 + b"PAR1", "q.parquet")
def test_arbitrary_bytes_raise_nothing_but_question_errors(tmp_path: Path, data: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    result = outcome(path)
    assert result
    assert isinstance(result, list) or name in result


@PROPERTY
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=8))
def test_damaged_files_raise_nothing_but_question_errors(
    tmp_path: Path, tables: dict[str, bytes], position: int, patch: bytes
) -> None:
    for name, data in tables.items():
        at = position % len(data)
        path = tmp_path / name
        path.write_bytes(data[:at] + patch + data[at + len(patch) :])
        result = outcome(path)
        assert result
        assert isinstance(result, list) or name in result


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = [
        {"id": f"q{i}", "question": f"Which of {i}?", "choices": ["x", "y", f"z{i}"], "answer": "ABC"[i % 3]}
        for i in range(40)
    ]
    folder = tmp_path_factory.mktemp("tables")
    pq.write_table(pa.Table.from_pylist(rows), folder / "q.parquet")
    packed = gzip.compress("\n".join(json.dumps(row) for row in rows).encode())
    return {"q.parquet": (folder / "q.parquet").read_bytes(), "q.jsonl.gz": packed}
