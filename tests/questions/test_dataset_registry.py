"""The registry: the paper's counts, each hub schema on a few rows in its columns, sampling, refusals. No hub."""

from __future__ import annotations

import builtins
import json
import sys
import types
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roma_ray.config.schema import QuestionSource
from roma_ray.errors import ConfigError, QuestionError
from roma_ray.questions.dataset_registry import REGISTRY, convert_knowref, load_dataset, share
from roma_ray.questions.readers import read_questions
from roma_ray.questions.records import Question, Rejected

Rows = list[dict[str, Any]]

CSQA = {
    "id": "75def",
    "question": "Where is a choker kept?",
    "question_concept": "choker",
    "choices": {"label": ["A", "B", "C"], "text": ["neck", "jewelry box", "boutique"]},
    "answerKey": "B",
}
OBQA = {
    "id": "7-980",
    "question_stem": "The sun is",
    "choices": {"text": ["hot", "cold", "wet", "small"], "label": ["A", "B", "C", "D"]},
    "answerKey": "A",
}
SIQA = {
    "context": "Cameron had a barbecue.",
    "question": "How would others feel?",
    "answerA": "sad",
    "answerB": "welcome",
    "answerC": "alone",
    "label": "2",
}
SCIQ = {
    "question": "Who proposed natural selection?",
    "distractor1": "Linnaeus",
    "distractor2": "Shaw",
    "distractor3": "Scopes",
    "correct_answer": "Darwin",
    "support": "",
}
BIGBENCH = {
    "idx": 5,
    "inputs": "Q: Which is a fruit?\n  choice: apple pie\n  choice: apple\n  choice: stone\nA:",
    "targets": ["apple"],
    "multiple_choice_targets": ["apple", "apple pie", "stone"],
    "multiple_choice_scores": [1, 0, 0],
}
BOOLQ = {"question": "is it so", "passage": "Title -- It is so.", "idx": 0, "label": 1}
CB = {"premise": "It rained.", "hypothesis": "It was wet.", "idx": 0, "label": 0}
RTE = {"premise": "It rained.", "hypothesis": "It was dry.", "idx": 0, "label": 1}
COPA = {"premise": "The cup broke.", "choice1": "It fell.", "choice2": "It sang.", "question": "cause", "label": 0}
WIC = {
    "word": "bank", "sentence1": "A river bank.", "sentence2": "A bank loan.", "start1": 8, "start2": 2, "end1": 12,
    "end2": 6, "idx": 0, "label": 0,
}  # fmt: skip
WSC = {
    "text": "Mark told Pete he won.", "span1_index": 0, "span2_index": 3, "span1_text": "Mark", "span2_text": "he",
    "idx": 0, "label": 1,
}  # fmt: skip


def multirc_row(question: int, answer: str, label: int) -> dict[str, Any]:
    index = {"paragraph": 0, "question": question, "answer": 0}
    return {"paragraph": "A story.", "question": f"Asked {question}?", "answer": answer, "idx": index, "label": label}


def hub(tables: Mapping[tuple[str, str | None], Rows]) -> Any:
    def loader(path: str, config: str | None, split: str) -> Iterable[Mapping[str, Any]]:
        assert split == "train"
        return tables.get((path, config), [])

    return loader


def load(name: str, path: str, config: str | None, rows: Rows, **options: Any) -> tuple[list[Question], list[Rejected]]:
    items = list(load_dataset(name, loader=hub({(path, config): rows}), **options))
    questions = [item for item in items if isinstance(item, Question)]
    return questions, [item for item in items if isinstance(item, Rejected)]


def test_the_papers_counts() -> None:
    assert {name: dataset.count for name, dataset in REGISTRY.items()} == {
        "bigbench": 10_000,
        "superglue": 10_000,
        "commonsense_qa": 8_000,
        "social_iqa": 8_000,
        "openbookqa": 3_000,
        "sciq": 3_000,
        "knowref": 3_000,
        "multirc": 4_000,
    }
    assert sum(dataset.count for dataset in REGISTRY.values()) == 49_000


def test_commonsense_qa() -> None:
    questions, rejected = load("commonsense_qa", "tau/commonsense_qa", None, [CSQA, {**CSQA, "answerKey": ""}])
    choices = ("neck", "jewelry box", "boutique")
    assert questions == [Question("commonsense_qa-75def", "commonsense_qa", "Where is a choker kept?", choices, 1)]
    assert [(row.file, row.line, row.reason) for row in rejected] == [("tau/commonsense_qa", 2, "no answer")]


def test_openbookqa() -> None:
    questions, _ = load("openbookqa", "allenai/openbookqa", "main", [OBQA])
    assert questions == [Question("openbookqa-7-980", "openbookqa", "The sun is", ("hot", "cold", "wet", "small"), 0)]


