"""Question files: what is read, what is set aside and why, what is an error."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roma_ray.config.schema import QuestionSource
from roma_ray.errors import ConfigError, QuestionError
from roma_ray.questions import jsonl, readers
from roma_ray.questions.readers import asset, iter_questions, read_questions
from roma_ray.questions.records import Question, Rejected
from roma_ray.questions.shapes import Take, questions_of

GOOD: dict[str, Any] = {"id": "q1", "task": "t", "question": "Which?", "choices": ["one", "two"], "answer": "B"}


def line(**changes: Any) -> bytes:
    row = {**GOOD, **changes}
    return json.dumps({key: value for key, value in row.items() if value is not ...}).encode()


def write(path: Path, *lines: bytes, end: bytes = b"\n") -> Path:
    path.write_bytes(b"\n".join(lines) + end)
    return path


def read(*paths: Path, **source: Any) -> tuple[list[Question], list[Rejected]]:
    return read_questions([QuestionSource(path=str(path), **source) for path in paths])


def made(lines: Iterator[Take]) -> list[Question | Rejected]:
    return list(questions_of(lines, name="q", ids="q:", task=None, default_task="q", split=None, columns=None))


def reason_of(tmp_path: Path, bad: bytes) -> Rejected:
    """The one rejected row of a file with a good line before and after the bad one."""
    questions, rejected = read(write(tmp_path / "q.jsonl", line(id="before"), bad, line(id="after")))
    assert [q.id for q in questions] == ["before", "after"]
    assert len(rejected) == 1
    assert (rejected[0].file, rejected[0].line) == ("q.jsonl", 2)
    return rejected[0]


def test_a_whole_row_is_read(tmp_path: Path) -> None:
    row = line(context=" A passage. ", split="test", unknown={"ignored": [1, 2]}, solution="x")
    questions, rejected = read(write(tmp_path / "q.jsonl", row))
    assert questions == [Question("q1", "t", "Which?", ("one", "two"), 1, "A passage.", "test")]
    assert (questions[0].file, questions[0].line) == ("q.jsonl", 1)
    assert rejected == []


@pytest.mark.parametrize(
    ("answer", "index"), [("A", 0), ("b", 1), (" C ", 2), ("B)", 1), ("(C)", 2), ("A.", 0), (0, 0), (2, 2)]
)
def test_answers_are_letters_or_indices_from_zero(tmp_path: Path, answer: Any, index: int) -> None:
    questions, _ = read(write(tmp_path / "q.jsonl", line(choices=["x", "y", "z"], answer=answer)))
    assert questions[0].answer == index


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer": ...}, "no answer"),
        ({"answer": None}, "no answer"),
        ({"answer": ""}, "no answer"),
        ({"answer": "1"}, "a number written as a text"),
        ({"answer": "C"}, "answer C is out of range: the 2 choices are A to B"),
        ({"answer": 2}, "answer 2 is out of range: there are 2 choices, counted from 0"),
        ({"answer": -1}, "out of range"),
        ({"answer": 10**400}, "out of range"),
        ({"answer": 1.0}, "a number with a point"),
        ({"answer": True}, "true or false"),
        ({"answer": ["A"]}, "a list"),
        ({"answer": "two"}, "neither a choice's letter nor its index"),
        ({"choices": ...}, "no field `choices`"),
        ({"choices": "one, two"}, "the choices are a text, not a list"),
        ({"choices": {"label": ["A"], "text": ["x"]}}, "the choices are an object"),
        ({"choices": ["one"]}, "1 choices: there must be 2 to 26"),
        ({"choices": [str(i) for i in range(27)]}, "27 choices"),
        ({"choices": ["one", " "]}, "choice B is empty"),
        ({"choices": ["one", " one"]}, "choices A and B are equal"),
        ({"choices": ["one", 2]}, "choice B is a number"),
        ({"choices": ["B) one", "A) two"]}, "bear the letters B, A"),
        ({"choices": ["A) ", "B) two"]}, "choice A is empty"),
        ({"choices": ["A) one", "B) one"]}, "choices A and B are equal"),
        ({"question": ...}, "no field `question`"),
        ({"question": " \n"}, "the question is empty"),
        ({"question": 7}, "the question is a number"),
        ({"question": "nul \x00 inside"}, "U+0000"),
        ({"context": "bell \x07"}, "the context holds the unusable character U+0007"),
        ({"context": 3}, "the context is a number"),
        ({"choices": ["one", "half \ud83d"]}, "U+D83D"),
        ({"id": "two\nlines"}, "the id holds the unusable character U+000A"),
        ({"id": "x" * 600}, "the id is longer than 512"),
        ({"id": 1.5}, "the id is a number with a point"),
        ({"id": " "}, "the id is empty"),
        ({"task": 5}, "the task is a number"),
        ({"split": "holdout"}, "unknown split 'holdout'"),
        ({"split": 1}, "the split is a number"),
    ],
)
def test_bad_rows_are_set_aside_with_the_reason(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    rejected = reason_of(tmp_path, line(**changes))
    assert reason in rejected.reason
    # Fit to be stored and shown, whatever was in the row.
    f"{rejected.id} {rejected.reason}".encode()
    assert rejected.id.isprintable()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"question": "\xff"}', "invalid UTF-8 at byte 15 of the line"),
        (b'{"question": ', "invalid JSON"),
        (b"[1, 2]", "not a JSON object; one object a line"),
        (b'"text"', "not a JSON object"),
        (b"", "the line is empty"),
        (b"  \r", "the line is empty"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"answer": ' + b"9" * 5000 + b"}", "invalid JSON"),
        (line() + line(), "invalid JSON: Extra data"),
        (b'{"answer": "A", "answer": "B", "question": "Which?", "choices": ["x", "y"]}', "`answer` occurs twice"),
    ],
)
def test_broken_lines_spoil_only_themselves(tmp_path: Path, bad: bytes, reason: str) -> None:
    assert reason in reason_of(tmp_path, bad).reason


def test_over_long_lines_are_not_held_in_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", line(id="a"), line(context="x" * 5000), line(id="b"), end=b"")
    rows = made(jsonl.jsonl_rows(path, name="q", max_line_bytes=1000))
    assert [type(row).__name__ for row in rows] == ["Question", "Rejected", "Question"]
    assert isinstance(rows[1], Rejected)
    assert rows[1].reason == "the line is longer than 1000 bytes"


@pytest.mark.parametrize("over", [-1, 0, 1, 2, 3])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_the_length_limit_is_exact(tmp_path: Path, over: int, bom: bytes, end: bytes) -> None:
    text = line()
    path = write(tmp_path / "q.jsonl", bom + text, end=end)
    limit = len(text) - over
    rows = made(jsonl.jsonl_rows(path, name="q", max_line_bytes=limit))
    assert [type(row).__name__ for row in rows] == ["Question" if over <= 0 else "Rejected"]


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line(id="a") + b"\r\n" + line(id="b") + b"\r\n")
    questions, rejected = read(path)
    assert [q.id for q in questions] == ["a", "b"]
    assert rejected == []


def test_the_reference_evaluation_file(tmp_path: Path) -> None:
    rows = [
        {"question": "Which animal barks?", "choices": ["A) cat", "B) dog", "C) A) fish", "D) cow"], "answer": "B"},
        {"question": "Which one purrs?", "choices": ["A) cat", "B) dog"], "answer": "A"},
    ]
    path = write(tmp_path / "test.jsonl", *(json.dumps(row).encode() for row in rows))
    questions, _ = read(path)
    assert questions[0].choices == ("cat", "dog", "A) fish", "cow")
    assert [q.id for q in questions] == ["test.jsonl:1", "test.jsonl:2"]
    assert [q.task for q in questions] == ["test", "test"]


def test_letters_stay_when_not_every_choice_has_one(tmp_path: Path) -> None:
    questions, _ = read(write(tmp_path / "q.jsonl", line(choices=["A) one", "two"])))
    assert questions[0].choices == ("A) one", "two")


def test_default_ids_do_not_depend_on_the_folder_but_tell_equal_names_apart(tmp_path: Path) -> None:
    row = line(id=...)
    for folder in ("here", "there"):
        (tmp_path / folder / "a").mkdir(parents=True)
        write(tmp_path / folder / "a" / "q.jsonl", row)
        questions, _ = read(tmp_path / folder / "a" / "q.jsonl")
        assert [q.id for q in questions] == ["q.jsonl:1"]
    questions, rejected = read(tmp_path / "here" / "a" / "q.jsonl", tmp_path / "there" / "a" / "q.jsonl")
    assert [q.id for q in questions] == ["here/a/q.jsonl:1", "there/a/q.jsonl:1"]
    assert rejected == []


def test_integer_ids_become_texts(tmp_path: Path) -> None:
    questions, _ = read(write(tmp_path / "q.jsonl", line(id=7), line(id=0)))
    assert [q.id for q in questions] == ["7", "0"]


def test_duplicate_ids_are_found_across_sources(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", line(id="x"), line(id="y"))
    second = write(tmp_path / "b.jsonl", line(id="z"), line(id="y"))
    questions, rejected = read(first, second)
    assert [q.id for q in questions] == ["x", "y", "z"]
    assert rejected == [Rejected("b.jsonl", 2, "y", "duplicate id: it was first used in a.jsonl, line 2")]


def test_the_same_file_twice_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", line(id="x"))
    with pytest.raises(QuestionError, match="all 1 rows were set aside") as caught:
        read(path, path)
    assert "duplicate id" in str(caught.value)


def test_sources_override_task_and_split(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", line(id="a", split="dev"), line(id="b", task=..., split=...))
    questions, _ = read(path)
    assert [(q.task, q.split) for q in questions] == [("t", "validation"), ("q", "train")]
    questions, _ = read(path, task="mine", split="test")
    assert [(q.task, q.split) for q in questions] == [("mine", "test")] * 2


def test_the_limit_counts_good_rows_and_stops_there(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", b"bad", *(line(id=f"{i}") for i in range(5)), b"also bad")
    questions, rejected = read(path, limit=3)
    assert [q.id for q in questions] == ["0", "1", "2"]
    assert [row.line for row in rejected] == [1]


def test_a_file_without_a_good_row_is_an_error_with_the_first_reasons(tmp_path: Path) -> None:
    gsm8k = json.dumps({"id": "g", "question": "How much?", "answer": "18", "solution": "#### 18"}).encode()
    path = write(tmp_path / "gsm8k.jsonl", *[gsm8k] * 5)
    with pytest.raises(QuestionError) as caught:
        read(path)
    message = str(caught.value)
    assert "gsm8k.jsonl holds no usable question: all 5 rows were set aside" in message
    assert "line 1: no field `choices`: an open-ended question cannot be scored" in message
    assert "and 2 more" in message


@pytest.mark.parametrize("name", ["q.jsonl", "q.parquet"])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch()
    with pytest.raises(QuestionError, match=r"is empty|not a whole Parquet file"):
        read(path)


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(QuestionError, match="does not exist"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(QuestionError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(QuestionError, match="does not exist"):
        read(Path("nul\x00.jsonl"))
    with pytest.raises(QuestionError, match="cannot be read"):
        read(Path("~nobody-of-this-name/q.jsonl"))
    with pytest.raises(QuestionError, match=r"must be a \.jsonl, \.jsonl\.gz or \.parquet file"):
        read(write(tmp_path / "q.csv", line()))
    with pytest.raises(QuestionError, match="ships with roma-ray"):
        asset("../config.py")
    with pytest.raises(QuestionError, match="ships with roma-ray"):
        read_questions([QuestionSource(path="assets:none.jsonl")])
    with pytest.raises(QuestionError, match="ships with roma-ray"):
        asset("nul\x00")
    with pytest.raises(ConfigError, match="sources is empty"):
        read_questions([])


def test_gzip_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    packed = gzip.compress(line(id="a") + b"\n" + line(id="b"))
    for name in ("q.jsonl.gz", "q.jsonl"):
        (tmp_path / name).write_bytes(packed)
        questions, _ = read(tmp_path / name)
        assert [q.id for q in questions] == ["a", "b"]
        assert questions[0].task == "t"
    questions, _ = read(tmp_path / "q.jsonl.gz", task=None)
    assert questions[0].file == "q.jsonl.gz"


def test_broken_gzip_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    lines = b"\n".join(line(id=f"q{i}", question=f"Question {i * 7919}?") for i in range(2000))
    packed = gzip.compress(lines)
    path = tmp_path / "q.jsonl.gz"
    for broken in (packed[: len(packed) // 2], packed[:5], packed[:-4], packed[:500] + b"\xff" * 40 + packed[540:]):
        path.write_bytes(broken)
        with pytest.raises(QuestionError, match=r"q\.jsonl\.gz cannot be read after line \d+: the gzip data are"):
            read(path)
    path.write_bytes(lines)
    with pytest.raises(QuestionError, match="not gzipped"):
        read(path)


def test_rows_stream_before_the_file_is_read_to_its_end(tmp_path: Path) -> None:
    packed = gzip.compress(b"\n".join(line(id=f"q{i}", question=f"Q {i * 7919}?") for i in range(5_000)))
    path = tmp_path / "q.jsonl.gz"
    path.write_bytes(packed[: len(packed) // 2])
    stream = iter_questions([QuestionSource(path=str(path))])
    first = next(stream)
    assert isinstance(first, Question)
    assert first.id == "q0"


def test_files_of_the_package_are_named_by_assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "questions").mkdir()
    write(tmp_path / "questions" / "train.jsonl", line(id=...))
    monkeypatch.setattr(readers, "assets_path", lambda: tmp_path)
    questions, _ = read_questions([QuestionSource(path="assets:questions/train.jsonl")])
    assert [q.id for q in questions] == ["train.jsonl:1"]


# -- Parquet -------------------------------------------------------------------------------------------------------


def parquet(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_parquet_rows_are_read_as_jsonl_rows_are(tmp_path: Path) -> None:
    columns: dict[str, Any] = {
        "id": ["a", "b", None],
        "question": pa.array(["Which?"] * 3, pa.large_string()),
        "choices": pa.array([["x", "y"], ["x", "y", "z"], ["x", "y"]], pa.large_list(pa.string())),
        "answer": pa.array([1, 2, 0], pa.int32()),
        "task": pa.array(["t", "t", "u"]).dictionary_encode(),
        "context": [None, "A passage.", ""],
        "split": pa.nulls(3),
        "extra": [{"x": 1}] * 3,
    }
    questions, rejected = read(parquet(tmp_path / "q.parquet", columns))
    assert rejected == []
    assert questions == [
        Question("a", "t", "Which?", ("x", "y"), 1),
        Question("b", "t", "Which?", ("x", "y", "z"), 2, "A passage."),
        Question("q.parquet:3", "u", "Which?", ("x", "y"), 0),
    ]
    assert [q.line for q in questions] == [1, 2, 3]


def test_parquet_with_letters(tmp_path: Path) -> None:
    columns = {"question": ["Q"] * 2, "choices": [["x", "y"]] * 2, "answer": ["B", "Z"]}
    questions, rejected = read(parquet(tmp_path / "q.pq", columns))
    assert [q.answer for q in questions] == [1]
    assert [(row.line, row.reason) for row in rejected] == [(2, "answer Z is out of range: the 2 choices are A to B")]


def test_one_bad_text_of_a_parquet_file_spoils_its_row_only(tmp_path: Path) -> None:
    texts = pa.array([b"Which?", b"\xff\xfe", b"Which?"], pa.binary())
    broken = pa.StringArray.from_buffers(3, texts.buffers()[1], texts.buffers()[2])
    columns = {"question": broken, "choices": [["x", "y"], ["x", "y"], ["x", None]], "answer": ["A"] * 3}
    questions, rejected = read(parquet(tmp_path / "q.parquet", columns))
    assert [q.line for q in questions] == [1]
    assert [(row.line, row.reason) for row in rejected] == [
        (2, "invalid UTF-8 in `question` at byte 1"),
        (3, "the choice B is missing, not a text"),
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": ["Q"], "answer": ["A"]}, "has no column `choices`.*open-ended"),
        ({"question": ["Q"], "choices": ["x"], "answer": ["A"]}, "column `choices` is of type string, not list of"),
        ({"question": [1], "choices": [["x"]], "answer": ["A"]}, "column `question` is of type int64, not text"),
        ({"question": ["Q"], "choices": [["x", "y"]], "answer": [1.0]}, "column `answer` is of type double"),
    ],
)
def test_parquet_columns_are_checked(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(QuestionError, match=message):
        read(parquet(tmp_path / "q.parquet", columns))


def test_a_broken_parquet_file_is_an_error(tmp_path: Path) -> None:
    columns = {"question": ["Q"] * 9, "choices": [["x", "y"]] * 9, "answer": ["A"] * 9}
    path = parquet(tmp_path / "q.parquet", columns)
    data = path.read_bytes()
    for broken in (data[:-20], data[:50], b"PAR1", line(), data[:4] + b"\xff" * 200 + data[204:]):
        path.write_bytes(broken)
        with pytest.raises(QuestionError, match=r"q\.parquet"):
            read(path)
