"""From the columns of each Hugging Face data set to question records. No network here: rows in, parts of questions out.

A converter takes the rows of one configuration and yields, for each question, the row's number and its parts. Where a
data set lists the right answer apart from the wrong ones, the choices are put in an order drawn from the question's id.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from roma_ray.questions.records import BadRow, answer_index, seeded_key
from roma_ray.questions.shapes import KEY, labelled

MAX_WRONG_CHOICES = 7


@dataclass(frozen=True, slots=True)
class Parts:
    """What a hub row gives of a question; `key` is its own id there, or None."""

    question: object
    choices: object
    answer: int
    context: object = None
    key: str | None = None


Row = Mapping[str, Any]
Converter = Callable[[Iterable[Row]], Iterator[tuple[int, Parts | BadRow]]]


def each(convert: Callable[[Row, int], Parts]) -> Converter:
    """A converter of rows that are one question each."""

    def converter(rows: Iterable[Row]) -> Iterator[tuple[int, Parts | BadRow]]:
        for number, row in enumerate(rows, start=1):
            try:
                yield number, convert(row, number)
            except BadRow as error:
                yield number, error

    return converter


def answer_key(row: Row, number: int) -> Parts:
    """tau/commonsense_qa and allenai/openbookqa: id, question or question_stem, choices {label, text}, answerKey."""
    choices = _cell(row, "choices")
    if not isinstance(choices, Mapping) or choices.get("label") is None or choices.get("text") is None:
        raise BadRow("the column `choices` has no label and text")
    if not str(row.get(KEY) or "").strip():
        raise BadRow("no answer")
    found = labelled(row)
    answer = answer_index(found["answer"], len(found["choices"]))
    return Parts(found["question"], found["choices"], answer, None, str(row["id"]) if row.get("id") else None)


def social_iqa(row: Row, number: int) -> Parts:
    """lighteval/siqa: context, question, answerA, answerB, answerC, label "1" to "3"."""
    label = str(_cell(row, "label")).strip()
    if label not in ("1", "2", "3"):
        raise BadRow("no answer" if label in ("", "None") else f"label '{label[:20]}' is not 1, 2 or 3")
    choices = [_cell(row, name) for name in ("answerA", "answerB", "answerC")]
    return Parts(_cell(row, "question"), choices, int(label) - 1, row.get("context"))


def sciq(row: Row, number: int) -> Parts:
    """allenai/sciq: question, correct_answer, distractor1 to distractor3, support."""
    wrong = [_cell(row, name) for name in ("distractor1", "distractor2", "distractor3")]
    choices, answer = shuffled(_cell(row, "correct_answer"), wrong, f"sciq/{number}")
    return Parts(_cell(row, "question"), choices, answer, row.get("support"))


def bigbench(row: Row, number: int) -> Parts:
    """tasksource/bigbench: inputs, multiple_choice_targets, multiple_choice_scores: one 1, the others 0."""
    choices, scores = _cell(row, "multiple_choice_targets"), _cell(row, "multiple_choice_scores")
    if not isinstance(choices, Sequence) or not isinstance(scores, Sequence) or len(choices) != len(scores):
        raise BadRow("its choices and their scores do not match")
    if any(score not in (0, 1) for score in scores) or sum(scores) != 1:
        raise BadRow("not exactly one choice is right")
    right = list(scores).index(1)
    wrong = [choice for i, choice in enumerate(choices) if i != right]
    # Many tasks list the right choice first.
    mixed, answer = shuffled(choices[right], wrong, f"bigbench/{row.get('idx', number)}")
    return Parts(_without_listed_choices(_cell(row, "inputs"), choices), mixed, answer)


def boolq(row: Row, number: int) -> Parts:
    """aps/super_glue boolq: passage, question, label."""
    question = str(_cell(row, "question")).strip()
    text = question if question.endswith("?") else f"{question}?"
    return Parts(text, ["no", "yes"], _label(row, 2), _cell(row, "passage"))


def cb(row: Row, number: int) -> Parts:
    """aps/super_glue cb: premise, hypothesis, label (entailment, contradiction, neutral)."""
    question = f"Does the passage entail this statement, contradict it, or neither? {_cell(row, 'hypothesis')}"
    return Parts(question, ["entailment", "contradiction", "neutral"], _label(row, 3), _cell(row, "premise"))


def rte(row: Row, number: int) -> Parts:
    """aps/super_glue rte: premise, hypothesis, label (0 = entailment)."""
    question = f"Does the passage entail this statement? {_cell(row, 'hypothesis')}"
    return Parts(question, ["yes", "no"], _label(row, 2), _cell(row, "premise"))


def copa(row: Row, number: int) -> Parts:
    """aps/super_glue copa: premise, choice1, choice2, question (cause or effect), label."""
    asked = _cell(row, "question")
    if asked not in ("cause", "effect"):
        raise BadRow("its question is neither cause nor effect")
    tail = "What was the cause of this?" if asked == "cause" else "What happened as a result?"
    choices = [_cell(row, "choice1"), _cell(row, "choice2")]
    return Parts(f"{_cell(row, 'premise')} {tail}", choices, _label(row, 2))


def wic(row: Row, number: int) -> Parts:
    """aps/super_glue wic: word, sentence1, sentence2, label."""
    first, second, word = (_cell(row, name) for name in ("sentence1", "sentence2", "word"))
    question = f"{first}\n{second}\nDoes the word '{word}' have the same meaning in both sentences?"
    return Parts(question, ["no", "yes"], _label(row, 2))


def wsc(row: Row, number: int) -> Parts:
    """aps/super_glue wsc.fixed: text, span1_text, span2_text, label."""
    pronoun, name = _cell(row, "span2_text"), _cell(row, "span1_text")
    question = f"{_cell(row, 'text')}\nIn the text above, does '{pronoun}' (word {_word(row)}) refer to '{name}'?"
    return Parts(question, ["no", "yes"], _label(row, 2))


def multirc(rows: Iterable[Row]) -> Iterator[tuple[int, Parts | BadRow]]:
    """aps/super_glue multirc: one row an answer (paragraph, question, answer, idx, label); gathered by question here.

    A question has several right answers there. One of them and up to seven wrong ones are kept, so that one is right.
    """
    gathered: dict[tuple[int, int], tuple[int, Row, list[str], list[str]]] = {}
    for number, row in enumerate(rows, start=1):
        try:
            index = _cell(row, "idx")
            if not isinstance(index, Mapping) or "paragraph" not in index or "question" not in index:
                raise BadRow("the column `idx` has no paragraph and question")
            key = (index["paragraph"], index["question"])
            _, _, wrong, right = gathered.setdefault(key, (number, row, [], []))
            (wrong, right)[_label(row, 2)].append(str(_cell(row, "answer")).strip())
        except BadRow as error:
            yield number, error
    for (paragraph, asked), (number, row, wrong, right) in gathered.items():
        id = f"multirc-{paragraph}-{asked}"
        false = list(dict.fromkeys(answer for answer in wrong if answer not in right))
        if not right or not false:
            yield (
                number,
                BadRow("the question has no right answer" if not right else "the question has no wrong answer"),
            )
            continue
        false = sorted(false, key=lambda text: seeded_key(0, id, text))[:MAX_WRONG_CHOICES]
        choices, answer = shuffled(min(right, key=lambda text: seeded_key(0, id, text)), false, id)
        yield number, Parts(row.get("question"), choices, answer, row.get("paragraph"), f"{paragraph}-{asked}")


def knowref(row: Row, number: int) -> Parts:
    """The authors' own file: sentence_with_pronoun (pronoun in brackets), candidate0, candidate1, correct_candidate."""
    choices = [_cell(row, "candidate0"), _cell(row, "candidate1")]
    if choices.count(_cell(row, "correct_candidate")) != 1:
        raise BadRow("the right candidate is not exactly one of the two")
    sentence = _cell(row, "sentence_with_pronoun")
    if not isinstance(sentence, str):
        raise BadRow("the sentence is not a text")
    pronoun = sentence.partition("[")[2].partition("]")[0]
    if not pronoun:
        raise BadRow("no pronoun in brackets")
    question = f"{sentence}\nWhom does the pronoun in brackets, '{pronoun}', refer to?"
    return Parts(question, choices, choices.index(row["correct_candidate"]))