def test_social_iqa() -> None:
    questions, rejected = load(
        "social_iqa", "lighteval/siqa", None, [SIQA, {**SIQA, "label": "4"}, {**SIQA, "label": ""}]
    )
    assert questions == [
        Question(
            "social_iqa-train-1", "social_iqa", "How would others feel?", ("sad", "welcome", "alone"), 1,
            "Cameron had a barbecue.",
        )
    ]  # fmt: skip
    assert [row.reason for row in rejected] == ["label '4' is not 1, 2 or 3", "no answer"]


def test_sciq_choices_are_mixed_by_row_alone() -> None:
    questions, _ = load("sciq", "allenai/sciq", None, [SCIQ] * 200)
    assert all(q.choices[q.answer] == "Darwin" and q.context is None and len(set(q.choices)) == 4 for q in questions)
    positions = Counter(q.answer for q in questions)
    assert min(positions[i] for i in range(4)) > 30
    assert load("sciq", "allenai/sciq", None, [SCIQ] * 200, seed=5)[0] == questions
    with_support, _ = load("sciq", "allenai/sciq", None, [{**SCIQ, "support": "Text."}])
    assert with_support[0].context == "Text."


def test_bigbench_choices_are_not_listed_twice() -> None:
    two_right = {**BIGBENCH, "multiple_choice_scores": [1, 1, 0]}
    generative = {**BIGBENCH, "multiple_choice_targets": [], "multiple_choice_scores": []}
    questions, rejected = load("bigbench", "tasksource/bigbench", "navigate", [BIGBENCH, two_right, generative])
    assert len(questions) == 1
    assert (questions[0].id, questions[0].task) == ("bigbench/navigate-train-1", "bigbench/navigate")
    assert questions[0].question == "Which is a fruit?"
    assert questions[0].choices[questions[0].answer] == "apple"
    assert [row.reason for row in rejected] == ["not exactly one choice is right"] * 2


@pytest.mark.parametrize(
    ("config", "row", "question", "choices", "answer", "context"),
    [
        ("boolq", BOOLQ, "is it so?", ("no", "yes"), "yes", "Title -- It is so."),
        ("cb", CB, "It was wet.", ("entailment", "contradiction", "neutral"), "entailment", "It rained."),
        ("rte", RTE, "It was dry.", ("yes", "no"), "no", "It rained."),
        ("copa", COPA, "What was the cause of this?", ("It fell.", "It sang."), "It fell.", None),
        ("wic", WIC, "'bank'", ("no", "yes"), "no", None),
        ("wsc.fixed", WSC, "does 'he' (word 4) refer to 'Mark'?", ("no", "yes"), "yes", None),
    ],
)
def test_superglue(
    config: str, row: dict[str, Any], question: str, choices: tuple[str, ...], answer: str, context: str | None
) -> None:
    hidden = {**row, "label": -1}
    questions, rejected = load("superglue", "aps/super_glue", config, [row, hidden])
    assert len(questions) == 1
    assert question in questions[0].question
    assert questions[0].choices == choices
    assert choices[questions[0].answer] == answer
    assert questions[0].context == context
    assert questions[0].task == f"superglue/{config.partition('.')[0]}"
    assert "hidden test label" in rejected[0].reason


def test_multirc_gathers_the_answers_of_a_question() -> None:
    rows = [
        *(multirc_row(0, text, 0) for text in ("w1", "w2", "w2", "r1")),
        *(multirc_row(1, f"wrong {i}", 0) for i in range(12)),
        *(multirc_row(0, text, 1) for text in ("r1", "r2")),
        multirc_row(1, "right", 1),
        multirc_row(2, "only wrong", 0),
        multirc_row(3, "only right", 1),
    ]
    questions, rejected = load("multirc", "aps/super_glue", "multirc", rows)
    assert [q.id for q in questions] == ["multirc-0-0", "multirc-0-1"]
    assert questions[0].choices[questions[0].answer] in ("r1", "r2")
    assert set(questions[0].choices) - {"r1", "r2"} == {"w1", "w2"}
    assert len(questions[1].choices) == 8
    assert questions[1].choices[questions[1].answer] == "right"
    assert questions[1].context == "A story."
    assert [row.reason for row in rejected] == ["the question has no right answer", "the question has no wrong answer"]


@pytest.mark.parametrize("name", [name for name in REGISTRY if REGISTRY[name].parts])
def test_other_columns_than_expected_are_rejected_not_crashed_on(name: str) -> None:
    part = REGISTRY[name].parts[0]
    odd: Rows = [
        {},
        {"question": None, "choices": None, "label": None, "idx": None},
        {"id": 5, "choices": {"text": None}},
    ]
    questions, rejected = load(name, part.path, part.config, odd)
    assert questions == []
    assert len(rejected) == 3


