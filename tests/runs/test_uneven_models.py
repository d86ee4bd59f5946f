"""A model whose layers have different numbers of experts goes through doctor, a whole run, its exports and the baselines."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.prune_experts import write_pruned
from roma_ray.baselines.method_registry import METHODS
from roma_ray.baselines.method_runs import run_methods
from roma_ray.doctor.model import examine_model
from roma_ray.engine.progress import Silence
from roma_ray.engine.runners import LOCAL
from roma_ray.engine.setup import Setup, resolve
from roma_ray.moe.adapters import read_adapter
from roma_ray.moe.merged import save_merged
from roma_ray.moe.slices import load_slice, model_facts
from roma_ray.runs.pipeline import run
from roma_ray.stages.finetuning import read_routing_rows
from tests.baselines.conftest import BASELINES
from tests.world import make_world

KEPT = {0: range(8), 1: range(6), 2: range(8), 3: range(5), 4: (1, 2, 6, 7), 5: (0, 2, 3, 4, 5, 6, 7)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Setup, dict[str, Any]]:
    root: Path = tmp_path_factory.mktemp("uneven")
    config = make_world(root, "olmoe", count=60, baselines=BASELINES, finetune={"epochs": 1})
    shutil.move(root / "model", root / "whole")
    write_pruned(str(root / "whole"), root / "model", {layer: list(found) for layer, found in KEPT.items()}, 8)
    setup = resolve(config, device="cpu")
    return setup, dict(run(setup, Silence()).stages)


def test_doctor_checks_and_describes_it(world: tuple[Setup, dict[str, Any]]) -> None:
    setup, _ = world
    model, checked = examine_model(setup.model.path, str(setup.store.root))
    assert (model.state, checked.state) == ("ok", "ok")
    assert "3 of 4 to 8 a token" in model.detail


def test_it_is_tuned_evaluated_and_exported(world: tuple[Setup, dict[str, Any]], tmp_path: Path) -> None:
    setup, stages = world
    rows_NLE = read_routing_rows(stages["extract"].path, "Last1")
    assert rows_NLE.shape[1:] == (6, 8)
    for layer, kept in KEPT.items():
        assert bool(rows_NLE[:, layer, : len(kept)].gt(0).any(0).all())
        assert not rows_NLE[:, layer, len(kept) :].any()
    checkpoint = read_adapter(stages["finetune"].path / "adapter")
    assert {len(tensor) for tensor in checkpoint.tensors.values()} == {len(KEPT[layer]) for layer in setup.layers}
    save_merged(checkpoint, tmp_path / "merged")
    assert model_facts(str(tmp_path / "merged"))["experts_by_layer"] == [len(kept) for kept in KEPT.values()]
    tuned = load_slice(str(tmp_path / "merged"), dtype=torch.float32, with_lm_head=True)
    for router in tuned.routers:
        if router.layer in checkpoint.layers:
            assert torch.equal(router.gate.weight, checkpoint.tensors[f"{router.whole_name}.weight"])


def test_every_method_of_the_comparison_runs_on_it(world: tuple[Setup, dict[str, Any]]) -> None:
    setup, stages = world
    found = run_methods(setup, stages, list(METHODS), 1, LOCAL.baselines, Silence())
    assert [name for name, made in found.items() if not made[0].complete] == []
