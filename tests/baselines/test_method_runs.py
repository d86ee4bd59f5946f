"""Stages of methods: resumable, complete once, one method's failure never another's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from roma_ray.baselines.bench import Bench
from roma_ray.baselines.method_registry import METHODS
from roma_ray.baselines.method_runs import method_stage, read_failure, run_method, run_methods, seeds_of
from roma_ray.engine.answers import ANSWERS, read_answers
from roma_ray.engine.progress import Silence
from roma_ray.engine.work import serial
from roma_ray.errors import TrainingError
from roma_ray.store.artifacts import Stage


def run_some(bench: Bench, *methods: str, seeds: int = 1) -> dict[str, list[Stage]]:
    return run_methods(bench.setup, bench.stages, methods, seeds, serial, Silence())


def test_a_killed_method_goes_on_with_the_trials_that_it_has(letter: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the second trial loses that trial only, and the end is the same as without it."""
    method = METHODS["router_tuning"]
    # As the first of its seeds, so that the grid is its own.
    config = letter.setup.config.model_copy(update={"seed": 3})
    bench = dataclasses.replace(letter, setup=dataclasses.replace(letter.setup, config=config))
    stage = method_stage(bench.setup, bench.stages, "router_tuning", 3)
    rates: list[float] = []
    real = type(method).fit

    def dies_in_the_second(self: Any, bench: Bench, prepared: Any, rate: float, seed: int) -> Any:
        rates.append(rate)
        if len(rates) == 2:
            raise KeyboardInterrupt
        return real(self, bench, prepared, rate, seed)

    monkeypatch.setattr(type(method), "fit", dies_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_method(bench, "router_tuning", 3)
    assert not stage.complete
    kept = next((stage.path / "trials").iterdir())
    stamp = kept.stat().st_mtime_ns
    run_method(bench, "router_tuning", 3)
    assert rates == [0.003, 0.03, 0.03]
    assert kept.stat().st_mtime_ns == stamp
    facts = stage.manifest()["facts"]
    assert set(facts["trials"]) == {"0.003", "0.03"}
    assert facts["validation_accuracy"] == max(facts["trials"].values())
    best = [float(rate) for rate, value in facts["trials"].items() if value == facts["validation_accuracy"]]
    assert facts["learning_rate"] == min(best)
    answered = read_answers(stage.path / ANSWERS, "test")
    monkeypatch.undo()
    stage.discard()
    run_method(bench, "router_tuning", 3)
    assert read_answers(stage.path / ANSWERS, "test").equals(answered)


def test_further_seeds_take_the_first_ones_rate_and_differ(letter: Bench) -> None:
    found = run_some(letter, "prompt_tuning", "base", seeds=2)
    assert len(found["base"]) == 1
    first, second = found["prompt_tuning"]
    rates = [stage.manifest()["facts"]["learning_rate"] for stage in (first, second)]
    assert rates[0] == rates[1]
    assert len(second.manifest()["facts"]["trials"]) == 1
    scores = [read_answers(stage.path / ANSWERS, "test").column("scores") for stage in (first, second)]
    assert scores[0] != scores[1]
    assert seeds_of(letter.setup, "c3po", 3) == [0]


def test_a_second_run_computes_nothing(letter: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run_some(letter, "base", "c3po_mode")
    monkeypatch.setattr(type(METHODS["base"]), "predict", None)
    monkeypatch.setattr(type(METHODS["c3po_mode"]), "predict", None)
    after = run_some(letter, "base", "c3po_mode")
    assert [s.path for s in after["base"]] == [s.path for s in before["base"]]


def test_a_failing_method_is_named_and_the_next_attempt_can_succeed(
    letter: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise TrainingError("the loss is not finite")

    with monkeypatch.context() as patch:
        patch.setattr(type(METHODS["prefix_tuning"]), "fit", fails)
        found = run_some(letter, "base", "prefix_tuning", "c3po_mode")
        failure = read_failure(found["prefix_tuning"][0])
    assert failure is not None
    assert (failure["kind"], failure["text"]) == ("TrainingError", "the loss is not finite")
    assert "fails" in failure["traceback"]
    assert found["base"][0].complete
    assert found["c3po_mode"][0].complete
    again = run_some(letter, "prefix_tuning")["prefix_tuning"][0]
    assert again.complete
    assert read_failure(again) is None
    assert "failure.json" not in again.manifest()["files"]


def test_answers_and_costs_of_a_stage(letter: Bench) -> None:
    found = run_some(letter, "base", "oracle", "icl")
    facts = {name: stages[0].manifest()["facts"] for name, stages in found.items()}
    table = read_answers(found["oracle"][0].path / ANSWERS, "test")
    prompts = letter.data.prompts
    assert table.column("row").to_pylist() == letter.rows["test"]
    assert table.column("aim").to_pylist() == [prompts[row].answer for row in letter.rows["test"]]
    right = [p == a for p, a in zip(table["prediction"].to_pylist(), table["answer"].to_pylist(), strict=True)]
    assert table.column("correct").to_pylist() == right
    # 5 forward and 4 backward passes over the head, a start, and one trunk; demonstrations lengthen the prompt.
    assert facts["oracle"]["flops_per_question"] > 5 * (facts["base"]["flops_per_question"] / 3)
    assert facts["icl"]["flops_per_question"] > 2 * facts["base"]["flops_per_question"]
    assert all(f["questions_per_second"] > 0 for f in facts.values())
    assert json.loads((Path(found["base"][0].path) / "manifest.json").read_text())["stage"] == "baselines"


def test_flops_are_those_of_the_whole_model(letter: Bench) -> None:
    """Head and trunk counted apart against the whole model's own count."""
    from roma_ray.baselines.method_costs import counted, trunk_cost
    from roma_ray.baselines.whole_model import score_whole

    rows = letter.rows["test"][:8]
    prompts = [letter.data.prompts[row] for row in rows]
    whole = counted(rows, lambda sample: score_whole(letter, prompts))
    parts = counted(rows, letter.answer) + trunk_cost(letter, rows).flops
    assert parts == pytest.approx(whole, rel=0.02)


def test_grouped_experts_cost_what_experts_one_by_one_cost(letter: Bench) -> None:
    """The experts backend of GPUs, run here on the CPU."""
    import dataclasses

    from roma_ray.baselines.method_costs import trunk_cost

    rows = letter.rows["test"][:8]
    model = dataclasses.replace(letter.setup.model, experts_backend="grouped_mm")
    other = dataclasses.replace(letter, setup=dataclasses.replace(letter.setup, model=model))
    assert trunk_cost(other, rows).flops == pytest.approx(trunk_cost(letter, rows).flops, rel=0.01)
