"""Routers that the task loss cannot reach: training by it alone is refused, and beside the manifold term it is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from roma_ray.config.schema import Config
from roma_ray.engine.objective import Objective
from roma_ray.engine.progress import Silence
from roma_ray.engine.setup import resolve
from roma_ray.engine.training import finetune
from roma_ray.errors import TrainingError
from roma_ray.moe.masters import RouterMasters
from roma_ray.moe.reach import UNREACHED
from roma_ray.runs.pipeline import locate, run
from roma_ray.stages.finetuning import TrainJob
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


def tuned(job: TrainJob, weight: float | str) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    regularizer = job.settings.regularizer.model_copy(update={"weight": weight})
    config = job.settings.model_copy(update={"regularizer": regularizer})
    outcome = finetune(job.load_head(), job.open_data(), config, layers=job.setup.layers, seed=job.setup.config.seed)
    return outcome.gates, outcome.probe


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
    assert torch.equal(objective.gradients(micro, 0.8)[: len(alone)], alone)
    moved = masters.state()
    assert all(not torch.equal(gates[name], moved[name]) for name in moved)


def test_auto_has_nothing_to_weigh_against(job: TrainJob) -> None:
    _, probe = tuned(job, "auto")
    assert probe["weight"] == 1.0
    assert probe["gradient_ratio"] == 0.0
