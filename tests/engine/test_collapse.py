"""The figures of an epoch's routing against literal loops, and the guard: each action on a collapse that is provoked."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from roma_ray.config.finetune_settings import FinetuneConfig, GuardConfig, RegularizerConfig
from roma_ray.engine import collapse as module
from roma_ray.engine.checkpoint import LoopState
from roma_ray.engine.collapse import FIGURES, act, collapse_notes, collapsed, describe_collapse, routing_figures
from roma_ray.engine.runners import LOCAL
from roma_ray.engine.scoring import Scores
from roma_ray.engine.work import Job
from roma_ray.errors import TrainingError
from roma_ray.runs.pipeline import Run
from roma_ray.stages.finetuning import ADAPTER, EPOCHS, finetune_routers, live_epochs
from roma_ray.store.artifacts import Stage
from tests.engine.loops import Stop, assert_same, stop_at, train, train_on
from tests.making import train_job, with_settings
from tests.progress import Told

LOWERED = RegularizerConfig(kind="entropy", entropy_sign="lower", weight=50.0, warmup_fraction=1.0)
COLLAPSING: dict[str, Any] = {"epochs": 4, "learning_rate": 0.02, "regularizer": LOWERED}
"""The term drives the entropy to 0: after the first epoch about half is left, after the second less than 0.3."""


def guard(action: str, **thresholds: Any) -> GuardConfig:
    return GuardConfig(**{"action": action, "least_entropy": 0.3, **thresholds})


def literal_figures(tuned: torch.Tensor, base: torch.Tensor, top_k: int) -> dict[str, list[float]]:
    """The figures by loops over layers, questions and experts."""
    found: dict[str, list[float]] = {
        name: [] for name in (*FIGURES, "base_entropy", "base_load_max", "base_unused_experts")
    }
    questions, layers, experts = tuned.shape
    for layer in range(layers):
        for name, rows in (("", tuned), ("base_", base)):
            entropy, counts = 0.0, [0] * experts
            for q in range(questions):
                row = rows[q, layer].tolist()
                entropy -= sum(p * math.log(p) for p in row if p > 0) / questions
                for expert in sorted(range(experts), key=lambda e, row=row: (-row[e], e))[:top_k]:
                    counts[expert] += 1
            loads = sorted(count / (questions * top_k) for count in counts)
            found[f"{name}entropy"].append(entropy)
            found[f"{name}load_max"].append(loads[-1])
            found[f"{name}unused_experts"].append(counts.count(0))
            for percent in (5, 50, 95) if not name else ():
                place = percent / 100 * (experts - 1)
                low = math.floor(place)
                high = min(low + 1, experts - 1)
                found[f"load_p{percent}"].append(loads[low] + (place - low) * (loads[high] - loads[low]))
        kl = 0.0
        for q in range(questions):
            for p, before in zip(tuned[q, layer].tolist(), base[q, layer].tolist(), strict=True):
                kl += p * math.log(p / before) / questions
        found["kl_to_base"].append(kl)
    return found


def test_the_figures_are_those_of_loops_over_questions_and_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    tuned, base = ((2 * torch.randn(7, 3, 11, generator=generator)).softmax(-1) for _ in range(2))
    found, expected = routing_figures(tuned, base, 2), literal_figures(tuned, base, 2)
    assert (found["num_experts"], found["top_k"]) == (11, 2)
    for name in set(expected) - {"gradient_norm"}:
        assert found[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-9), name
    assert any(found["unused_experts"])


def test_an_epoch_s_figures_are_of_its_own_validation_pass_and_steps(letter_run: Run) -> None:
    """With one step an epoch the mean gradient norm by layer is that step's, and all layers make up the whole."""
    outcome = train(train_job(letter_run, batch_size=1000, epochs=2))
    for epoch, (*_, norm) in zip(outcome.epochs, outcome.step_table.tolist(), strict=True):
        found = epoch["routing"]
        assert found["layers"] == list(letter_run.setup.layers)
        assert math.hypot(*found["gradient_norm"]) == pytest.approx(norm, rel=1e-5)
        assert found["first_gradient_norm"] == outcome.epochs[0]["routing"]["gradient_norm"]
        assert all(moved > 0 for moved in found["kl_to_base"])
    assert [e["routing"]["base_entropy"] for e in outcome.epochs[1:]] == [outcome.epochs[0]["routing"]["base_entropy"]]


