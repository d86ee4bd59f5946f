"""One schedule for lambda, the learning rate and the weight of the task loss."""

from __future__ import annotations

import math

import pytest

from roma_ray.config.finetune_settings import FinetuneConfig, RegularizerConfig, ScheduleConfig, TaskScheduleConfig
from roma_ray.engine.schedules import factor, moment

TOTAL = 40


def run_of(**settings: object) -> list[float]:
    schedule = ScheduleConfig(**settings)  # type: ignore[arg-type]
    return [factor(schedule, step, TOTAL) for step in range(TOTAL)]


@pytest.mark.parametrize("settings", [{"warmup_fraction": 0.25}, {"warmup_steps": 10, "warmup_fraction": 0.9}])
def test_the_warm_up_is_linear_and_then_everything(settings: dict[str, float]) -> None:
    assert run_of(**settings) == [(step + 1) / 10 for step in range(10)] + [1.0] * 30


@pytest.mark.parametrize(
    "settings", [{"warmup_fraction": 0.0}, {"warmup_steps": 0}, {"anneal": "linear", "anneal_floor": 1.0}]
)
def test_neutral_schedules_change_nothing(settings: dict[str, object]) -> None:
    assert run_of(**{"warmup_fraction": 0.0, **settings}) == [1.0] * TOTAL
    assert moment(FinetuneConfig(), 0.8, 39, TOTAL).task == 1.0


@pytest.mark.parametrize("floor", [0.0, 0.25])
@pytest.mark.parametrize("anneal", ["linear", "cosine"])
def test_the_anneal_goes_from_the_end_of_the_warm_up_to_the_floor(anneal: str, floor: float) -> None:
    found = run_of(warmup_steps=10, anneal=anneal, anneal_floor=floor)
    assert found[:10] == [(step + 1) / 10 for step in range(10)]
    for step in range(10, TOTAL):
        done = (step + 1 - 10) / 30
        left = 1 - done if anneal == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        assert found[step] == pytest.approx(floor + (1 - floor) * left)
    assert found[-1] == pytest.approx(floor)
    assert found[9:] == sorted(found[9:], reverse=True)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_short_runs_and_long_warm_ups_stay_between_nothing_and_everything(total: int) -> None:
    for settings in ({"warmup_steps": 50}, {"warmup_fraction": 1.0, "anneal": "cosine"}, {"anneal": "linear"}):
        schedule = ScheduleConfig(**settings)  # type: ignore[arg-type]
        assert all(0 <= factor(schedule, step, total) <= 1 for step in range(total))
    assert factor(ScheduleConfig(warmup_steps=50), total - 1, total) == total / 50


def test_each_value_follows_its_own_schedule() -> None:
    config = FinetuneConfig(
        learning_rate=2.0,
        warmup_fraction=0.5,
        task_schedule=TaskScheduleConfig(warmup_steps=40),
        regularizer=RegularizerConfig(warmup_fraction=0.0, anneal="linear", anneal_floor=0.5),
    )
    for step in range(TOTAL):
        now = moment(config, 3.0, step, TOTAL)
        assert now.rate == 2.0 * min(1, (step + 1) / 20)
        assert now.strength == pytest.approx(3.0 * (1 - 0.5 * (step + 1) / TOTAL))
        assert now.task == (step + 1) / 40