def test_a_sample_is_drawn_by_seed_and_keeps_the_order() -> None:
    rows = [{**OBQA, "id": f"{i}"} for i in range(50)]

    def ids(**options: Any) -> list[str]:
        return [q.id for q in load("openbookqa", "allenai/openbookqa", "main", rows, **options)[0]]

    assert len(ids()) == 50
    some = ids(limit=10, seed=1)
    assert len(some) == 10
    assert some == [id for id in ids() if id in set(some)]
    assert some == ids(limit=10, seed=1) != ids(limit=10, seed=2)
    assert set(some) < set(ids(limit=20, seed=1))


def test_tasks_share_a_sample_evenly() -> None:
    tables = {
        ("aps/super_glue", "cb"): [CB] * 5,
        ("aps/super_glue", "rte"): [RTE] * 100,
        ("aps/super_glue", "copa"): [COPA] * 40,
    }
    source = QuestionSource(dataset="superglue", limit=60, task="mine", split="test")
    questions, _ = read_questions([source], loader=hub(tables))
    assert Counter(q.file for q in questions) == {
        "aps/super_glue/cb": 5,
        "aps/super_glue/copa": 28,
        "aps/super_glue/rte": 27,
    }
    assert {(q.task, q.split) for q in questions} == {("mine", "test")}


def test_the_papers_superglue_sample() -> None:
    """boolq, cb, copa, rte, wic, wsc: the sizes of the official training splits, and what 10,000 takes of them."""
    assert share([9427, 250, 400, 2490, 5428, 554], 10_000) == [3153, 250, 400, 2490, 3153, 554]


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(0, 300))
def test_shares_add_up_and_are_even(sizes: list[int], total: int) -> None:
    quotas = share(sizes, total)
    assert sum(quotas) == min(total, sum(sizes))
    assert all(0 <= quota <= size for quota, size in zip(quotas, sizes, strict=True))
    cut = [quota for quota, size in zip(quotas, sizes, strict=True) if quota < size]
    if cut:
        assert max(quotas) <= min(cut) + 1


def test_knowref_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not on the Hugging Face hub.*KnowRef60k") as caught:
        read_questions([QuestionSource(dataset="knowref")])
    assert "convert_knowref" in str(caught.value)
    row = {
        "sentence_with_pronoun": "Pearl paints Martha , but every pose exhausts [her] .",
        "candidate0": "Pearl",
        "candidate1": "Martha",
        "correct_candidate": "Martha",
    }
    rows = [row, {**row, "correct_candidate": "Ann"}, {**row, "sentence_with_pronoun": "No brackets."}, {}]
    (tmp_path / "val.json").write_text(json.dumps(rows))
    assert convert_knowref(tmp_path / "val.json", tmp_path / "knowref.jsonl") == 1
    questions, rejected = read_questions([QuestionSource(path=str(tmp_path / "knowref.jsonl"))])
    assert rejected == []
    assert (questions[0].id, questions[0].task) == ("knowref-train-1", "knowref")
    assert questions[0].choices == ("Pearl", "Martha")
    assert questions[0].answer == 1
    assert "'her'" in questions[0].question


@pytest.mark.parametrize("content", ["", "{}", "[1]", "[{}]", "\udcff"])
def test_files_that_are_not_knowrefs(tmp_path: Path, content: str) -> None:
    (tmp_path / "val.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(QuestionError, match=r"val\.json"):
        convert_knowref(tmp_path / "val.json", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_unknown_names_and_empty_data_sets_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"unknown dataset 'sqiq'.*sciq"):
        read_questions([QuestionSource(dataset="sqiq")])
    with pytest.raises(QuestionError, match="sciq is empty"):
        read_questions([QuestionSource(dataset="sciq")], loader=hub({}))


def test_the_hub_library_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = builtins.__import__

    def without_datasets(name: str, *args: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return genuine(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(ConfigError, match=r"pip install 'roma-ray\[hub\]'"):
        list(load_dataset("sciq"))


def test_an_unreachable_hub_is_a_readable_error(monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.ModuleType("datasets")
    library.exceptions = types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))  # type: ignore[attr-defined]
    calls = []

    def refuse(*args: Any, **options: Any) -> None:
        calls.append((args, options))
        raise ConnectionError("no route")

    library.load_dataset = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    with pytest.raises(QuestionError, match=r"allenai/openbookqa \(main\) cannot be loaded.*no route"):
        list(load_dataset("openbookqa"))
    assert calls == [(("allenai/openbookqa", "main"), {"split": "train"})]