def shuffled(right: object, wrong: Sequence[object], id: str) -> tuple[list[object], int]:
    """The choices in an order drawn from `id`, and the index of the right one."""
    order = sorted(range(len(wrong) + 1), key=lambda i: seeded_key(0, "choices", f"{id}/{i}"))
    choices = [right, *wrong]
    return [choices[i] for i in order], order.index(0)


def _label(row: Row, classes: int) -> int:
    label = _cell(row, "label")
    if label == -1:
        raise BadRow("no answer (a hidden test label)")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < classes:
        raise BadRow(f"the label is not one of 0 to {classes - 1}")
    return label


def _word(row: Row) -> int:
    index = _cell(row, "span2_index")
    if isinstance(index, bool) or not isinstance(index, int):
        raise BadRow("the column `span2_index` is not an integer")
    return index + 1


def _without_listed_choices(inputs: object, choices: Sequence[object]) -> object:
    """BIG-bench lists the choices in the input of many tasks; the prompt lists them itself."""
    if not isinstance(inputs, str):
        return inputs
    text = inputs.strip()
    for choice in choices:
        text = re.sub(rf"\n  choice: {re.escape(str(choice))}(?=\n|$)", "", text)
    text = text.removesuffix("A:").rstrip() if "\nA:" in text else text
    return text.removeprefix("Q:").strip()


def _cell(row: Row, name: str) -> Any:
    if name not in row:
        raise BadRow(f"no column `{name}`: the data set's columns are not the expected ones")
    return row[name]
