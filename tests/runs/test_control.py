"""The positive control: the whole pipeline sees a gain that is there, and says so when any part of the method is broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from roma_ray.assets import assets_path
from roma_ray.cli.commands import main
from roma_ray.config.loading import load_config
from roma_ray.config.schema import Config
from roma_ray.engine import objective
from roma_ray.engine.progress import Silence
from roma_ray.engine.setup import resolve
from roma_ray.errors import ConfigError, GuardError, RomaError, TrainingError
from roma_ray.evaluation.statistics import pair
from roma_ray.manifold.losses import NeighborTargets
from roma_ray.manifold.regularizers import REGULARIZERS
from roma_ray.runs import control as controls
from roma_ray.runs.control import ARMS, ROMA, Arm, checks_of, control, gains
from roma_ray.runs.pipeline import run

FEW = [
    {"path": "assets:control/questions/train.jsonl", "limit": 900},
    {"path": "assets:control/questions/test.jsonl", "limit": 400},
]
SETTINGS = [f"questions.sources={json.dumps(FEW)}", "finetune.epochs=2"]
RANDOM = "random successes"


def small(storage: Path, *overrides: str) -> Config:
    config = load_config(assets_path() / "control.yaml", [*SETTINGS, *overrides])
    return config.model_copy(update={"storage": str(storage)})


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with the extraction of the few questions: what is trained differs from test to test."""
    storage: Path = tmp_path_factory.mktemp("control")
    run(resolve(small(storage)), Silence(), until="neighbors")
    return storage


@pytest.fixture
def storage(extracted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(extracted, tmp_path / "storage"))


@pytest.fixture
def two_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "ARMS", {name: ARMS[name] for name in (ROMA, RANDOM)})


def test_a_gain_that_is_there_is_found_and_none_where_there_is_none(storage: Path) -> None:
    found = control(small(storage), Silence())
    assert found.passed, found.words()
    gain = found.arms[ROMA].paired
    assert gain is not None
    assert 0.03 < gain.difference < 0.25
    assert found.arms["lambda = 0"].paired is None
    assert "does not reach these routers" in found.arms["lambda = 0"].reason
    assert found.plain()["passed"]


@pytest.mark.usefixtures("two_arms")
def test_it_fails_when_the_targets_are_other_questions(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = objective.neighbor_targets

    def dealt_out(*given: Any) -> NeighborTargets:
        targets = real(*given)
        order = torch.randperm(len(targets.mean), generator=torch.Generator().manual_seed(0))
        return NeighborTargets(targets.mean[order], *targets[1:])

    monkeypatch.setattr(objective, "neighbor_targets", dealt_out)
    assert not control(small(storage), Silence()).passed


@pytest.mark.usefixtures("two_arms")
def test_it_fails_when_the_gradient_is_cut(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = REGULARIZERS["manifold"]
    monkeypatch.setitem(REGULARIZERS, "manifold", lambda *given: real(*given).detach())
    with pytest.raises(controls.GuardError, match="nothing could be trained"):
        control(small(storage), Silence())


@pytest.mark.usefixtures("two_arms")
def test_it_fails_without_the_manifold_term(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(controls.ARMS, ROMA, ARMS["lambda = 0"])
    found = control(small(storage), Silence())
    assert not found.passed
    assert found.words()[-1] == "control: FAILED"


@pytest.mark.parametrize("setting", [*(setting for settings in ARMS.values() for setting in settings)])
def test_roma_is_not_trained_as_one_of_its_controls(tmp_path: Path, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting} is what the control .* leave that setting out"):
        control(small(tmp_path, setting), Silence())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [TrainingError, GuardError])
def test_a_control_that_fails_is_no_control_without_a_gain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[RomaError]
) -> None:
    def fails(*_: Any) -> None:
        raise failure("the loss is not finite")

    monkeypatch.setattr(controls, "run", fails)
    with pytest.raises(failure, match="not finite"):
        control(small(tmp_path), Silence())


def arms(**right: np.ndarray) -> Mapping[str, Arm]:
    base = np.zeros(1)
    return {name: Arm(name, pair(base, base), verdicts) for name, verdicts in right.items()}


def test_every_statement_is_checked() -> None:
    base = np.arange(200) < 100
    better, same = np.arange(200) < 130, base
    assert all(check.holds for check in checks_of(arms(RoMA=better, other=same), base))
    # Both gain: the control must not, and RoMA must be above it.
    assert [check.holds for check in checks_of(arms(RoMA=better, other=better), base)] == [True, False, False]
    assert [check.holds for check in checks_of(arms(RoMA=same, other=same), base)] == [False, True, False]


def test_the_p_of_a_gain_is_the_binomial_s_upper_tail() -> None:
    from math import comb

    before = np.array([True] * 3 + [False] * 9)
    after = np.array([False] * 2 + [True] * 8 + [False] * 2)
    won, n = 7, 9
    assert gains(before, after) == pytest.approx(sum(comb(n, k) for k in range(won, n + 1)) / 2**n)
    assert gains(before, before) == 1.0


def test_the_command_ends_with_1_where_a_check_fails(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "ARMS", {ROMA: ARMS["its own routing"], RANDOM: ARMS[RANDOM]})
    options = [f"--set={setting}" for setting in SETTINGS]
    done = CliRunner().invoke(
        main, ["control", "--storage", str(storage), "--quiet", "--summary", str(storage / "s.json"), *options]
    )
    assert done.exit_code == 1, done.output
    assert "control: FAILED" in done.output
    assert json.loads((storage / "s.json").read_text())["passed"] is False
