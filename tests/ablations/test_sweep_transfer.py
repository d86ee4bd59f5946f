"""Settings that hold tasks out: their own table, against literal figures, and no best one where validation differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from roma_ray.ablations.space import Space
from roma_ray.ablations.sweep_results import FinishedTrial, find
from roma_ray.ablations.sweep_transfer import held_out_notes, held_out_table, validated_differently
from roma_ray.ablations.sweep_words import headline, notes
from roma_ray.evaluation.transfer import by_group
from tests.ablations.made import finished, scores_of, space_of, sweep_of

COUNT = 240
TASKS = ["a", "b", "c"] * (COUNT // 3)
GOLD = np.arange(COUNT) % 4


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Space:
    factor = {"held out": {"setting": "questions.held_out_tasks", "values": [["a"], ["b", "c"]]}}
    return space_of(tmp_path_factory.mktemp("transfer"), one_at_a_time=factor, seeds=[0, 1])


def right(share: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(COUNT) < share


def groups(space: Space) -> list[list[FinishedTrial]]:
    """The centre and both levels, two seeds each; what is held out gains less."""
    base = scores_of(right(0.4, 9), GOLD)
    found: dict[str, list[FinishedTrial]] = {}
    for number, trial in enumerate(space.trials):
        held = trial.config.questions.held_out_tasks
        mask = np.isin(TASKS, held)
        tuned = scores_of(np.where(mask, right(0.45, number), right(0.7, number)), GOLD, seed=number)
        one = finished(trial, tuned, base=base, gold=GOLD, tasks=TASKS)
        if held:
            told = by_group(one.base, one.tuned, TASKS, {"a", "b", "c"} - set(held), held, one.measure)
            one = replace(one, held_out=told)
        found.setdefault(trial.group, []).append(one)
    return list(found.values())


def test_each_setting_s_gains_are_means_over_seeds_and_tasks(space: Space) -> None:
    members = groups(space)
    table = held_out_table(sweep_of(space), find(members))
    assert table is not None
    rows = {row[1]: row for row in table.rows}
    assert set(rows) == {"a", "b, c"}
    names = np.array(TASKS)
    centre = members[0]
    for group in members[1:]:
        held = group[0].trial.config.questions.held_out_tasks
        gain = np.mean([f.tuned[f.measure] - f.base[f.measure] for f in group], axis=0)
        by_task = {task: 100 * gain[names == task].mean() for task in "abc"}
        trained, other = (np.mean([by_task[t] for t in "abc" if (t in held) == side]) for side in (False, True))
        row = rows[", ".join(held)]
        assert row[2].startswith(f"{trained:+.2f} ± ")
        assert row[3].startswith(f"{other:+.2f} ± ")
        assert row[4].startswith(f"{other / trained:.2f} (")
        lost = np.mean([b.tuned[b.measure] - a.tuned[a.measure] for a, b in zip(centre, group, strict=True)], axis=0)
        assert row[5].startswith(f"{100 * np.mean([lost[names == task].mean() for task in held]):+.2f} ± ")


def test_no_setting_is_the_best_where_validation_questions_differ(space: Space, tmp_path: Path) -> None:
    members = groups(space)
    findings = find(members)
    assert validated_differently(findings)
    assert headline(findings).startswith("Settings that hold out different tasks are validated on different questions")
    told = notes(sweep_of(space), findings)
    assert any("their validation accuracies rank nothing" in line for line in told)
    # All hold out the same: comparable, and still mixed over all questions.
    alone = find(members[1:2])
    assert not validated_differently(alone)
    assert held_out_notes(alone) == [line for line in told if "mix trained and held-out tasks" in line]


def test_sweeps_that_hold_nothing_out_say_nothing_of_it(space: Space) -> None:
    findings = find([[replace(f, held_out=None) for f in group] for group in groups(space)])
    assert held_out_table(sweep_of(space), findings) is None
    assert held_out_notes(findings) == []
