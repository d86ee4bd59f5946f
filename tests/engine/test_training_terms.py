"""Each term of the loss in training: its gradient against literal loops, which gates it reaches, its weight."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from roma_ray.config.finetune_settings import RegularizerConfig
from roma_ray.engine.objective import Objective, TrainingData
from roma_ray.manifold import losses
from roma_ray.moe.layers import token_positions
from roma_ray.moe.masters import RouterMasters
from roma_ray.moe.reading import read_routing
from roma_ray.moe.routers import find_routers
from roma_ray.runs.pipeline import Run
from roma_ray.stages.finetuning import TrainJob
from roma_ray.stages.neighborhoods import answered_rightly
from roma_ray.store import scratch
from tests.engine.loops import assert_same, gradients_of, stop_at, train, train_on
from tests.making import train_job


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("manifold", {}),
        ("manifold", {"distance": "kl"}),
        ("l1", {}),
        ("l2", {}),
        ("entropy", {}),
        ("entropy", {"entropy_sign": "lower", "entropy_target": 0.1}),
        ("base", {}),
        ("prior", {}),
        ("prior", {"prior": "task"}),
    ],
    ids=str,
)
def test_each_regularizer_reaches_every_tuned_gate_and_nothing_else(
    letter_run: Run, kind: str, others: dict[str, Any]
) -> None:
    objective, masters, head, data = gradients_of(letter_run, kind, **others)
    if kind == "base":
        # It has no slope where training starts.
        with torch.no_grad():
            for gate in masters.parameters():
                gate.mul_(1.5)
    _, penalty, _ = objective.losses(objective.prepare(data.train[:6]))
    penalty.backward()
    for gate in masters.parameters():
        assert gate.grad is not None
        assert gate.grad.abs().sum() > 0
    trained = {id(gate) for gate in masters.parameters()}
    assert all(p.grad is None for p in head.model.parameters() if id(p) not in trained)


def test_the_task_term_reaches_every_tuned_gate(letter_run: Run) -> None:
    objective, masters, _, data = gradients_of(letter_run, "none")
    task, penalty, _ = objective.losses(objective.prepare(data.train[:6]))
    task.backward()
    assert penalty.item() == 0
    assert all(gate.grad is not None and gate.grad.abs().sum() > 0 for gate in masters.parameters())


def test_the_manifold_term_equals_the_double_loop_over_neighbors(letter_run: Run) -> None:
    objective, _, _, data = gradients_of(letter_run, "manifold")
    rows = data.train[:6]
    _, penalty, _ = objective.losses(objective.prepare(rows))
    # Before the first step the live routing is the stored one.
    total = 0.0
    for row in rows:
        others, _, weights = data.neighborhoods.of(row)
        for other, weight in zip(others.tolist(), weights.tolist(), strict=True):
            total += weight * float((data.routing_NLE[row].double() - data.routing_NLE[other].double()).square().sum())
    assert penalty.item() == pytest.approx(total, rel=1e-4)


def test_the_kl_equals_the_loop_over_layers_and_trains(letter_run: Run) -> None:
    objective, _, _, data = gradients_of(letter_run, "manifold", distance="kl")
    rows = data.train[:6]
    _, penalty, _ = objective.losses(objective.prepare(rows))
    total = 0.0
    for row in rows:
        others, _, weights = data.neighborhoods.of(row)
        for layer in range(data.routing_NLE.shape[1]):
            for expert in range(data.routing_NLE.shape[2]):
                mean = sum(
                    weight * float(data.routing_NLE[other, layer, expert])
                    for other, weight in zip(others.tolist(), weights.tolist(), strict=True)
                )
                total += mean * math.log(mean / float(data.routing_NLE[row, layer, expert]))
    assert penalty.item() == pytest.approx(total, rel=1e-4)
    outcome = train(train_job(letter_run, epochs=3, regularizer=RegularizerConfig(weight=30.0, distance="kl")))
    assert outcome.epochs[-1]["manifold_loss"] < outcome.epochs[0]["manifold_loss"]


@pytest.mark.parametrize("term", [{"kind": "base"}, {"kind": "prior"}, {"kind": "prior", "prior": "task"}], ids=str)
def test_a_fixed_pull_equals_the_loop_over_questions_and_trains(letter_run: Run, term: dict[str, Any]) -> None:
    objective, masters, _, data = gradients_of(letter_run, **term)
    correct = answered_rightly(letter_run.setup, letter_run.stages)
    rows, total = data.train[:6], 0.0
    with torch.no_grad():
        for gate in masters.parameters():
            gate.mul_(1.5)
    scored = torch.from_numpy(objective._score(rows).routing_NLE[:, objective.columns]).double()
    for live, row in zip(scored, rows, strict=True):
        task = [n for n in data.train if data.prompts[n].task == data.prompts[row].task and correct[n]]
        for layer in range(live.shape[0]):
            for expert in range(live.shape[1]):
                if term["kind"] == "base":
                    q = float(data.routing_NLE[row, layer, expert])
                elif "prior" in term:
                    q = sum(float(data.routing_NLE[n, layer, expert]) for n in task) / len(task)
                else:
                    q = 1 / live.shape[1]
                total += float(live[layer, expert]) * math.log(float(live[layer, expert]) / q)
    assert objective.losses(objective.prepare(rows))[1].item() == pytest.approx(total, rel=1e-4)
    ends = [
        train(train_job(letter_run, epochs=3, regularizer=RegularizerConfig(weight=w, **term))) for w in (0.0, 30.0)
    ]
    assert ends[1].epochs[-1]["manifold_loss"] < ends[0].epochs[-1]["manifold_loss"]


def literal_pull_of_each(job: TrainJob, data: TrainingData, rows: list[int]) -> tuple[float, dict[int, torch.Tensor]]:
    """Each of the last positions pulled to the neighbors' at the same place, one question at a time through the whole stock model."""
    model = AutoModelForCausalLM.from_pretrained(job.model.path, dtype=torch.float32, experts_implementation="eager")
    routers = [router for router in find_routers(model.eval()) if router.layer in job.setup.layers]

    def rows_of(question: int) -> torch.Tensor:
        ids = data.prompts[question].prompt_ids
        places = torch.tensor([token_positions(data.tokens, len(ids))])
        with read_routing(model, routers, places) as tape:
            model(torch.tensor([ids]), use_cache=False)
        return tape.routing_BPLE[0]

    total = torch.zeros(())
    for row in rows:
        own, (others, _, weights) = rows_of(row), data.neighborhoods.of(row)
        for other, weight in zip(others.tolist(), weights.tolist(), strict=True):
            theirs = rows_of(other).detach()
            for place in range(own.shape[0]):
                total = total + weight * (own[place] - theirs[place]).square().sum()
    total.backward()
    return float(total.detach()), {router.layer: router.module.weight.grad for router in routers}


