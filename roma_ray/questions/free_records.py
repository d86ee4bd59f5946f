"""Rows without choices, as questions: what is asked, and the texts that are accepted as its answer.

    {"question": "Who wrote it?", "answer": "Mary Shelley", "context": "..."}   asked in the words of the `cloze` format
    {"prompt": "Translate to French: dog ->", "answer": "chien"}                asked as it stands
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
                                              asked by the tokenizer's chat template. The last message is the answer and must be
                                              the assistant's; all before it, earlier answers among them, is the prompt
    {"text": "..."}                           every token is one to predict: nothing is asked

`answer` is a text, an integer, or a list of texts that are all right, of which the first is trained on; `answers` may hold
the list instead, also as SQuAD's {"text": [...], "answer_start": [...]}. `correct` (true or false) says, where an external
judge has, whether the base model answers rightly. `id`, `task`, `split` and `context` are as in `records`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from roma_ray.borders.text import printable
from roma_ray.questions.records import BadRow, Form, Question, Turn, kind_of, make_question, placed, plain_text

FIELDS = ("question", "prompt", "messages", "text", "answer", "answers", "context", "correct", "id", "task", "split")
"""All that is read of a row."""
FORMS: tuple[Form, ...] = ("messages", "prompt", "question", "text")
"""A row is the first of these that it has a field of."""
ROLES = ("system", "user", "assistant")
MAX_ANSWERS = 100
MAX_ALIAS = 10_000
"""Characters of an accepted answer that is not trained on (those of the first are limited as tokens): metrics compare all."""
MANY = ("choices", "answerKey")
"""Fields of multiple choice."""


def free_question_from_row(
    row: Mapping[str, Any],
    *,
    file: str,
    line: int,
    default_id: str,
    task: str | None,
    default_task: str,
    split: str | None,
) -> Question:
    """A free-form question from one row of a file; `task` and `split`, when given, override the row's own.

    Raises:
        BadRow: the row cannot be used; the message says why.
    """
    place = placed(row, default_id=default_id, task=task, default_task=default_task, split=split)
    for name in MANY:
        if row.get(name) is not None:
            raise BadRow(f"it has `{name}`, and questions.prompt.format is free: ask it in the format letter or cloze")
    form = next((name for name in FORMS if row.get(name) is not None), None)
    if form is None:
        raise BadRow("no field `question`, `prompt`, `messages` or `text`")
    turns: tuple[Turn, ...] = ()
    answers: tuple[str, ...]
    if form == "messages":
        *before, (_, answer) = _messages(row[form])
        turns, answers = tuple(before), (answer,)
        asked = "\n".join(content for role, content in turns if role != "system")
    elif form == "text":
        asked = plain_text(row[form], form)
        answers = (asked,)
    else:
        asked, answers = plain_text(row[form], form), _answers(row)
    return make_question(
        **place,
        question=asked,
        choices=answers,
        answer=0,
        context=row.get("context") if form in ("question", "prompt") else None,
        file=file,
        line=line,
        form=form,
        turns=turns,
        verdict=_verdict(row.get("correct")),
    )


def _messages(value: object) -> list[Turn]:
    """(role, content) of each message; the last is the assistant's, and something comes before it."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise BadRow(f"the messages are {kind_of(value)}, not a list of objects with role and content")
    turns = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            raise BadRow(f"message {number} is {kind_of(message)}, not an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            shown = f"'{printable(role, 40)}'" if isinstance(role, str) else kind_of(role)
            raise BadRow(f"the role of message {number} is {shown}: use {', '.join(ROLES[:-1])} or {ROLES[-1]}")
        content = plain_text(message.get("content"), f"content of message {number}")
        if not content:
            raise BadRow(f"message {number} is empty")
        turns.append((str(role), content))
    if not turns or turns[-1][0] != "assistant":
        raise BadRow("the last message is not the assistant's, so there is no answer")
    if not any(role == "user" for role, _ in turns):
        raise BadRow("no message is the user's")
    return turns


def _answers(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The accepted answers, each once, in their order."""
    value = row.get("answer") if row.get("answer") is not None else row.get("answers")
    if isinstance(value, Mapping):
        value = value.get("text")
    if value is None or value == "" or value == []:
        raise BadRow("no answer")
    listed = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    texts = [str(one) if isinstance(one, int) and not isinstance(one, bool) else one for one in listed]
    found = tuple(dict.fromkeys(plain_text(one, "answer") for one in texts))
    if not all(found):
        raise BadRow("an answer is empty")
    if len(found) > MAX_ANSWERS:
        raise BadRow(f"{len(found)} accepted answers: at most {MAX_ANSWERS} are compared")
    if any(len(text) > MAX_ALIAS for text in found[1:]):
        raise BadRow(f"an accepted answer beside the first is longer than {MAX_ALIAS:,} characters")
    return found


def _verdict(value: object) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise BadRow(f"`correct` is {kind_of(value)}, not true or false")
    return value
