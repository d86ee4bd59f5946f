"""Tasks that are held out: never trained on, never validated on, never neighbors; their test questions are judged apart.

Only their test questions are judged, though none of the others trains either: so the test questions are the same whatever
is held out, and runs and trials that differ in it are paired question by question on one extraction.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from roma_ray.errors import ConfigError, QuestionError

UNUSED = "unused"
"""The part of a held-out task's training and validation questions."""
_MOST_NAMED = 12


def parts_in_force(asked: Iterable[tuple[str, str]], held_out: Sequence[str]) -> list[str]:
    """Each question's part where some tasks are held out, from its (task, part)."""
    held = set(held_out)
    return [UNUSED if task in held and part != "test" else part for task, part in asked]


def check_names(held_out: Sequence[str], tasks: Iterable[str]) -> None:
    """Raise ConfigError, with the nearest names, for a held-out task that no question has."""
    known = sorted(set(tasks))
    for name in held_out:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            meant = f"did you mean {' or '.join(near)}? " if near else ""
            more = f" and {len(known) - _MOST_NAMED} more" if len(known) > _MOST_NAMED else ""
            raise ConfigError(
                f"questions.held_out_tasks: no question is of a task '{name}'; {meant}tasks: {', '.join(known[:_MOST_NAMED])}{more}"
            )


def check_held_out(held_out: Sequence[str], asked: Sequence[tuple[str, str]]) -> None:
    """Whether the held-out tasks are there and can be judged, and leave something, from every question's (task, part).

    Raises:
        ConfigError: an unknown task, or nothing is left to train or to validate on.
        QuestionError: a held-out task without a test question.
    """
    check_names(held_out, (task for task, _ in asked))
    judged = {task for task, part in asked if part == "test"}
    for name in held_out:
        if name not in judged:
            raise QuestionError(
                f"the held-out task '{name}' has no test question, so nothing of it could be judged: set `split: test` on its source, "
                "or divide every task by questions.splits"
            )
    left = set(parts_in_force(asked, held_out)) if held_out else {"train", "validation"}
    if missing := [part for part in ("train", "validation") if part not in left]:
        raise ConfigError(
            f"questions.held_out_tasks ({', '.join(held_out)}) leaves no {' and no '.join(missing)} questions: hold out fewer tasks"
        )