def record(**changes: Any) -> dict[str, Any]:
    """An epoch of one layer, 8 experts, 2 of them a token, as the base model has it."""
    figures = {"entropy": 1.2, "load_max": 0.3, "unused_experts": 1, "gradient_norm": 0.5}
    base = {"base_entropy": 1.2, "base_load_max": 0.3, "base_unused_experts": 1, "first_gradient_norm": 0.5}
    found = {name: [value] for name, value in {**figures, **base, **changes}.items()}
    return {"epoch": 0, "routing": {"layers": [7], "num_experts": 8, "top_k": 2, **found}}


@pytest.mark.parametrize(
    ("name", "fine", "past", "off"),
    [
        ("entropy", 0.61, 0.59, {"least_entropy": 0.0}),
        ("entropy", 1.2 + 0.89 * (math.log(8) - 1.2), 1.2 + 0.91 * (math.log(8) - 1.2), {"most_entropy": 1.0}),
        ("unused_experts", 3, 4, {"most_unused": 1.0}),
        ("load_max", 0.3 + 0.89 * 0.2, 0.3 + 0.91 * 0.2, {"most_load": 1.0}),
        ("gradient_norm", 4.9, 5.1, {"most_gradient": 1e9}),
    ],
)
def test_each_threshold(name: str, fine: float, past: float, off: dict[str, float]) -> None:
    assert collapsed(record(), GuardConfig()) == []
    assert collapsed(record(**{name: fine}), GuardConfig()) == []
    (phrase,) = collapsed(record(**{name: past}), GuardConfig())
    (setting,) = off
    assert phrase.startswith("layer 7 ")
    assert setting in phrase
    assert collapsed(record(**{name: past}), GuardConfig(**off)) == []
    assert collapsed(record(**{name: past}), GuardConfig(action="none")) == []


def test_what_the_base_model_has_itself_is_no_collapse() -> None:
    """No entropy, one expert for all questions, even weights, or no gradient in the first epoch: nothing to lose or to compare."""
    for value, figures in (
        (0.0, ["entropy"]),
        (0.5, ["load_max"]),
        (math.log(8), ["entropy"]),
        (7, ["unused_experts"]),
    ):
        same = {f"{prefix}{name}": value for name in figures for prefix in ("", "base_")}
        assert collapsed(record(**same), GuardConfig()) == []
    assert collapsed(record(first_gradient_norm=0.0), GuardConfig()) == []
    assert collapsed({"epoch": 0}, GuardConfig()) == [], "an earlier version measured nothing"


@pytest.mark.parametrize("action", ["warn", "halve", "stop"])
def test_a_guard_that_finds_nothing_changes_no_bit(letter_run: Run, action: str) -> None:
    without = train(train_job(letter_run, guard=GuardConfig(action="none")))
    assert_same(without, train(train_job(letter_run, guard=GuardConfig(action=action, most_unused=1.0))))


def test_warn_says_so_and_changes_no_bit(letter_run: Run) -> None:
    without, warned = (train(train_job(letter_run, **COLLAPSING, guard=guard(action))) for action in ("none", "warn"))
    assert_same(without, warned)
    lines = [describe_collapse(epoch, guard("warn")) for epoch in warned.epochs]
    assert lines[0] == ""
    assert all(line.startswith("warning: the routing may have collapsed in epoch") for line in lines[1:])
    assert not any(describe_collapse(epoch, guard("none")) for epoch in warned.epochs)
    (note,) = collapse_notes(warned.epochs, 3, guard("warn"))
    assert "epoch(s) 2, 3, 4 (epoch 4, one of them, is exported)" in note


