"""Rows without choices: every form from JSON lines, Parquet and the hub, and what is set aside with which reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roma_ray.config.loading import load_config
from roma_ray.config.schema import ColumnsConfig, QuestionSource
from roma_ray.errors import ConfigError, QuestionError
from roma_ray.questions.prompts import embedding_text
from roma_ray.questions.readers import read_questions
from roma_ray.questions.records import Question, Rejected

SQUAD = {
    "id": "56be",
    "title": "Bees",
    "context": "Bees make honey.",
    "question": "What do bees make?",
    "answers": {"text": ["honey", "honey", "some honey"], "answer_start": [10, 10, 5]},
}
GSM8K = {"question": "Tom has 2 apples and buys 3. How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}
PLAIN = {"prompt": "Translate to French: dog ->", "answer": "chien", "task": "french", "split": "test"}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A model."},
    ],
    "correct": True,
}
TEXT = {"text": "  The quick brown fox.\n"}
ROWS: list[dict[str, Any]] = [SQUAD, GSM8K, PLAIN, CHAT, TEXT]


def read(*sources: Path | QuestionSource, **options: Any) -> tuple[list[Question], list[Rejected]]:
    given = [s if isinstance(s, QuestionSource) else QuestionSource(path=str(s)) for s in sources]
    return read_questions(given, free=True, **options)


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_form_is_read(tmp_path: Path) -> None:
    questions, rejected = read(jsonl(tmp_path / "q.jsonl", *ROWS))
    assert not rejected
    squad, gsm8k, plain, chat, text = questions
    assert squad == Question(
        "56be", "q", "What do bees make?", ("honey", "some honey"), 0, "Bees make honey.", form="question"
    )
    assert (gsm8k.form, gsm8k.choices, gsm8k.id) == ("question", ("2 + 3 = <<2+3=5>>5\n#### 5",), "q.jsonl:2")
    assert (plain.form, plain.question, plain.task, plain.split) == ("prompt", PLAIN["prompt"], "french", "test")
    assert (chat.form, chat.choices, chat.verdict) == ("messages", ("A model.",), True)
    assert [role for role, _ in chat.turns] == ["system", "user", "assistant", "user"], "the last message is the answer"
    assert (text.form, text.question, text.choices) == ("text", "The quick brown fox.", ("The quick brown fox.",))
    assert all(question.answer == 0 for question in questions)


def test_neither_answers_nor_the_system_message_are_embedded(tmp_path: Path) -> None:
    squad, _, _, chat, _ = read(jsonl(tmp_path / "q.jsonl", *ROWS))[0]
    assert embedding_text(squad, include_context=False) == "What do bees make?"
    assert embedding_text(squad, include_context=True) == "Bees make honey.\nWhat do bees make?"
    assert embedding_text(chat, include_context=False) == "Hi\nHello!\nWho are you?"


def test_parquet_gives_the_same_questions(tmp_path: Path) -> None:
    expected = read(jsonl(tmp_path / "q.jsonl", *ROWS))[0]
    names = dict.fromkeys(name for row in ROWS[1:] for name in row)
    pq.write_table(pa.Table.from_pylist([{n: row.get(n) for n in names} for row in ROWS[1:]]), tmp_path / "q.parquet")
    pq.write_table(pa.Table.from_pylist([SQUAD]), tmp_path / "squad.parquet")
    found, rejected = read(
        QuestionSource(path=str(tmp_path / "squad.parquet"), task="q"),
        QuestionSource(path=str(tmp_path / "q.parquet")),
    )
    assert not rejected
    same = ("question", "choices", "answer", "context", "split", "form", "turns", "verdict", "task")
    assert [[getattr(q, name) for name in same] for q in found] == [
        [getattr(q, name) for name in same] for q in expected
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "Which?", "choices": ["a", "b"], "answer": "A"}, "it has `choices`, and questions.prompt.format is free"),
        ({"question": "Which?", "answerKey": "A"}, "it has `answerKey`"),
        ({"answer": "a"}, "no field `question`, `prompt`, `messages` or `text`"),
        ({"question": "Which?"}, "no answer"),
        ({"question": "Which?", "answer": ""}, "no answer"),
        ({"question": "Which?", "answers": {"text": [], "answer_start": []}}, "no answer"),
        ({"question": "Which?", "answer": ["a", " "]}, "an answer is empty"),
        ({"question": "Which?", "answer": [str(n) for n in range(101)]}, "101 accepted answers: at most 100"),
        ({"question": "Which?", "answer": ["a", "b" * 10_001]}, "longer than 10,000 characters"),
        ({"question": "Which?", "answer": 2.5}, "the answer is a number with a point, not a text"),
        ({"question": "Which?", "answer": [True]}, "the answer is true or false, not a text"),
        ({"question": " ", "answer": "a"}, "the question is empty"),
        ({"prompt": 3, "answer": "a"}, "the prompt is a number, not a text"),
        ({"text": "\t\n"}, "the text is empty"),
        ({"text": "a\x00b"}, "the text holds the unusable character U+0000"),
        ({"messages": "Hi"}, "the messages are a text, not a list"),
        ({"messages": []}, "the last message is not the assistant's"),
        ({"messages": ["Hi"]}, "message 1 is a text, not an object with role and content"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "the last message is not the assistant's"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "the role of message 1 is 'tool': use system, user or assistant"),
        ({"messages": [{"role": ["x"], "content": "Hi"}]}, "the role of message 1 is a list"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "no message is the user's"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "the content of message 1 is a list, not a text"),
        ({"messages": [{"role": "user"}]}, "the content of message 1 is missing, not a text"),
        ({"question": "Which?", "answer": "a", "correct": "yes"}, "`correct` is a text, not true or false"),
        ({"question": "Which?", "answer": "a", "split": "holdout"}, "unknown split 'holdout'"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_asked_is_set_aside_with_the_reason(
    row: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    questions, rejected = read(jsonl(tmp_path / "q.jsonl", row, GSM8K))
    assert len(questions) == 1
    assert [r.line for r in rejected] == [1]
    assert reason in rejected[0].reason


def test_an_integer_is_an_answer_and_a_mapping_of_columns_is_followed(tmp_path: Path) -> None:
    rows = [{"query": {"text": "2 + 3?"}, "result": {"values": [5, "five"]}, "area": "sums", "correct": False}]
    columns = ColumnsConfig(question="query.text", answer="result.values", task="area")
    jsonl(tmp_path / "q.jsonl", *rows)
    pq.write_table(
        pa.Table.from_pylist([{**rows[0], "result": {"values": ["5", "five"]}, "noise": 1}]), tmp_path / "p.parquet"
    )
    for name in ("q.jsonl", "p.parquet"):
        (question,), rejected = read(QuestionSource(path=str(tmp_path / name), columns=columns))
        assert not rejected
        assert (question.question, question.choices, question.task) == ("2 + 3?", ("5", "five"), "sums")
        assert question.verdict is False


def test_a_table_without_any_form_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"answer": "a", "body": "b"}]), tmp_path / "q.parquet")
    with pytest.raises(QuestionError, match="no column `question`, `prompt`, `messages` or `text`"):
        read(tmp_path / "q.parquet")
    with pytest.raises(QuestionError, match="no column `ask`"):
        read(QuestionSource(path=str(tmp_path / "q.parquet"), columns=ColumnsConfig(question="ask")))


def test_data_sets_of_the_hub_are_read_by_name() -> None:
    source = QuestionSource(dataset="openai/gsm8k", subset="main", part="test", limit=2)
    asked: list[Any] = []

    def hub(*names: Any) -> list[dict[str, Any]]:
        asked.append(names)
        return [GSM8K, {"question": "No answer"}, {**GSM8K, "question": "Again?"}]

    questions, rejected = read(source, loader=hub)
    assert asked == [("openai/gsm8k", "main", "test")]
    assert [(q.form, q.split, q.task) for q in questions] == [("question", "test", "gsm8k/main")] * 2
    assert ["no answer" in r.reason for r in rejected] == [True]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["questions.sources=[{dataset: sciq}]"], "dataset: sciq holds multiple-choice questions"),
        (["questions.sources=[{path: q.jsonl, columns: {labels: x}}]"], "columns.choices and columns.labels are of multiple choice"),
        (["extraction.memory_gb=1"], "leave memory_gb out, or set the metric to likelihood or verdict"),
        (["extraction.chain=auto"], "leave chain out, or set the metric to likelihood or verdict"),
        (["extraction.success.stop=['']"], "an empty text ends every answer"),
        (["routing.tokens=Answer", "finetune.regularizer.positions=sum"], "set it to mean where routing.tokens is Answer"),
        (["questions.prompt.format=cloze", "routing.tokens=Answer"], "it is of questions.prompt.format free alone"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(overrides: list[str], message: str) -> None:
    free = ["questions.prompt.format=free"]
    assert load_config(overrides=free).questions.prompt.format == "free"
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=[*free, *overrides])
