"""What is said of the sources of questions."""

from __future__ import annotations

import numpy as np

from roma_ray.questions.asked import AskedQuestions
from roma_ray.questions.counts import SourceCount, count_sources, describe_sources
from roma_ray.questions.records import Question
from roma_ray.questions.splits import PARTS


def question(number: int, split: str, task: str = "t") -> Question:
    return Question(f"q{number}", task, "Which?", ("a", "b"), 0, split=split)


def test_counts_follow_the_parts_and_leave_out_what_is_not_used() -> None:
    read = [("a.jsonl", [question(n, "train") for n in range(4)]), ("b.jsonl", [question(9, "test", "u")])]
    asked = AskedQuestions((name, iter(questions)) for name, questions in read)
    parts = np.array([PARTS.index(part) for part in ("train", "validation", "train", "train", "test")])
    first, second = count_sources(asked, parts, np.array([True, True, True, False, True]))
    assert first == SourceCount("a.jsonl", 2, 1, 0, declared=0, tasks=("t",))
    assert second == SourceCount("b.jsonl", 0, 0, 1, declared=1, tasks=("u",))
    assert SourceCount.of(first.facts()) == first


def test_a_source_that_trains_nothing_is_noted_only_where_that_may_surprise() -> None:
    train = SourceCount("train.jsonl", 8, 2, 0, declared=0, tasks=("t",))
    test = SourceCount("test.jsonl", 0, 0, 5, declared=5, tasks=("t",))
    other = SourceCount("other.jsonl", 0, 0, 5, declared=5, tasks=("u",))
    held = SourceCount("sciq", 0, 1000, 0, declared=1000, tasks=("sciq",))
    assert len(describe_sources([train, test])) == 2
    assert "no source gives training questions of u" in describe_sources([train, other])[-1]
    assert "nothing of sciq is trained on" in describe_sources([train, held])[-1]
