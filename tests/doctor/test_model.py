"""`roma-ray doctor --model`: the family, and the self-check's figures, a layer at a time and once."""

from __future__ import annotations

from pathlib import Path

import pytest

from roma_ray.doctor.model import examine_model
from roma_ray.engine.kept_selfchecks import read_checks
from roma_ray.engine.setup import ModelSpec
from tests.tiny import save_tiny, tiny_moe


def test_every_layer_is_checked_alone_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tiny(tiny_moe("gemma4"), tmp_path / "model")
    model, checked = examine_model(path, str(tmp_path / "storage"))
    assert (model.state, checked.state) == ("ok", "ok")
    assert "gemma4" in model.detail
    assert "experts in 6 of 6 layers, 3 of 8 a token" in model.detail
    figures = dict(part.rsplit(" ", 1) for part in checked.detail.partition("pass: ")[2].split(", "))
    assert list(figures) == ["packed", "resumed", "trimmed", "routing", "gradient"]
    assert all(0 <= float(value) < 1e-4 for value in figures.values())
    folder = next((tmp_path / "storage" / "checks").iterdir())
    assert [(f["start"], f["stop"]) for f in read_checks(folder)] == [(n, n + 1) for n in range(6)]

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("what was checked is loaded again")

    monkeypatch.setattr(ModelSpec, "load", loaded)
    assert list(examine_model(path, str(tmp_path / "storage"))) == [model, checked]


def test_a_model_that_cannot_be_tuned_and_routers_out_of_reach_are_told(tmp_path: Path) -> None:
    (refused,) = examine_model(save_tiny(tiny_moe("phimoe"), tmp_path / "phi"), str(tmp_path / "storage"))
    assert refused.state == "broken"
    assert "sparsemixer" in refused.detail
    path = save_tiny(tiny_moe("mixtral", num_experts_per_tok=1), tmp_path / "top1")
    *_, routers = examine_model(path, str(tmp_path / "storage"))
    assert routers.state == "note"
    assert "does not reach" in routers.detail
