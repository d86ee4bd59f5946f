"""Metrics of written answers against the published scripts' own loops, written out."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roma_ray.questions.answer_metrics import contains, exact_match, f1, normalised, number_of, numeric

WORDS = st.lists(
    st.sampled_from(["the", "a", "Bee", "bee", "bees", "honey", "an", "1,000", "it's", "--", "."]), max_size=7
)


def literal_normalised(text: str) -> str:
    """SQuAD's evaluation script (evaluate-v1.1.py), step by step."""
    lowered = text.lower()
    without = "".join(character for character in lowered if character not in set(string.punctuation))
    without = re.sub(r"\b(a|an|the)\b", " ", without)
    return " ".join(without.split())


def literal_f1(text: str, answer: str) -> float:
    words, gold = literal_normalised(text).split(), literal_normalised(answer).split()
    left, common = list(gold), 0
    for word in words:
        if word in left:
            left.remove(word)
            common += 1
    if not words or not gold:
        return float(words == gold)
    if not common:
        return 0.0
    precision, recall = common / len(words), common / len(gold)
    return 2 * precision * recall / (precision + recall)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_exact_match_and_f1_are_those_of_squads_script(said: list[str], golds: list[list[str]]) -> None:
    text, accepted = " ".join(said), [" ".join(gold) for gold in golds]
    assert normalised(text) == literal_normalised(text)
    assert exact_match(text, accepted) == any(literal_normalised(text) == literal_normalised(a) for a in accepted)
    assert f1(text, accepted) == pytest.approx(max(literal_f1(text, answer) for answer in accepted))


@given(WORDS, WORDS)
def test_an_answer_is_contained_as_whole_words(said: list[str], gold: list[str]) -> None:
    words, wanted = literal_normalised(" ".join(said)).split(), literal_normalised(" ".join(gold)).split()
    runs = [words[n : n + len(wanted)] for n in range(len(words) - len(wanted) + 1)]
    expected = wanted in runs if wanted else not words
    assert contains(" ".join(said), [" ".join(gold)]) == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He has 2 + 3 = <<2+3=5>>5 apples.\n#### 5", "5"),
        ("#### 1,234.50 and 7", "1234.50"),
        ("first #### 4\nthen #### $-1", "-1"),
        ("so 3 of 12 are left, that is 9.", "9"),
        ("5-3", "3"),
        ("it costs $1,000", "1000"),
        ("-.5", "-0.5"),
        ("####", None),
        ("#### none, though 3 was said", "3"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_is_the_marked_one_or_the_last(text: str, number: str | None) -> None:
    assert number_of(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "accepted", "right"),
    [
        ("The answer is 72.", ["48 + 24 = 72\n#### 72"], True),
        ("72.0", ["#### 72"], True),
        ("about 7.2", ["#### 72"], False),
        ("I do not know", ["#### 72"], False),
        ("I do not know", ["nor do I"], False),
        ("10", ["9", "10"], True),
    ],
)
def test_equal_numbers_are_right(text: str, accepted: Sequence[str], right: bool) -> None:
    assert numeric(text, accepted) is right
