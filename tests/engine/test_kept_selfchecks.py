"""The self-check on load: once a model, kept in the storage, whatever mode the caller is in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from roma_ray.engine import kept_selfchecks
from roma_ray.engine.kept_selfchecks import read_checks, worst_of
from roma_ray.engine.setup import ModelSpec, resolve
from tests.world import make_world


@pytest.fixture
def model(tmp_path: Path) -> ModelSpec:
    return resolve(make_world(tmp_path, count=12), device="cpu").model


def test_a_slice_is_checked_once_and_the_figures_are_kept(model: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    model.load(3, None, with_lm_head=True)
    (found,) = read_checks(model.checks)
    assert found["start"] == 3
    assert 0 < worst_of(model.checks)["packed"] < 1e-5

    def never(part: object) -> None:
        raise AssertionError("these layers were checked before")

    monkeypatch.setattr(kept_selfchecks, "check_slice", never)
    monkeypatch.setattr(kept_selfchecks, "_KNOWN", {})
    model.load(3, None, with_lm_head=True)
    model.load(4, None, with_lm_head=True)
    with pytest.raises(AssertionError, match="before"):
        model.load(2, None, with_lm_head=True)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"start": "a", "stop": 1}'])
def test_a_damaged_record_is_no_check(model: ModelSpec, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    model.load(3, None, with_lm_head=True)
    (file,) = Path(model.checks).glob("*.json")
    whole = file.read_text()
    file.write_text(damage)
    monkeypatch.setattr(kept_selfchecks, "_KNOWN", {})
    model.load(3, None, with_lm_head=True)
    assert file.read_text() == whole


def test_a_caller_without_gradients_gets_a_slice_that_can_be_trained(model: ModelSpec) -> None:
    with torch.inference_mode():
        part = model.load(3, None, with_lm_head=True)
    assert read_checks(model.checks)[0]["gradient"] is not None
    assert not any(parameter.is_inference() for parameter in part.model.parameters())
