"""Schedules, decay, temperature and dropout in training: neutral values change no bit, what acts does what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from roma_ray.config.finetune_settings import LogitsConfig, RegularizerConfig, TaskScheduleConfig
from roma_ray.engine.forward import lay_out
from roma_ray.engine.schedules import Moment
from roma_ray.errors import UnmovedError
from roma_ray.manifold.losses import manifold_loss
from roma_ray.moe.masters import RouterMasters
from roma_ray.moe.reading import read_routing
from roma_ray.moe.routers import find_routers
from roma_ray.moe.scaling import scaled_logits
from roma_ray.runs.pipeline import Run
from tests.engine.loops import assert_same, gradients_of, literal_router_tuning, stop_at, train, train_on
from tests.making import train_job


def test_schedules_reach_their_targets_within_the_run(letter_run: Run) -> None:
    job = train_job(letter_run, warmup_fraction=0.5)
    outcome = train(job)
    rates = outcome.step_table[:, 3].tolist()
    assert rates[0] == pytest.approx(job.settings.learning_rate / round(0.5 * len(rates)))
    assert rates[-1] == pytest.approx(job.settings.learning_rate)
    assert outcome.step_table[-1, 2] == pytest.approx(outcome.probe["weight"])


def test_a_warm_up_in_steps_is_that_of_the_fraction_to_the_bit(letter_run: Run) -> None:
    usual = train(train_job(letter_run, warmup_fraction=0.5))
    steps = len(usual.step_table)
    told = train(train_job(letter_run, warmup_fraction=0.1, warmup_steps=round(0.5 * steps)))
    assert_same(usual, told)
    # Neither a floor that nothing falls to nor a task loss that is whole from the first step changes a bit.
    floor = TaskScheduleConfig(warmup_steps=1, anneal_floor=0.5)
    assert_same(usual, train(train_job(letter_run, warmup_fraction=0.5, anneal_floor=0.5, task_schedule=floor)))


def test_what_anneals_ends_at_its_floor(letter_run: Run) -> None:
    term = RegularizerConfig(weight=2.0, anneal="cosine", anneal_floor=0.25)
    outcome = train(train_job(letter_run, anneal="linear", anneal_floor=0.1, regularizer=term))
    assert outcome.step_table[-1, 2].item() == pytest.approx(0.5)
    assert outcome.step_table[-1, 3].item() == pytest.approx(0.1 * 0.01)
    assert outcome.epochs[-1]["lambda"] == outcome.step_table[-1, 2]


def test_a_training_whose_every_step_is_at_a_floor_of_zero_is_refused(letter_run: Run) -> None:
    """Its gates would be those of the base model, and be reported as a result."""
    one_step: dict[str, Any] = {"epochs": 1, "batch_size": 1000, "anneal": "linear"}
    with pytest.raises(UnmovedError, match="anneal_floor"):
        train(train_job(letter_run, **one_step))
    assert train(train_job(letter_run, **one_step, anneal_floor=0.1)).step_table[0, 3] > 0


def test_the_step_s_gradient_is_the_weighed_sum_of_both_terms(letter_run: Run) -> None:
    objective, masters, _, data = gradients_of(letter_run, "manifold")
    micro = objective.prepare(data.train[:4])
    task, penalty, _ = objective.losses(micro)
    parts = [torch.autograd.grad(term, masters.parameters(), retain_graph=True) for term in (task, penalty)]
    found = objective.gradients(micro, Moment(rate=1.0, strength=3.0, task=0.25))
    expected = torch.cat([(0.25 * a + 3.0 * b).reshape(-1) for a, b in zip(*parts, strict=True)])
    torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-4, atol=1e-6)


def test_with_a_warm_up_of_the_task_loss_the_manifold_comes_first(letter_run: Run) -> None:
    term = RegularizerConfig(weight=1.0, warmup_fraction=0.0)
    together, later = (
        train(train_job(letter_run, epochs=1, regularizer=term, task_schedule=TaskScheduleConfig(warmup_fraction=f)))
        for f in (0.0, 1.0)
    )
    assert later.epochs[-1]["manifold_loss"] < together.epochs[-1]["manifold_loss"]
    assert later.epochs[-1]["task_loss"] > together.epochs[-1]["task_loss"]


@pytest.mark.parametrize("decay_to", ["zero", "base"])
def test_weight_decay_is_decoupled_and_goes_where_it_should(letter_run: Run, decay_to: str) -> None:
    term = RegularizerConfig(kind="none")
    job = train_job(letter_run, regularizer=term, weight_decay=5.0, decay_to=decay_to)
    expected, outcome = literal_router_tuning(job, packed=True), train(job)
    free = train(train_job(letter_run, regularizer=term))
    for layer, gate in expected.items():
        torch.testing.assert_close(outcome.gates[f"layers.{layer}.weight"], gate, rtol=1e-5, atol=1e-6)
    start = RouterMasters(job.load_head(), job.setup.layers).state()
    ways = [sum(float((run.gates[key] - start[key]).square().sum()) for key in start) for run in (outcome, free)]
    assert (ways[0] < ways[1]) is (decay_to == "base")


NEUTRAL = [
    {"logits": LogitsConfig(temperature=1.0, dropout=0.0, anneal="cosine")},
    {"decay_to": "base"},
]


@pytest.mark.parametrize("settings", NEUTRAL, ids=str)
def test_neutral_values_change_no_bit(letter_run: Run, settings: dict[str, Any]) -> None:
    assert_same(train(train_job(letter_run)), train(train_job(letter_run, **settings)))


ACTING: dict[str, dict[str, Any]] = {
    "temperature": {"logits": LogitsConfig(temperature=0.5)},
    "dropout": {"logits": LogitsConfig(dropout=0.2)},
    "decay": {"weight_decay": 0.5, "decay_to": "base"},
    "all": {
        "logits": LogitsConfig(temperature=2.0, dropout=0.2, anneal="cosine"),
        "weight_decay": 0.5,
        "decay_to": "base",
        "warmup_steps": 2,
        "anneal": "cosine",
        "anneal_floor": 0.1,
        "task_schedule": TaskScheduleConfig(warmup_fraction=0.5),
        "regularizer": RegularizerConfig(weight=3.0, anneal="linear", anneal_floor=0.3, refresh=True),
    },
}


@pytest.mark.parametrize("name", ACTING)
def test_what_acts_is_the_same_bits_on_any_workers_and_after_a_stop(letter_run: Run, tmp_path: Path, name: str) -> None:
    job = train_job(letter_run, checkpoint_steps=1, **ACTING[name])
    alone = train(job)
    usual = train(train_job(letter_run))
    assert all(not torch.equal(alone.gates[key], usual.gates[key]) for key in usual.gates)
    for workers in (2, 3):
        for outcome in train_on(workers, job):
            assert_same(alone, outcome)
    stop_at(3, job, tmp_path / "acting.safetensors")
    for outcome in train_on(2, job, checkpoint=tmp_path / "acting.safetensors"):
        assert_same(alone, outcome)


@pytest.mark.parametrize("run_name", ["letter_run", "cloze_run"])
def test_temperature_and_dropout_are_those_of_the_stock_model_question_by_question(
    request: pytest.FixtureRequest, run_name: str
) -> None:
    """Through a packing with a shared instruction and a trimmed last layer, and through whole sequences: the same losses."""
    run: Run = request.getfixturevalue(run_name)
    objective, _, _, data = gradients_of(run, "manifold")
    rows, now = data.train[:5], Moment(rate=1.0, strength=1.0, temperature=0.7, dropout=0.3, seed=3, step=11)
    task, penalty, _ = objective.losses(objective.prepare(rows), now)
    model = AutoModelForCausalLM.from_pretrained(
        run.setup.model.path, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    routers = [router for router in find_routers(model) if router.layer in run.setup.layers]
    losses, pulls = 0.0, 0.0
    for row in rows:
        prompt = data.prompts[row]
        layout = lay_out([prompt], prefix=data.states.prefix, gold_only=data.cloze)
        factors = now.logit_factors(layout, len(routers), routers[0].num_experts)
        assert factors is not None
        gold = prompt.choice_ids[prompt.answer]
        ids = [*prompt.prompt_ids, *gold[:-1]]
        assert len(ids) == len(factors), "one question alone is a sequence"
        last = len(prompt.prompt_ids) - 1
        with (
            torch.no_grad(),
            scaled_logits(routers, factors),
            read_routing(model, routers, torch.tensor([[last]])) as tape,
        ):
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, last:]
        pulls += float(manifold_loss(tape.routing_BPLE[0], objective.targets.take(torch.tensor([row]))))
        letters = [choice[0] for choice in prompt.choice_ids]
        scored, aims = (logits, gold) if data.cloze else (logits[:, letters], [prompt.answer])
        losses += float(torch.nn.functional.cross_entropy(scored, torch.tensor(aims)))
    assert task.item() == pytest.approx(losses, rel=1e-4)
    assert penalty.item() == pytest.approx(pulls, rel=1e-4)
    plain = objective.losses(objective.prepare(rows))
    assert plain[0].item() != pytest.approx(losses, rel=1e-3)
    assert plain[1].item() != pytest.approx(pulls, rel=1e-3)
