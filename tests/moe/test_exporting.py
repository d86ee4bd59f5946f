"""Routers in every form: the reference's file and an adapter are one thing, and a merged model says in which type it was judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from roma_ray.cli.commands import main
from roma_ray.errors import CheckpointError, ModelError
from roma_ray.moe.adapters import read_adapter
from roma_ray.moe.exporting import export_routers, read_routers
from roma_ray.moe.inspection import inspect
from tests.moe.test_adapters import run_stock, tuned_adapter, whole_inputs
from tests.moe.test_fitting import configure
from tests.tiny import padded_batch, save_tiny, tiny_moe


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[str, Path]:
    path = save_tiny(tiny_moe("olmoe"), tmp_path / "base")
    tuned_adapter(path, tmp_path / "adapter", torch.float32, 4)
    return path, tmp_path / "adapter"


def test_a_reference_file_becomes_the_adapter_and_the_model_that_it_came_from(tmp_path: Path) -> None:
    """Also where a gate has a bias, or a selection bias that the file does not hold; in stock peft, which knows neither file."""
    ids, mask, _ = padded_batch()
    torch.save(whole_inputs(ids, mask), tmp_path / "inputs.pt")
    jobs = []
    for family in ("olmoe", "gpt_oss", "deepseek_v3"):
        base = save_tiny(tiny_moe(family), tmp_path / f"{family}-base")
        first, second, file = (tmp_path / f"{family}-{name}" for name in ("first", "second", "router_ft.pt"))
        tuned_adapter(base, first, torch.float32, 4)
        export_routers(first, file, form="reference")
        export_routers(file, second, form="adapter")
        assert read_adapter(second).base_model == base
        for source, name in ((first, "a"), (file, "b")):
            export_routers(source, tmp_path / f"{family}-{name}", form="merged")
        merged = [load_file(tmp_path / f"{family}-{name}" / "model.safetensors") for name in ("a", "b")]
        assert merged[0].keys() == merged[1].keys()
        assert all(torch.equal(merged[0][key], merged[1][key]) for key in merged[0])
        common = {
            "dtype": "float32",
            "attention": "eager",
            "inputs": str(tmp_path / "inputs.pt"),
            "unload": False,
            "wrapper": False,
        }
        for folder in (first, second, None):
            out = str(tmp_path / f"{family}-{folder.name if folder else 'untuned'}.pt")
            jobs.append({**common, "base": base, "adapter": folder and str(folder), "out": out})
    run_stock(jobs, tmp_path)
    for first, second, untuned in zip(jobs[::3], jobs[1::3], jobs[2::3], strict=True):
        one, two, plain = (torch.load(job["out"], weights_only=True) for job in (first, second, untuned))
        assert torch.equal(one, two)
        assert not torch.equal(one, plain)


def test_a_file_that_names_no_base_needs_one(adapter, tmp_path: Path) -> None:
    path, folder = adapter
    export_routers(folder, tmp_path / "router_ft.pt", form="reference")
    content = torch.load(tmp_path / "router_ft.pt", weights_only=True)
    torch.save({**content, "model_name": None}, tmp_path / "nameless.pt")
    with pytest.raises(CheckpointError, match="does not name its base model: name it with --base"):
        export_routers(tmp_path / "nameless.pt", tmp_path / "out", form="adapter")
    export_routers(tmp_path / "nameless.pt", tmp_path / "out", form="adapter", base=path)
    assert read_adapter(tmp_path / "out").base_model == path
    torch.save({**content, "model_name": str(tmp_path / "gone")}, tmp_path / "gone.pt")
    with pytest.raises(ModelError, match="does not exist"):
        read_routers(tmp_path / "gone.pt")
    torch.save({**content, "model_name": 3}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match="is no text"):
        read_routers(tmp_path / "odd.pt", base=path)


def test_another_base_is_named_in_what_is_written(adapter, tmp_path: Path) -> None:
    _, folder = adapter
    elsewhere = save_tiny(tiny_moe("olmoe"), tmp_path / "elsewhere")
    export_routers(folder, tmp_path / "out", form="adapter", base=elsewhere)
    assert read_adapter(tmp_path / "out").base_model == elsewhere
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == elsewhere


def test_no_export_replaces_its_source_or_another_kind(adapter, tmp_path: Path) -> None:
    _, folder = adapter
    export_routers(folder, tmp_path / "merged", form="merged")
    for source, out, form in (
        (folder, folder, "adapter"),
        (folder, folder, "merged"),
        (folder, tmp_path / "merged", "adapter"),
        (folder, tmp_path, "reference"),
    ):
        with pytest.raises(CheckpointError):
            export_routers(source, out, form=form)
    export_routers(folder, tmp_path / "again", form="adapter")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        export_routers(folder, tmp_path / "again", form="merged")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_merged_model_names_the_type_of_its_routers_and_keeps_the_base_s_tensors(tmp_path: Path, key: str) -> None:
    base = Path(save_tiny(tiny_moe("olmoe", dtype=torch.bfloat16), tmp_path / "base"))
    stated = json.loads((base / "config.json").read_text())
    stated.pop("dtype")
    (base / "config.json").write_text(json.dumps({**stated, key: "bfloat16"}))
    tuned_adapter(str(base), tmp_path / "adapter", torch.float32, 4)
    (note,) = export_routers(tmp_path / "adapter", tmp_path / "merged", form="merged")
    assert "config.json names float32" in note
    assert "the base's names bfloat16" in note
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written == {**stated, "dtype": "float32", key: "float32"}
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"model.layers.{layer}.mlp.gate.weight" for layer in (4, 5)
    }
    assert all(after[name].dtype is torch.bfloat16 for name in after if ".gate.weight" not in name)
    ids = torch.arange(5, 40)[None]
    with torch.inference_mode():
        said, given = (
            AutoModelForCausalLM.from_pretrained(tmp_path / "merged", **how).eval()(ids).logits
            for how in ({}, {"dtype": torch.float32})
        )
    assert said.dtype is torch.float32
    assert torch.equal(said, given)


def test_a_merged_model_in_the_base_s_own_type_needs_no_note(adapter, tmp_path: Path) -> None:
    path, folder = adapter
    configure(path, dtype="float32")
    assert export_routers(folder, tmp_path / "merged", form="merged") == []


def roma(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_commands_take_a_reference_file(adapter, tmp_path: Path) -> None:
    path, folder = adapter
    file = tmp_path / "router_ft.pt"
    assert "dtype=torch.float32" in roma("export", folder, file, "--format", "reference")
    assert f"written: {tmp_path / 'out'}" in roma("export", file, tmp_path / "out", "--format", "adapter")
    assert read_adapter(tmp_path / "out").tensors.keys() == read_adapter(folder).tensors.keys()
    for source in (file, folder, tmp_path / "out"):
        text = roma("inspect", source)
        assert "dtype: float32\n" in text
        # Two gates of 8 experts on a width of 32.
        assert "parameters: 512\n" in text
    whole = tiny_moe("olmoe").num_parameters()
    assert f"parameters: {whole:,}\n" in roma("inspect", path)
    assert inspect(path)["parameters"] == whole