def test_halve_trains_on_with_half_the_lambda(letter_run: Run) -> None:
    usual, halved = (train(train_job(letter_run, **COLLAPSING, guard=guard(action))) for action in ("warn", "halve"))
    steps = len(usual.step_table) // 4
    factors = (halved.step_table[:, 2] / usual.step_table[:, 2]).tolist()
    # Epochs 2 and 3 are past the threshold; after the last one nothing is left to halve.
    assert factors == pytest.approx([1.0] * 2 * steps + [0.5] * steps + [0.25] * steps)
    assert torch.equal(halved.step_table[: 2 * steps], usual.step_table[: 2 * steps])
    assert [epoch.get("lambda_factor") for epoch in halved.epochs] == [None, 0.5, 0.25, None]
    assert any(not torch.equal(halved.gates[key], usual.gates[key]) for key in usual.gates)
    # What the ends' gradient ratio says is of the lambda that was left.
    assert halved.probe["weight"] == 50
    ratio = 12.5 * halved.probe["final_regularizer_gradient"] / halved.probe["final_task_gradient"]
    assert halved.probe["final_gradient_ratio"] == pytest.approx(ratio)
    assert describe_collapse(halved.epochs[1], guard("halve")).endswith(
        "λ is halved from epoch 3 on, to 0.5 of what was set"
    )
    assert collapse_notes(halved.epochs, 3, guard("halve"))[1] == "the guard halved λ from epoch(s) 3, 4 on"


@pytest.mark.parametrize("select", ["last", "best_validation"])
def test_stop_keeps_the_last_good_epoch(letter_run: Run, tmp_path: Path, select: str) -> None:
    one = train(train_job(letter_run, **COLLAPSING, guard=guard("none")))
    stopped = train(train_job(letter_run, **COLLAPSING, guard=guard("stop"), select=select))
    steps = len(one.step_table) // 4
    assert torch.equal(stopped.step_table, one.step_table[: 2 * steps])
    assert [epoch.get("stopped") for epoch in stopped.epochs] == [None, True]
    assert stopped.selected_epoch == 0

    def first(epoch: dict[str, Any]) -> None:
        if epoch["epoch"] == 0:
            raise Stop

    # The gates of epoch 1, from the checkpoint of a run that was killed there.
    checkpoint = tmp_path / "killed.safetensors"
    with pytest.raises(Stop):
        train(train_job(letter_run, **COLLAPSING, guard=guard("none")), checkpoint=checkpoint, report=first)
    kept = saved_gates(checkpoint)
    assert kept.keys() == stopped.gates.keys()
    assert all(torch.equal(stopped.gates[key], kept[key]) for key in kept)
    assert "Training stops here: the routers of epoch 1" in describe_collapse(stopped.epochs[1], guard("stop"))
    notes = collapse_notes(stopped.epochs, 0, guard("stop"))
    assert "(epoch 1, not one of them, is exported)" in notes[0]
    assert notes[1] == "the guard stopped the training after epoch 2"


