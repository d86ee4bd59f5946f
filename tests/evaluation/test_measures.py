"""The four measures against their definitions written out, on questions made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from roma_ray.engine.forward import predict
from roma_ray.evaluation.measures import MEASURES, Asked, measure, pair_measures
from roma_ray.questions.prompts import Prompt

RNG = np.random.default_rng(3)


def prompts(count: int, *, letter: bool = False) -> list[Prompt]:
    made = []
    for n in range(count):
        lengths = RNG.integers(1, 6, 4).tolist()
        chars = RNG.integers(1, 30, 4).tolist()
        ids = tuple(tuple(range(1 if letter else length)) for length in lengths)
        made.append(Prompt(f"q{n}", f"t{n % 3}", "test", (1, 2), ids, tuple(chars), int(RNG.integers(4)), False))
    return made


def test_each_measure_is_its_definition_question_by_question() -> None:
    questions = prompts(40)
    scores = RNG.normal(-8, 3, (40, 4)).tolist()
    for rule in ("raw", "normalized"):
        found = measure(scores, Asked.of(questions, rule, letter=False))
        assert list(found) == list(MEASURES)
        for n, (own, question) in enumerate(zip(scores, questions, strict=True)):
            gold = question.answer
            assert found["acc"][n] == (predict(own, question, "raw") == gold)
            assert found["acc_norm"][n] == (predict(own, question, "normalized") == gold)
            assert found["gold_logp"][n] == pytest.approx(own[gold] / len(question.choice_ids[gold]))
            compared = [s / c if rule == "normalized" else s for s, c in zip(own, question.choice_chars, strict=True)]
            total = math.log(sum(math.exp(value) for value in compared))
            assert found["choice_logp"][n] == pytest.approx(compared[gold] - total)


def test_equal_scores_are_answered_as_the_engine_does() -> None:
    (question,) = prompts(1)
    asked = Asked.of([question], "raw", letter=False)
    assert measure([[-1.0] * 4], asked)["acc"][0] == (predict([-1.0] * 4, question, "raw") == question.answer)


def test_the_rules_of_letters_coincide_and_are_shown_once() -> None:
    questions = prompts(10, letter=True)
    asked = Asked.of(questions, "raw", letter=True)
    assert asked.coincide
    assert list(measure(RNG.normal(size=(10, 4)).tolist(), asked)) == ["acc", "gold_logp", "choice_logp"]
    assert not Asked.of(questions, "raw", letter=False).coincide


def test_the_two_rules_can_disagree_in_sign() -> None:
    """A tuned model that gains on the raw score and loses on the normalised one is shown to do both."""
    asked = Asked(["t"] * 2, [0, 0], [[1, 1]] * 2, [[2, 4]] * 2, "normalized")
    # By the raw score the base answers the second rightly and the tuned model both; per character the tuned one answers neither.
    base, tuned = [[-2.0, -1.0], [-3.0, -8.0]], [[-2.0, -3.0], [-6.0, -8.0]]
    found = pair_measures(measure(base, asked), measure(tuned, asked), asked.tasks)
    assert found["acc"].micro.difference == 0.5
    assert found["acc_norm"].micro.difference == -0.5


def test_micro_weighs_questions_and_macro_tasks() -> None:
    questions = prompts(31)
    asked = Asked.of(questions, "raw", letter=False)
    base, tuned = (measure(RNG.normal(-5, 2, (31, 4)).tolist(), asked) for _ in range(2))
    for name, found in pair_measures(base, tuned, asked.tasks).items():
        gain = tuned[name] - base[name]
        assert found.micro.difference == pytest.approx(gain.mean())
        assert found.macro is not None
        by_task = [gain[n::3].mean() for n in range(3)]
        assert found.macro.difference == pytest.approx(np.mean(by_task))
        assert [found.tasks[f"t{n}"].difference for n in range(3)] == pytest.approx(by_task)
