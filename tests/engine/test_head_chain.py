"""A head in slices: the same bits as the head as a whole, in training, validation and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from roma_ray.config.finetune_settings import LogitsConfig, RegularizerConfig
from roma_ray.engine.progress import Silence
from roma_ray.engine.scoring import score_rows
from roma_ray.engine.setup import resolve
from roma_ray.engine.training import Outcome, finetune
from roma_ray.moe.adapters import load_adapter, save_adapter
from roma_ray.moe.chain import Chain, HereLinks
from roma_ray.moe.links import Link
from roma_ray.runs.pipeline import Run, run
from roma_ray.stages.finetuning import TrainJob
from tests.engine.loops import assert_same, train
from tests.making import train_job
from tests.tiny import EAGER
from tests.world import make_world


def in_slices(job: TrainJob, *starts: int, keep: bool = True) -> Chain:
    """The head of a job, cut before these layers too."""
    ends = [job.setup.cut, *starts]
    links = [
        Link(job.model.load(a, b, with_lm_head=False), job.setup.layers, first=n == 0, keep=keep)
        for n, (a, b) in enumerate(zip(ends, ends[1:], strict=False))
    ]
    return Chain(job.model.load(ends[-1], None, with_lm_head=True), HereLinks(links), job.setup.layers)


def trained(job: TrainJob, chain: Chain, **arguments: Any) -> Outcome:
    setup = job.setup
    return finetune(chain, job.open_data(), job.settings, layers=setup.layers, seed=setup.config.seed, **arguments)


def prepared(root: Path, family: str, layers: str, **sections: Any) -> Run:
    """A run up to what training reads, of a tiny model of six layers."""
    world = make_world(root, family, count=40, model={"attention": "eager" if family in EAGER else "sdpa"}, **sections)
    world = world.model_copy(update={"routing": world.routing.model_copy(update={"layers": layers})})
    return run(resolve(world), Silence(), until="finetune")


@pytest.mark.parametrize("keep", [True, False])
def test_two_slices_train_the_same_bits(letter_run: Run, keep: bool) -> None:
    job = train_job(letter_run)
    assert job.setup.layers == (4, 5)
    assert_same(train(job), trained(job, in_slices(job, 5, keep=keep)))