def test_a_pull_at_each_position_is_a_loop_over_positions_of_the_stock_model(letter_run: Run) -> None:
    job = train_job(letter_run, regularizer=RegularizerConfig(positions="sum"))
    data, head = dataclasses.replace(job.open_data(), tokens="Last3"), job.load_head()
    masters = RouterMasters(head, job.setup.layers)
    objective = Objective(job.settings, head, data, masters)
    rows = data.train[:5]
    expected, gradients = literal_pull_of_each(job, data, rows)
    _, penalty, _ = objective.losses(objective.prepare(rows))
    assert penalty.item() == pytest.approx(expected, rel=1e-4)
    penalty.backward()
    for layer, gradient in gradients.items():
        torch.testing.assert_close(masters.parameters_by_layer[layer]["weight"].grad, gradient, rtol=1e-3, atol=1e-5)
    # The mean row's pull is another one.
    usual = Objective(job.settings.model_copy(update={"regularizer": RegularizerConfig()}), head, data, masters)
    assert usual.losses(usual.prepare(rows))[1].item() != pytest.approx(expected, rel=1e-2)


def test_at_one_position_the_pulls_are_one(letter_run: Run) -> None:
    mean, each = (
        train(train_job(letter_run, regularizer=RegularizerConfig(weight=30.0, positions=positions, refresh=True)))
        for positions in ("mean", "sum")
    )
    for key, gate in mean.gates.items():
        torch.testing.assert_close(each.gates[key], gate, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"refresh": True}, {"kind": "prior", "prior": "task"}, {"positions": "sum", "refresh": True}],
    ids=["mean", "task prior", "sum"],
)
def test_routing_rows_and_targets_that_are_mapped_train_the_same_bits(
    letter_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    job = train_job(letter_run, regularizer=RegularizerConfig(weight=30.0, **settings))
    held = train(job)
    monkeypatch.setenv("ROMA_RAY_SCRATCH", str(tmp_path))
    monkeypatch.setattr(scratch, "HELD_BYTES", 100)
    monkeypatch.setattr(losses, "_BLOCK_PAIRS", 10)
    data, head = job.open_data(), job.load_head()
    objective = Objective(job.settings, head, data, RouterMasters(head, job.setup.layers))
    files = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(files) >= 2, "the rows and the targets at least"
    assert list(tmp_path.iterdir()) == []
    del objective, data
    assert_same(held, train(job))


@pytest.mark.parametrize("tokens", ["Last3", "All"])
def test_pulls_at_each_position_are_the_same_bits_on_any_workers_and_after_a_stop(
    letter_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: str
) -> None:
    usual = TrainJob.open_data
    monkeypatch.setattr(TrainJob, "open_data", lambda job: dataclasses.replace(usual(job), tokens=tokens))
    term = RegularizerConfig(weight=3.0, positions="sum", distance="kl", refresh=True)
    job = train_job(letter_run, regularizer=term, checkpoint_steps=1)
    alone = train(job)
    assert alone.epochs[-1]["manifold_loss"] < alone.epochs[0]["manifold_loss"]
    for outcome in train_on(2, job):
        assert_same(alone, outcome)
    stop_at(len(alone.step_table) - 1, job, tmp_path / "each.safetensors")
    assert_same(alone, train(job, checkpoint=tmp_path / "each.safetensors"))


def test_training_lowers_the_regularizer_when_lambda_is_large(letter_run: Run) -> None:
    strong = train(train_job(letter_run, epochs=4, regularizer=RegularizerConfig(weight=100.0)))
    assert strong.epochs[-1]["manifold_loss"] < strong.epochs[0]["manifold_loss"]
    assert strong.probe["final_regularizer_gradient"] != strong.probe["regularizer_gradient"]


@pytest.mark.parametrize(
    "term",
    [
        *({"kind": kind} for kind in ("manifold", "l1", "l2", "entropy", "prior")),
        {"kind": "entropy", "entropy_sign": "lower"},
        {"kind": "prior", "prior": "task"},
    ],
    ids=str,
)
def test_auto_weight_meets_the_gradient_ratio(letter_run: Run, term: dict[str, Any]) -> None:
    outcome = train(train_job(letter_run, regularizer=RegularizerConfig(weight="auto", gradient_ratio=0.25, **term)))
    assert outcome.probe["gradient_ratio"] == pytest.approx(0.25, rel=1e-6)
    assert outcome.epochs[-1]["lambda"] == pytest.approx(outcome.probe["weight"])
