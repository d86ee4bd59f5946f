"""The cross-task generalization index against literal writing, and its interval on simulated answers of known truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from roma_ray.evaluation.statistics import pair
from roma_ray.evaluation.transfer import (
    ALL,
    HELD_OUT,
    OTHER,
    TRAINED,
    by_group,
    ctgi,
    ctgi_cell,
    ctgi_rows,
    ctgi_words,
    held_out_notes,
    listed,
    transfer_words,
)


def answers(rng: np.random.Generator, n: int, gain: float, moved: float = 0.3) -> np.ndarray:
    """Paired gains of n questions: -1, 0 or 1, `moved` of them not 0, with this mean in truth."""
    won = (moved + gain) / 2
    return rng.choice([1.0, -1.0, 0.0], size=n, p=[won, moved - won, 1 - moved])


def test_the_index_is_the_ratio_of_the_tasks_mean_gains() -> None:
    trained = [np.array([1.0, 0, 0, 1]), np.array([0.0, 1])]  # .5 and .5
    held_out = [np.array([1.0, -1, 0, 0, 1]), np.array([0.0] * 7), np.array([1.0, 0])]  # .2, 0 and .5
    found = ctgi(trained, held_out, resamples=200)
    assert found["trained_gain"] == 0.5
    assert found["held_out_gain"] == pytest.approx(0.7 / 3)
    assert found["value"] == pytest.approx(0.7 / 3 / 0.5)
    errors = [pair(np.zeros(len(own)), own).difference_stderr for own in held_out]
    assert found["held_out_gain_stderr"] == pytest.approx(np.sqrt(np.square(errors).sum()) / 3)
    assert found == ctgi(trained, held_out, resamples=200), "the same answers, the same interval"


def literal_interval(
    trained: Sequence[np.ndarray], held_out: Sequence[np.ndarray], resamples: int
) -> tuple[float, float]:
    """Question by question drawn within each task, sorted by hand."""
    rng = np.random.default_rng(5)
    ratios = []
    for _ in range(resamples):
        means = [
            np.mean([np.mean([own[rng.integers(len(own))] for _ in own]) for own in tasks])
            for tasks in (trained, held_out)
        ]
        ratios.append(means[1] / means[0])
    ratios.sort()
    return ratios[int(0.025 * resamples)], ratios[int(0.975 * resamples)]


def test_the_interval_is_a_bootstrap_over_questions_within_tasks() -> None:
    rng = np.random.default_rng(0)
    trained = [answers(rng, 60, 0.28), answers(rng, 40, 0.25)]
    held_out = [answers(rng, 50, 0.1), answers(rng, 20, 0.0)]
    found = ctgi(trained, held_out)
    low, high = literal_interval(trained, held_out, 2000)
    width = high - low
    assert abs(found["low"] - low) < 0.15 * width
    assert abs(found["high"] - high) < 0.15 * width
    assert found["undefined"] == 0


def test_the_interval_covers_the_truth() -> None:
    """Four trained tasks that gain 10 points each, two held-out ones that gain 4: the index is 0.4."""
    rng = np.random.default_rng(1)
    covered = []
    for n in range(300):
        trained, held_out = ([answers(rng, 250, gain) for _ in range(tasks)] for gain, tasks in ((0.1, 4), (0.04, 2)))
        found = ctgi(trained, held_out, seed=n, resamples=1000)
        covered.append(found["low"] is not None and found["low"] <= 0.4 <= found["high"])
    # Binomial: a 95 % interval misses more than 27 of 300 once in a thousand.
    assert 273 <= sum(covered) < 300


def test_where_nothing_was_gained_on_trained_tasks_it_is_undefined_or_unbounded() -> None:
    """No gain in truth: a finite interval would be an error of at most 2.5 % of such studies."""
    rng = np.random.default_rng(2)
    finite = undefined = 0
    for n in range(400):
        found = ctgi([answers(rng, 150, 0.0) for _ in range(2)], [answers(rng, 150, 0.05)], seed=n, resamples=1000)
        undefined += found["value"] is None
        finite += found["low"] is not None
        assert (found["value"] is None) == (found["trained_gain"] <= 0)
        if found["low"] is not None:
            assert found["undefined"] <= 0.025 + 1e-9
    assert 150 < undefined < 260, "about half, and the ties"
    assert finite <= 20, "2.5 % of 400, and two standard errors more than once in a hundred"


def test_resamples_without_a_gain_widen_the_interval_before_they_make_it_unbounded() -> None:
    """Gains of 1, 2 and 3 standard errors: unbounded, at its edge, and finite."""
    held_out = [np.array([1.0] * 30 + [0.0] * 70)]
    found = []
    for wins in (4, 8, 12):
        gains = np.array([1.0] * (wins + 4) + [-1.0] * 4 + [0.0] * 84)
        found.append(ctgi([gains], held_out))
    shares = [one["undefined"] for one in found]
    assert shares[0] > 0.025 > shares[2]
    assert shares == sorted(shares, reverse=True)
    assert [one["low"] is None for one in found] == [share > 0.025 for share in shares]
    # Dropping such resamples would give an end that looks certain: they count as beyond every ratio.
    assert found[2]["high"] > 0.3 / 0.12


def test_gains_that_cancel_to_their_last_bits_are_no_gain() -> None:
    thirds = [np.array([1.0, 0, 0]), np.array([-1.0, 0, 0, 0, 0]), np.array([-1.0] * 2 + [0.0] * 13)]
    found = ctgi(thirds, [np.ones(4)])
    assert abs(found["trained_gain"]) < 1e-15
    assert found["value"] is None
    assert found["low"] is None


def grouped() -> dict[str, Any]:
    tasks = ["a", "b", "c", "d"] * 25
    rng = np.random.default_rng(3)
    base = {"acc": rng.integers(2, size=100).astype(float), "choice_logp": rng.normal(size=100)}
    tuned = {"acc": np.maximum(base["acc"], rng.integers(2, size=100)), "choice_logp": base["choice_logp"] + 0.5}
    return by_group(base, tuned, tasks, {"a", "b"}, ["c"], "acc") | {"_": (base, tuned, np.array(tasks))}


def test_groups_hold_their_tasks_and_no_others() -> None:
    found = grouped()
    base, tuned, tasks = found["_"]
    assert {name: one["tasks"] for name, one in found["groups"].items()} == {
        TRAINED: ["a", "b"],
        HELD_OUT: ["c"],
        OTHER: ["d"],
    }
    for one in found["groups"].values():
        mask = np.isin(tasks, one["tasks"])
        expected = pair(base["acc"][mask], tuned["acc"][mask])
        assert one["accuracy"]["difference"] == expected.difference
        assert one["accuracy"]["mcnemar_p"] == expected.mcnemar_p
        assert one["measures"]["choice_logp"]["micro"]["difference"] == pytest.approx(0.5)
        assert (one["measures"]["acc"]["macro"] is None) == (len(one["tasks"]) == 1)
    gains = {task: (tuned["acc"] - base["acc"])[tasks == task].mean() for task in "abcd"}
    # The task that is neither counts on no side.
    assert found["ctgi"]["acc"]["value"] == pytest.approx(gains["c"] / ((gains["a"] + gains["b"]) / 2))
    assert found["ctgi"]["choice_logp"]["value"] == pytest.approx(1.0)


def test_lines_of_a_table_tell_groups_apart_and_name_what_mixes_them() -> None:
    found = grouped()
    figures = {name: {"n": 25} for name in "abcd"} | {"all": {"n": 100}}
    assert [name for name, _ in listed(figures, found)] == ["a", "b", TRAINED, "c", HELD_OUT, "d", OTHER, ALL]
    assert [name for name, _ in listed(figures)] == ["a", "b", "c", "d", "all"]
    assert held_out_notes(None) == []
    (note,) = held_out_notes(found)
    assert note.startswith("25 of 100 test questions are of held-out tasks (c)")


def test_words_say_why_there_is_no_index() -> None:
    gain, loss, nothing = np.ones(20), -np.ones(20), np.array([1.0, -1, 1, 0, 0, 0, 0, 0, 0, 0])
    assert ctgi_words(ctgi([gain], [gain])) == "1.00 (95% interval 1.00 to 1.00)"
    assert ctgi_words(ctgi([loss], [gain])) == "undefined: the mean gain on trained tasks is not above zero"
    assert ctgi_cell(ctgi([loss], [gain])) == "undefined"
    unbounded = ctgi([nothing], [gain])
    assert "interval unbounded: in " in ctgi_words(unbounded)
    assert ctgi_cell(unbounded) == "10.00 (unbounded)"
    assert ctgi_words(ctgi([], [gain])).startswith("undefined: there are no test questions of both")
    told = transfer_words(grouped())
    assert "Held-out tasks (c): " in told
    assert "CTGI " in told
    assert [row[0] for row in ctgi_rows(grouped())] == ["acc", "choice_logp"]
