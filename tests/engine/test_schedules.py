"""One schedule for lambda, the learning rate and the weight of the task loss; temperature and dropout of router logits."""

from __future__ import annotations

import math

import pytest
import torch

from roma_ray.config.finetune_settings import (
    FinetuneConfig,
    LogitsConfig,
    RegularizerConfig,
    ScheduleConfig,
    TaskScheduleConfig,
)
from roma_ray.engine.forward import lay_out
from roma_ray.engine.schedules import Moment, factor, moment
from roma_ray.questions.prompts import Prompt

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
    assert moment(FinetuneConfig(), 0.8, 0, 39, TOTAL).task == 1.0


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
        now = moment(config, 3.0, 0, step, TOTAL)
        assert now.rate == 2.0 * min(1, (step + 1) / 20)
        assert now.strength == pytest.approx(3.0 * (1 - 0.5 * (step + 1) / TOTAL))
        assert now.task == (step + 1) / 40


@pytest.mark.parametrize("anneal", ["linear", "cosine"])
@pytest.mark.parametrize("start", [0.5, 2.0])
def test_the_temperature_ends_at_one(start: float, anneal: str) -> None:
    config = FinetuneConfig(logits=LogitsConfig(temperature=start, anneal=anneal))  # type: ignore[arg-type]
    found = [moment(config, 1.0, 0, step, TOTAL).temperature for step in range(TOTAL)]
    for step, value in enumerate(found):
        done = (step + 1) / TOTAL
        left = 1 - done if anneal == "linear" else (1 + math.cos(math.pi * done)) / 2
        assert value == pytest.approx(1 + (start - 1) * left)
    assert found[-1] == 1.0
    assert sorted(found, reverse=start > 1) == found


def prompts(count: int) -> list[Prompt]:
    """Prompts of several lengths that share two tokens, with two choices of one and of three tokens."""
    return [
        Prompt(f"q{n}", "a", "train", (1, 2, *range(3, 6 + n)), ((7,), (8, 9, 10)), (1, 3), 0, False)
        for n in range(count)
    ]


def test_without_temperature_and_dropout_no_factor_is_made() -> None:
    now = moment(FinetuneConfig(), 0.8, 0, 3, TOTAL)
    assert now.logit_factors(lay_out(prompts(2)), 2, 4) is None


def test_dropout_is_a_function_of_seed_step_and_question() -> None:
    def drawn(seed: int, step: int, which: list[int], prefix: int = 2) -> dict[str, torch.Tensor]:
        asked = [prompts(4)[n] for n in which]
        layout = lay_out(asked, prefix=prefix)
        factors = Moment(1.0, 1.0, dropout=0.3, seed=seed, step=step).logit_factors(layout, 2, 5)
        assert factors is not None
        assert (factors[:prefix] == 1).all(), "shared tokens are nobody's"
        assert [len(span) for span in layout.spans()] == [len(p.prompt_ids) - prefix + 2 for p in asked]
        return {p.id: factors[span.start : span.stop] for p, span in zip(asked, layout.spans(), strict=True)}

    usual = drawn(5, 7, [0, 1, 2])
    other = drawn(5, 7, [3, 2, 0])
    for name in ("q0", "q2"):
        assert torch.equal(usual[name], other[name])
    for changed in (drawn(6, 7, [0, 1, 2]), drawn(5, 8, [0, 1, 2])):
        assert all(not torch.equal(usual[name], changed[name]) for name in usual)
    assert not torch.equal(usual["q0"], usual["q1"][: len(usual["q0"])])


def test_dropout_drops_its_part_and_scales_the_others_up() -> None:
    layout = lay_out(prompts(40))
    factors = Moment(1.0, 1.0, dropout=0.2, temperature=2.0).logit_factors(layout, 3, 8)
    assert factors is not None
    assert factors.unique().tolist() == pytest.approx([0.0, 1 / 0.8 / 2.0])
    count = factors.numel()
    assert abs((factors == 0).sum() - 0.2 * count) < 5 * (0.16 * count) ** 0.5
    # Every token, layer and expert has its own.
    assert all(0 < (part == 0).double().mean() < 1 for axis in range(3) for part in factors.transpose(0, axis)[:3])
