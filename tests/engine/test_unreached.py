"""Gradients that are rounding noise: of a task loss that cannot reach the routers, and of a term that has nowhere to pull.

Training by noise alone is refused, `auto` does not divide by it, and the task term is left out where the other carries.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from roma_ray.config.finetune_settings import RegularizerConfig
from roma_ray.config.schema import Config
from roma_ray.engine.objective import Objective, is_idle, is_noise, noise_level
from roma_ray.engine.progress import Silence
from roma_ray.engine.schedules import Moment
from roma_ray.engine.setup import resolve
from roma_ray.engine.training import finetune
from roma_ray.errors import TrainingError
from roma_ray.manifold.losses import neighbor_targets
from roma_ray.manifold.neighbors import own_neighborhoods
from roma_ray.moe.masters import RouterMasters
from roma_ray.moe.reach import UNREACHED
from roma_ray.runs.pipeline import Run, locate, run
from roma_ray.stages.finetuning import TrainJob
from tests.making import train_job
from tests.tiny import save_tiny, tiny_moe
from tests.world import make_world


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """A training on a model that takes one expert and scales its weight to 1."""
    root = tmp_path_factory.mktemp("top1")
    config: Config = make_world(root, "olmoe")
    vocabulary = tiny_vocabulary(root)
    save_tiny(
        tiny_moe("olmoe", seed=3, vocab_size=vocabulary, num_experts_per_tok=1, norm_topk_prob=True), root / "model"
    )
    setup = resolve(config)
    run(setup, Silence(), until="neighbors")
    stages = locate(setup)
    return TrainJob(setup, stages, stages["finetune"])


def tiny_vocabulary(root: Path) -> int:
    import json

    return int(json.loads((root / "model" / "config.json").read_text())["vocab_size"])


def tuned(
    job: TrainJob, weight: float | str, own: bool = False, **others: Any
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """`own`: every question is pulled to its own base routing (neighbors.method: self)."""
    regularizer = job.settings.regularizer.model_copy(update={"weight": weight, **others})
    config = job.settings.model_copy(update={"regularizer": regularizer})
    data = job.open_data()
    if own:
        data = dataclasses.replace(data, neighborhoods=own_neighborhoods(data.neighborhoods.queried))
    outcome = finetune(job.load_head(), data, config, layers=job.setup.layers, seed=job.setup.config.seed)
    return outcome.gates, outcome.probe


def sharpened(job: TrainJob, scale: float, distance: str) -> tuple[Objective, RegularizerConfig]:
    """The training as if all gates were `scale` times as large, r_j too."""
    head, data = job.load_head(), job.open_data()
    for router in head.routers:
        router.gate.weight.data *= scale
    term = RegularizerConfig(distance=distance)
    settings = job.settings.model_copy(update={"regularizer": term})
    objective = Objective(settings, head, data, RouterMasters(head, job.setup.layers))
    routing_NLE = data.routing_NLE.clone()
    routing_NLE[data.train] = torch.from_numpy(objective._score(data.train).routing_NLE[:, objective.columns])
    objective.targets = neighbor_targets(data.neighborhoods, routing_NLE)
    return objective, term


def test_the_task_loss_alone_is_refused_with_the_reason(job: TrainJob) -> None:
    with pytest.raises(TrainingError, match="does not reach these routers"):
        tuned(job, 0.0)


def test_the_manifold_term_alone_moves_them(job: TrainJob) -> None:
    gates, probe = tuned(job, 0.8)
    assert probe["reach"] < UNREACHED
    assert probe["regularizer_gradient"] > 1e-4
    head = job.load_head()
    masters = RouterMasters(head, job.setup.layers)
    objective = Objective(job.settings, head, job.open_data(), masters)
    objective.settle(probe)
    micro = next(objective.feed([objective.data.train[:4]]))
    _, penalty, _ = objective.losses(micro)
    alone = torch.cat([g.reshape(-1) for g in torch.autograd.grad(0.8 * penalty, masters.parameters())])
    assert torch.equal(objective.gradients(micro, Moment(rate=1e-3, strength=0.8))[: len(alone)], alone)
    moved = masters.state()
    assert all(not torch.equal(gates[name], moved[name]) for name in moved)


def test_auto_has_nothing_to_weigh_against(job: TrainJob) -> None:
    _, probe = tuned(job, "auto")
    assert probe["weight"] == 1.0
    assert probe["gradient_ratio"] == 0.0


@pytest.mark.parametrize("weight", [0.8, "auto"])
@pytest.mark.parametrize("distance", ["squared", "kl"])
def test_noise_beside_an_unreached_task_is_refused_with_the_reason(
    job: TrainJob, weight: float | str, distance: str
) -> None:
    with pytest.raises(
        TrainingError, match=r"does not reach these routers.*is rounding noise.*every question has the routing"
    ):
        tuned(job, weight, own=True, distance=distance)


def test_no_regularizer_beside_an_unreached_task_is_refused_with_its_gradient(job: TrainJob) -> None:
    with pytest.raises(TrainingError, match=r"follow rounding noise \(a gradient of \de-"):
        tuned(job, 0.8, kind="none")


@pytest.mark.parametrize("distance", ["squared", "kl"])
def test_a_pull_to_the_start_begins_as_noise_and_is_kept(letter_run: Run, distance: str) -> None:
    """Where the task loss carries, the term gets its gradient from the first step on."""
    asked = RegularizerConfig(weight=0.8)
    reached = train_job(letter_run)
    _, probe = tuned(reached, 0.8, own=True, distance=distance)
    assert probe["regularizer_gradient"] < 1e-6 < 1e-2 < probe["task_gradient"]
    assert is_noise(probe, asked)
    assert not is_idle(probe, asked)
    assert probe["final_regularizer_noise"] == 0
    assert probe["final_gradient_ratio"] > 1e-3
    near = tuned(reached, 0.8, distance=distance)[1]
    assert not is_noise(near, asked)
    # A weight of 0 asks for no regularizer.
    assert not is_noise(probe, RegularizerConfig(weight=0.0))


def test_the_pull_to_the_start_holds_the_gates(letter_run: Run) -> None:
    start = RouterMasters(train_job(letter_run).load_head(), letter_run.setup.layers).state()
    moved = []
    for weight in (0.0, 30.0):
        gates, _ = tuned(train_job(letter_run), weight, own=True)
        moved.append(sum(float((gates[key] - start[key]).square().sum()) for key in start))
    assert moved[1] < moved[0]


def test_auto_does_not_divide_by_noise(letter_run: Run) -> None:
    with pytest.raises(TrainingError, match=r"would divide by rounding noise.*neighbors.method: self"):
        tuned(train_job(letter_run), "auto", own=True)


@pytest.mark.parametrize(
    ("term", "reason"),
    [
        ({"kind": "base"}, "kind `base` pulls each question to its own routing at the start"),
        (
            {"kind": "entropy", "entropy_target": 0.0},
            "the entropy of every row is past finetune.regularizer.entropy_target",
        ),
    ],
    ids=str,
)
def test_a_term_that_begins_flat_is_told_with_its_own_reason(
    job: TrainJob, letter_run: Run, term: dict[str, Any], reason: str
) -> None:
    with pytest.raises(TrainingError, match=f"would divide by rounding noise.*{reason}.*Give a number instead"):
        tuned(train_job(letter_run), "auto", **term)
    # Alone it would be followed into noise, with any weight.
    with pytest.raises(
        TrainingError, match=f"does not reach these routers.*{reason}.*Nothing would move them but noise"
    ):
        tuned(job, 0.8, **term)
    # Beside a task loss that carries it trains, and is no idle regularizer.
    _, probe = tuned(train_job(letter_run), 0.8, **term)
    asked = RegularizerConfig(weight=0.8, **term)
    assert is_noise(probe, asked)
    assert not is_idle(probe, asked)
    assert (probe["final_gradient_ratio"] > 1e-3) is (term["kind"] == "base")


def test_auto_says_the_ratio_at_the_end_of_the_weight_in_force(letter_run: Run) -> None:
    _, probe = tuned(train_job(letter_run, epochs=3), "auto")
    norms = probe["final_regularizer_gradient"], probe["final_task_gradient"]
    assert probe["final_gradient_ratio"] == pytest.approx(probe["weight"] * norms[0] / norms[1])
    assert probe["final_gradient_ratio"] != pytest.approx(probe["gradient_ratio"], rel=1e-3)


@pytest.mark.parametrize(("scale", "starved"), [(1.0, False), (1000.0, True)])
def test_certain_routers_starve_the_squared_distance_alone(job: TrainJob, scale: float, starved: bool) -> None:
    for distance in ("squared", "kl"):
        objective, term = sharpened(job, scale, distance)
        probe = objective.probe(objective.data.train[:64])
        assert is_noise(probe, term) is (starved and distance == "squared")


def test_a_target_is_noise_by_the_type_of_the_model() -> None:
    assert 1e-6 < noise_level(torch.float32) < 1e-3 < noise_level(torch.bfloat16) < 0.05
