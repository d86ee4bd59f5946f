"""Questions that lie in a table come back as they were, and are split as those that are held."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from roma_ray.questions import asked
from roma_ray.questions.asked import AskedQuestions
from roma_ray.questions.records import Question, Rejected
from roma_ray.questions.splits import PARTS, assign_splits, divided_splits, drawn_splits, split_by_task
from roma_ray.store import scratch, tables

SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}


def rows() -> Iterator[tuple[str, list[Question | Rejected]]]:
    """Two sources, of which the second declares some validation rows and has forms of its own."""
    first: list[Question | Rejected] = [
        Question(f"a{n}", f"t{n % 3}", f"Q{n}?", ("x", "yé"), n % 2, None if n % 2 else "c", file="a", line=n)
        for n in range(30)
    ]
    first.insert(4, Rejected("a", 5, "bad", "no answer"))
    turns = (("user", "Which?"), ("assistant", "That."))
    second: list[Question | Rejected] = [
        Question("b0", "u", "Which?", ("x",), 0, split="validation", form="messages", turns=turns, verdict=True),
        *(Question(f"b{n}", "u", "Which?", ("x", "y"), 0, verdict=None if n % 2 else False) for n in range(1, 9)),
    ]
    yield "a", first
    yield "b", second


@pytest.fixture(params=["held", "mapped"])
def read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[AskedQuestions]:
    monkeypatch.setattr(scratch, "scratch_root", lambda: tmp_path)
    monkeypatch.setattr(asked, "_AT_ONCE", 7)
    if request.param == "mapped":
        monkeypatch.setattr(tables, "HELD_BYTES", 300)
    yield AskedQuestions((name, iter(of)) for name, of in rows())
    assert list(tmp_path.iterdir()) == []


def test_questions_come_back_as_they_were_read(read: AskedQuestions) -> None:
    every = [row for _, of in rows() for row in of]
    questions = [row for row in every if isinstance(row, Question)]
    found = list(read.questions())
    assert found == questions
    assert [(q.file, q.line) for q in found] == [(q.file, q.line) for q in questions]
    assert list(read.ids()) == [q.id for q in questions]
    assert len(read) == len(questions)
    assert (read.sources, read.source_codes().tolist()) == (["a", "b"], [0] * 30 + [1] * 9)
    assert read.forms == {"choices", "messages"}
    assert read.faults.to_pylist() == [{"file": "a", "line": 5, "id": "bad", "reason": "no answer"}]


def test_they_are_split_as_questions_that_are_held(read: AskedQuestions) -> None:
    questions = list(read.questions())
    drawn = drawn_splits(read.declared, validation_fraction=0.2, test_fraction=0.3, seed=1)
    assert list(read.questions(drawn)) == assign_splits(questions, validation_fraction=0.2, test_fraction=0.3, seed=1)
    divided = divided_splits(read.declared, SHARES, seed=1)
    assert list(read.questions(divided)) == split_by_task(questions, SHARES, seed=1)
    assert [replace(q, split="train") for q in read.questions(divided)] != list(read.questions(divided))
    assert {PARTS[part] for part in divided.tolist()} == set(SHARES)


def test_what_reading_raises_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scratch, "scratch_root", lambda: tmp_path)
    monkeypatch.setattr(tables, "HELD_BYTES", 300)

    def failing() -> Iterator[Question | Rejected]:
        yield from next(rows())[1] * 300
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="gone"):
        AskedQuestions([("a", failing())])
    assert list(tmp_path.iterdir()) == []