def saved_gates(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {k.removeprefix("gate."): v for k, v in load_file(checkpoint).items() if k.startswith("gate.")}


def test_stop_without_a_good_epoch_is_an_error_that_says_what_to_do(letter_run: Run, tmp_path: Path) -> None:
    job = train_job(letter_run, epochs=2, learning_rate=3.0, guard=guard("stop"))
    heard: list[dict[str, Any]] = []
    for _ in range(2):  # and again from the checkpoint, without another step
        with pytest.raises(TrainingError, match=r"in the first epoch.*layer 4 .*learning_rate"):
            train(job, checkpoint=tmp_path / "c.safetensors", report=heard.append)
    assert [epoch["stopped"] for epoch in heard] == [True]


@pytest.mark.parametrize("action", ["halve", "stop"])
def test_a_killed_run_goes_on_to_the_same_bits(letter_run: Run, tmp_path: Path, action: str) -> None:
    job = train_job(letter_run, **COLLAPSING, guard=guard(action), checkpoint_steps=1)
    straight = train(job)
    total = len(straight.step_table)
    for stop in range(2, total + 1, 3):
        checkpoint = tmp_path / f"{stop}.safetensors"
        stop_at(stop, job, checkpoint)
        resumed = train(job, checkpoint=checkpoint)
        assert_same(straight, resumed)
        assert resumed.selected_epoch == straight.selected_epoch
        # And from the checkpoint of the end, which the export had not followed.
        assert_same(straight, train(job, checkpoint=checkpoint))


@pytest.mark.parametrize("action", ["halve", "stop"])
def test_two_workers_give_the_same_bits(letter_run: Run, action: str) -> None:
    job = train_job(letter_run, **COLLAPSING, guard=guard(action))
    alone = train(job)
    for outcome in train_on(2, job):
        assert_same(alone, outcome)
        assert outcome.selected_epoch == alone.selected_epoch


@dataclasses.dataclass
class Second:
    """The second of two workers; what the first says of a collapse is given."""

    first: float
    rank: int = 1
    size: int = 2

    def gather(self, mine: list[torch.Tensor], total: int) -> list[torch.Tensor]:
        return [torch.tensor([self.first]), *mine]


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_workers_follow_the_first(first: float) -> None:
    """Their devices may round otherwise: they must not go separate ways."""
    config = FinetuneConfig(guard=guard("stop"))
    own = record(entropy=1.2 if first else 0.01)
    state = LoopState(probe={}, epoch_start={}, epochs=[own])
    act(config, state, Second(first))
    assert state.stopped is bool(first)


def test_best_validation_never_keeps_a_collapsed_epoch_of_a_stopped_run() -> None:
    state = LoopState(probe={}, epoch_start={}, best_epoch=0, epochs=[{"epoch": 0, "validation_accuracy": 0.1}])
    state.epochs.append({"epoch": 1, "validation_accuracy": 0.9})
    state.stopped = True
    state.keep_best({})
    assert state.best_epoch == 0
    state.stopped = False
    state.keep_best({})
    assert state.best_epoch == 1


def test_a_checkpoint_of_an_earlier_version_counts_only_what_it_measured() -> None:
    state = LoopState(
        probe={}, epoch_start={}, sums={"task": 1.0, "manifold": 1.0, "entropy": 1.0, "norm": 8.0, "count": 4.0}
    )
    facts = {"task": 1.0, "manifold": 1.0, "entropy": 1.0, "norm": 2.0, "norm of layer 7": 2.0}
    state.record(facts, 1.0, 0.1, 4)
    scores = Scores([0], [[0.0]], [0], torch.tensor([True]).numpy(), torch.zeros(1, 1, 8).numpy())
    found = state.close_epoch(0, scores, {"layers": [7]})
    assert found["gradient_norm"] == 2.0
    assert found["routing"]["gradient_norm"] == [2.0]


def test_the_stage_tells_it_live_and_ends_early(letter_run: Run, tmp_path: Path) -> None:
    setup = with_settings(letter_run.setup, "finetune", **COLLAPSING, guard=guard("stop"))
    stage = Stage(tmp_path / "stage", "finetune", {})
    stage.path.mkdir()
    said = Told()
    facts = finetune_routers(Job(setup, letter_run.stages, stage), LOCAL, said)
    assert facts["selected_epoch"] == 0
    assert (stage.path / ADAPTER).is_dir()
    epochs = [json.loads(line) for line in (stage.path / EPOCHS).read_text().splitlines()]
    assert len(epochs) == 2
    lines = [line for line in said.lines if "epoch" in line]
    assert "% of the base model's routing entropy" in lines[0]
    assert any(line.startswith("warning: the routing may have collapsed in epoch 2") for line in lines)
    assert [bool(epoch["collapse_findings"]) for epoch in live_epochs(stage)] == [False, True]


def test_many_phrases_are_cut() -> None:
    assert module.listed(["a", "b", "c"]) == "a; b; c"
    assert module.listed(["a", "b", "c", "d", "e"]) == "a; b; c; and 2 more"
