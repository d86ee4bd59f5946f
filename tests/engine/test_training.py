"""The training loop: against a literal torch loop, over worker counts, over kills at every step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from roma_ray.config.finetune_settings import FinetuneConfig, RegularizerConfig
from roma_ray.engine.cache import FrozenLayers
from roma_ray.engine.training import finetune
from roma_ray.errors import CheckpointError, TrainingError
from roma_ray.runs.pipeline import Run
from tests.engine.loops import assert_same, literal_router_tuning, stop_at, train, train_on
from tests.making import train_job


@pytest.mark.parametrize("regularizer", [{"kind": "none"}, {"kind": "manifold", "weight": 0.0}])
def test_lambda_zero_equals_a_literal_torch_loop_bit_for_bit(letter_run: Run, regularizer: dict[str, Any]) -> None:
    job = train_job(letter_run, regularizer=RegularizerConfig(**regularizer))
    expected = literal_router_tuning(job, packed=True)
    outcome = train(job)
    assert outcome.epochs[-1]["lambda"] == 0
    for layer, gate in expected.items():
        assert torch.equal(outcome.gates[f"layers.{layer}.weight"], gate)


def test_lambda_zero_equals_tuning_the_whole_stock_model(letter_run: Run) -> None:
    """Packing, cache, trims and masters together change nothing: the same gates to rounding after every step of a run."""
    job = train_job(letter_run, regularizer=RegularizerConfig(kind="none"))
    expected, outcome = literal_router_tuning(job, packed=False), train(job)
    for layer, gate in expected.items():
        torch.testing.assert_close(outcome.gates[f"layers.{layer}.weight"], gate, rtol=1e-3, atol=1e-4)


def test_without_a_cache_the_frozen_layers_run_again_to_the_same_gates(letter_run: Run) -> None:
    job = train_job(letter_run)
    data, head = job.open_data(), job.load_head()
    trunk = job.model.load(0, job.setup.cut + 1, with_lm_head=False)
    without = dataclasses.replace(data, states=FrozenLayers(trunk, job.setup.cut, data.states.prefix))
    cached = finetune(head, data, job.settings, layers=job.setup.layers, seed=job.setup.config.seed)
    # The same loaded head again: a run leaves it as it was.
    again = finetune(head, without, job.settings, layers=job.setup.layers, seed=job.setup.config.seed)
    for key, gate in cached.gates.items():
        torch.testing.assert_close(again.gates[key], gate, rtol=1e-3, atol=1e-4)
    assert_same(cached, finetune(head, data, job.settings, layers=job.setup.layers, seed=job.setup.config.seed))


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_any_number_of_workers_gives_the_same_bits(letter_run: Run, workers: int) -> None:
    job = train_job(letter_run)
    alone = train(job)
    for outcome in train_on(workers, job):
        assert_same(alone, outcome)


@pytest.mark.parametrize("refresh", [False, True])
def test_a_run_stopped_after_any_step_ends_with_the_same_bits(letter_run: Run, tmp_path: Path, refresh: bool) -> None:
    regularizer = RegularizerConfig(weight=30.0, refresh=refresh)
    job = train_job(letter_run, checkpoint_steps=1, regularizer=regularizer, select="best_validation")
    straight = train(job)
    total = len(straight.step_table)
    assert total >= 6
    for stop in range(1, total + 1, 2):
        checkpoint = tmp_path / f"{stop}.safetensors"
        stop_at(stop, job, checkpoint)
        redone: list[int] = []
        resumed = train(job, checkpoint=checkpoint, advance=lambda count, note, redone=redone: redone.append(count))
        assert_same(straight, resumed)
        # The last step of an epoch is saved with the epoch's end, so at most one step is done again.
        assert len(redone) <= total - stop + 1


def test_a_run_goes_on_with_another_number_of_workers_to_the_same_bits(letter_run: Run, tmp_path: Path) -> None:
    job = train_job(letter_run, checkpoint_steps=1)
    straight = train(job)
    checkpoint = tmp_path / "elastic.safetensors"
    stop_at(3, job, checkpoint)
    for outcome in train_on(3, job, checkpoint=checkpoint):
        assert_same(straight, outcome)


def test_a_damaged_checkpoint_is_a_named_error(letter_run: Run, tmp_path: Path) -> None:
    job = train_job(letter_run)
    checkpoint = tmp_path / "checkpoint.safetensors"
    train(job, checkpoint=checkpoint)
    whole = checkpoint.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2]):
        checkpoint.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="remove it"):
            train(job, checkpoint=checkpoint)


def test_best_validation_exports_its_epoch(letter_run: Run) -> None:
    outcome = train(train_job(letter_run, epochs=3, select="best_validation"))
    accuracies = [epoch["validation_accuracy"] for epoch in outcome.epochs]
    assert outcome.selected_epoch == accuracies.index(max(accuracies))


def test_a_loss_that_is_not_finite_stops_before_the_gates_move(letter_run: Run) -> None:
    with pytest.raises(TrainingError, match="learning_rate"):
        train(train_job(letter_run, learning_rate=1e30, epochs=3, regularizer=RegularizerConfig(weight=1e30)))


def test_cloze_trains_on_the_gold_continuation(cloze_run: Run) -> None:
    job = train_job(cloze_run, epochs=4)
    assert job.open_data().cloze
    outcome = train(job)
    assert outcome.epochs[-1]["task_loss"] < outcome.epochs[0]["task_loss"]


def test_the_loop_stays_readable() -> None:
    source = Path(finetune.__code__.co_filename).read_text().splitlines()
    assert len(source) < 210
    assert FinetuneConfig().weight_decay == 0
