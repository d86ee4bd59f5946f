"""`roma-ray doctor --model`: the family, and the self-check's figures, a layer at a time and once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from roma_ray.doctor.model import examine_model
from roma_ray.engine.kept_selfchecks import read_checks
from roma_ray.engine.setup import ModelSpec, resolve
from tests.quantizing import quantize_fp8, quantize_mxfp4
from tests.tiny import save_tiny, tiny_moe
from tests.world import make_world


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


def test_a_model_is_checked_in_its_own_type_where_a_run_looks(tmp_path: Path) -> None:
    config = make_world(tmp_path, dtype=torch.bfloat16)
    _, checked = examine_model(config.model.path, config.storage)
    assert checked.detail.startswith("bfloat16 on ")
    run = config.model_copy(update={"device": "auto"})
    assert len(read_checks(resolve(run).model.checks)) == 6


def test_a_model_that_cannot_be_tuned_and_routers_out_of_reach_are_told(tmp_path: Path) -> None:
    (refused,) = examine_model(save_tiny(tiny_moe("phimoe"), tmp_path / "phi"), str(tmp_path / "storage"))
    assert refused.state == "broken"
    assert "sparsemixer" in refused.detail
    path = save_tiny(tiny_moe("mixtral", num_experts_per_tok=1), tmp_path / "top1")
    *_, routers = examine_model(path, str(tmp_path / "storage"))
    assert routers.state == "note"
    assert "does not reach" in routers.detail


@pytest.mark.parametrize("name", ["a=b", "a: b, c", "${HOME}", "[x]", "null", "1e3", "# a"])
def test_a_path_is_taken_as_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tiny_moe("mixtral", num_hidden_layers=1), name)
    model, checked = examine_model(name, f"storage {name}")
    assert (model.state, checked.state) == ("ok", "ok")
    assert model.detail.startswith(f"{name}: mixtral, ")
    assert list((tmp_path / f"storage {name}" / "checks").iterdir())


@pytest.mark.parametrize("path", ["a" * 300, "a/" * 4000, "~no-such-user/model"])
def test_a_path_that_the_system_does_not_take_is_told(path: str, tmp_path: Path) -> None:
    (refused,) = examine_model(path, str(tmp_path))
    assert refused.state == "broken"
    assert "cannot be looked up" in refused.detail
    assert len(refused.detail) < 300


@pytest.mark.parametrize("scheme", ["FP8", "MXFP4"])
def test_how_a_quantized_model_is_stored_is_told(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if scheme == "FP8":
        path = save_tiny(tiny_moe("deepseek_v3", dtype=torch.bfloat16), tmp_path / "model")
        quantize_fp8(path, (16, 16))
    else:
        widths = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4}
        path = save_tiny(tiny_moe("gpt_oss", dtype=torch.bfloat16, **widths), tmp_path / "model")
        quantize_mxfp4(path)
    monkeypatch.setattr(ModelSpec, "weight_bytes", lambda self: 1250 * 2**30)
    model, weights, checked = examine_model(path, str(tmp_path / "storage"))
    assert (model.state, weights.state, checked.state) == ("ok", "ok", "ok")
    assert weights.detail == f"stored in {scheme} and dequantized to bfloat16, 1,250.0 GiB in memory"
