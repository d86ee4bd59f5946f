"""Sentences follow the figures: gain, loss, nothing shown, and nothing to be concluded."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from roma_ray.config.finetune_settings import GuardConfig, RegularizerConfig
from roma_ray.evaluation.statistics import compare, p_value
from roma_ray.figures.report_words import by_task, guard_words, notes, safety, verdict


def summary(
    won: int, lost: int, n: int = 200, at_chance: tuple[str, ...] = (), below: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A summary in which the base has half of n questions right and tuning wins and loses that many."""
    base = [True] * (n // 2) + [False] * (n // 2)
    tuned = [False] * lost + [True] * (n // 2 - lost) + [True] * won + [False] * (n // 2 - won)
    figures = compare(base, tuned)
    routing = {"task_silhouette": 0.1}
    return {
        "splits": {"test": {"a": figures, "b": compare([True, False], [True, False]), "all": figures}},
        "guards": {
            "at_chance": list(at_chance),
            "below_chance": list(below),
            "too_many_truncated": False,
            "truncated": 0,
            "test_questions_in_training": {"normalised": 0, "exact": 0},
        },
        "shares": {},
        "held_out": None,
        "task_loss_alone": None,
        "rejected": 0,
        "errors": 0,
        "probe": {"gradient_ratio": 0.5},
        "diagnostics": {
            "base": routing,
            "tuned": copy.copy(routing),
            "selection_overlap": [0.5, 0.75],
            "routing_kl": [0.1, 0.2],
        },
    }


@pytest.mark.parametrize(
    ("won", "lost", "kind"), [(30, 5, "gain"), (5, 30, "loss"), (12, 8, "none"), (8, 12, "none"), (0, 0, "none")]
)
def test_the_verdict_is_what_the_figures_show(won: int, lost: int, kind: str) -> None:
    found = verdict(summary(won, lost))
    assert found.kind == kind
    assert ("significantly more" in found.headline) == (kind == "gain")
    assert ("significantly fewer" in found.headline) == (kind == "loss")
    assert f"won: {won}, lost: {lost}" in found.detail
    assert f"{100 * (won - lost) / 200:+.2f}" in found.detail


def test_two_models_that_guess_allow_no_conclusion() -> None:
    assert verdict(summary(30, 5, at_chance=("base/all", "tuned/all"))).kind == "void"
    assert verdict(summary(30, 5, at_chance=("base/all", "base/a"))).kind == "gain"
    assert verdict(summary(30, 5, at_chance=("base/all",), below=("tuned/all",))).kind == "void"


def test_two_models_below_chance_point_at_the_prompt() -> None:
    found = verdict(summary(30, 5, below=("base/all", "tuned/all")))
    assert found.kind == "void"
    assert "below chance" in found.headline
    assert "prompt" in found.headline


def test_tasks_are_judged_with_correction_for_their_number() -> None:
    assert "better: a" in by_task(summary(30, 5))
    assert "worse: a" in by_task(summary(5, 30))
    assert "None of the 2 tasks" in by_task(summary(9, 8))
    single = summary(30, 5)
    del single["splits"]["test"]["b"]
    assert by_task(single) == ""


def test_an_idle_regularizer_and_a_worse_alignment_are_told() -> None:
    quiet, told = summary(1, 1), summary(1, 1)
    told["probe"]["gradient_ratio"] = 0.004
    told["diagnostics"]["tuned"]["task_silhouette"] = 0.05
    assert not any("idle" in line or "not aligned" in line for line in notes(quiet, RegularizerConfig()))
    lines = "\n".join(notes(told, RegularizerConfig()))
    assert "idle" in lines
    assert "0.40%" in lines
    assert "not aligned" in lines
    # No regularizer, or a λ of 0, is a choice and not a fault.
    assert not any("idle" in line for line in notes(told, RegularizerConfig(kind="none")))
    assert not any("idle" in line for line in notes(told, RegularizerConfig(weight=0)))


def test_safety_counts_lost_answers_against_those_that_were_right() -> None:
    text = safety(summary(3, 5))
    assert "lost: 5 (5.0% of 100); won: 3" in text
    assert "50.0% to 75.0%" in text


def test_tiny_p_values_are_bounds() -> None:
    assert p_value(1e-9) == "< 1e-6"
    assert p_value(0.03456) == "0.0346"


def test_a_collapse_is_a_note_and_what_watched_is_told() -> None:
    found = "the routing may have collapsed in epoch(s) 2"
    told = {**summary(30, 5), "epochs": [{"routing": {}}], "collapse": [found]}
    assert found in notes(told, RegularizerConfig())
    assert found in guard_words(told, GuardConfig())
    quiet = {**told, "collapse": []}
    assert "No epoch was past a threshold" in guard_words(quiet, GuardConfig())
    assert "Nothing was judged" in guard_words(quiet, GuardConfig(action="none"))
    assert "was not measured" in guard_words({**quiet, "epochs": [{}]}, GuardConfig())
