"""Held-out tasks keep their test questions and nothing else; names that mean nothing are told with those that do."""

from __future__ import annotations

import pytest

from roma_ray.errors import ConfigError, QuestionError
from roma_ray.questions.held_out import UNUSED, check_held_out, parts_in_force

ASKED = [(task, part) for task in ("arc_easy", "arc_hard", "piqa") for part in ("train", "validation", "test")]


def test_a_held_out_task_is_only_tested() -> None:
    assert parts_in_force(ASKED, ["piqa", "arc_easy"]) == [
        UNUSED, UNUSED, "test", "train", "validation", "test", UNUSED, UNUSED, "test",
    ]  # fmt: skip
    assert parts_in_force(ASKED, []) == [part for _, part in ASKED]


def test_an_unknown_task_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(ConfigError, match=r"no question is of a task 'arc_eazy'; did you mean arc_easy or arc_hard\?"):
        check_held_out(["piqa", "arc_eazy"], ASKED)
    with pytest.raises(ConfigError, match=r"task 'x'; tasks: arc_easy, arc_hard, piqa"):
        check_held_out(["x"], ASKED)
    many = [(f"task {n:02}", "train") for n in range(40)]
    with pytest.raises(ConfigError, match=r"task 11 and 28 more$"):
        check_held_out(["?"], many)


def test_what_cannot_be_judged_or_leaves_nothing_is_refused() -> None:
    check_held_out([], [])
    check_held_out(["piqa", "arc_easy"], ASKED)
    with pytest.raises(QuestionError, match=r"'piqa' has no test question.*split: test"):
        check_held_out(["piqa"], ASKED[:-1])
    with pytest.raises(ConfigError, match="leaves no train and no validation questions: hold out fewer"):
        check_held_out(["piqa", "arc_easy", "arc_hard"], ASKED)
    with pytest.raises(ConfigError, match="leaves no validation questions"):
        check_held_out(["piqa"], [("piqa", "validation"), ("piqa", "test"), ("other", "train")])
