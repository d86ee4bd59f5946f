"""Answer shares, and differences that are nothing but a shift between answers."""

from __future__ import annotations

import numpy as np
import pytest

from roma_ray.evaluation.measures import Asked
from roma_ray.evaluation.shares import answer_shares, is_labelled, shift_notes, unbiased

RNG = np.random.default_rng(5)
N = 400


def yes_no() -> tuple[Asked, list[list[str]], np.ndarray]:
    """Questions of which two thirds are answered by yes, whose place varies, and how far a model knows each, as log-odds."""
    right_is_yes = np.arange(N) % 3 > 0
    yes_first = RNG.random(N) < 0.5
    choices = [["yes", "no"] if first else ["no", "yes"] for first in yes_first]
    answers = [texts.index("yes" if yes else "no") for texts, yes in zip(choices, right_is_yes, strict=True)]
    knows = RNG.normal(0.3, 1.0, N)
    return Asked(["t"] * N, answers, [[1, 1]] * N, [[1, 1]] * N, "raw"), choices, knows


def scores(asked: Asked, choices: list[list[str]], knows: np.ndarray, preference: float) -> list[list[float]]:
    """Log-likelihoods of a model that knows so much, and likes to say yes."""
    made = []
    for texts, gold, known in zip(choices, asked.answers, knows, strict=True):
        values = [preference if text == "yes" else 0.0 for text in texts]
        values[gold] += known
        made.append(values)
    return made


def test_shares_are_counted_by_position_and_by_label() -> None:
    asked, choices, knows = yes_no()
    base, tuned = (scores(asked, choices, knows, preference) for preference in (0.0, 9.0))
    found = answer_shares(base, tuned, asked, choices)["t"]
    assert found["labels"]["yes"]["tuned"] == 1.0
    assert found["labels"]["no"]["tuned"] == 0.0
    assert found["labels"]["yes"]["gold"] == pytest.approx(2 / 3, abs=0.01)
    picked = np.mean([texts[int(np.argmax(s))] == "yes" for texts, s in zip(choices, base, strict=True)])
    assert found["labels"]["yes"]["base"] == pytest.approx(picked)
    assert found["positions"]["A"]["gold"] == pytest.approx(np.mean(np.array(asked.answers) == 0))
    for shares in (found["positions"], found["labels"]):
        for who in ("gold", "base", "tuned"):
            assert sum(share[who] for share in shares.values()) == pytest.approx(1)


def test_a_gain_of_saying_yes_more_often_is_told_as_that() -> None:
    asked, choices, knows = yes_no()
    base, tuned = (scores(asked, choices, knows, preference) for preference in (-1.0, 1.5))
    found = answer_shares(base, tuned, asked, choices)
    by_label = next(by for by in found["t"]["shift"] if by["by"] == "label")
    assert by_label["plain"]["difference"] > 0.1
    assert by_label["plain"]["mcnemar_p"] < 0.001
    assert by_label["corrected"]["difference"] == 0
    assert by_label["alone"]
    (line,) = shift_notes(found)
    assert "t: the difference of +" in line
    assert "lives in a shift between answers alone" in line


def test_a_gain_of_knowing_more_is_not() -> None:
    asked, choices, knows = yes_no()
    base, tuned = scores(asked, choices, knows, 0.5), scores(asked, choices, knows + 0.7, 0.5)
    found = answer_shares(base, tuned, asked, choices)
    assert all(by["plain"]["difference"] > 0.05 for by in found["t"]["shift"])
    assert not any(by["alone"] for by in found["t"]["shift"])
    assert shift_notes(found) == []


def test_a_shift_that_shows_no_difference_is_no_note() -> None:
    asked, choices, knows = yes_no()
    base, tuned = scores(asked, choices, knows, 0.0), scores(asked, choices, knows, 0.02)
    assert shift_notes(answer_shares(base, tuned, asked, choices)) == []


def test_labels_are_choices_that_recur() -> None:
    assert is_labelled([["yes", "no"], ["no", "yes"], ["yes", "no"]])
    assert is_labelled([["entailment", "neutral", "contradiction"]] * 20)
    assert not is_labelled([["blue", "red"], ["sky", "sea"]])
    assert not is_labelled([["yes", "no"]] * 30 + [["yes", "maybe"]] * 2), "a text of two questions in 32 is no label"


def test_what_is_taken_out_is_the_mean_of_each_key() -> None:
    values = [np.array([0.0, 1.0]), np.array([2.0, -1.0]), np.array([0.5, 0.5])]
    keys = [["A", "B"]] * 3
    logp = [v - np.log(np.exp(v).sum()) for v in values]
    means = np.mean(logp, axis=0)
    for found, own in zip(unbiased(values, keys), logp, strict=True):
        assert found == pytest.approx(own - means)
