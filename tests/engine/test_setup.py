"""What a run resolves once: a model's identity, the tuned layers, names refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from roma_ray.config.schema import ModelConfig
from roma_ray.engine import setup as resolution
from roma_ray.engine.setup import model_identity, resolve
from roma_ray.engine.tokenizer import load_tokenizer
from roma_ray.errors import ConfigError, EmbeddingError, ModelError
from roma_ray.moe.snapshot import open_snapshot
from roma_ray.runs.pipeline import locate
from roma_ray.stages.embedding import load_encoder
from roma_ray.stages.preparation import QUESTIONS
from tests.making import made
from tests.world import make_world


def test_tuned_layers_and_cut(tmp_path: Path) -> None:
    setup = resolve(make_world(tmp_path, count=9))
    assert setup.layers == (4, 5)
    assert setup.cut == 4
    assert setup.layer_columns == [4, 5]
    assert setup.model.experts_backend == "eager"


@pytest.mark.parametrize("routing", [{"tokens": "Foo"}, {"layers": "L99"}, {"layers": "Foo"}])
def test_unknown_names_are_refused_before_any_work(tmp_path: Path, routing: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        resolve(make_world(tmp_path, count=9, routing=routing))
    assert not (tmp_path / "storage").exists()


def write_model(folder: Path, gate: float, expert: float) -> str:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = {
        "model.layers.0.mlp.experts": torch.full((512, 512), expert),
        "model.layers.0.mlp.gate.weight": torch.full((8, 64), gate),
        "model.norm.weight": torch.ones(64),
    }
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("whole", [True, False])
def test_models_that_differ_in_one_gate_are_different(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    if not whole:
        monkeypatch.setattr(resolution, "_WHOLE_DIGEST_BYTES", 1000)
        monkeypatch.setattr(resolution, "_WHOLE_TENSOR_BYTES", 8 * 64 * 4)
    paths = [
        write_model(tmp_path / str(n), gate, expert)
        for n, (gate, expert) in enumerate([(1, 1), (2, 1), (1, 2), (1, 1)])
    ]
    names = [model_identity(ModelConfig(path=path), path) for path in paths]
    assert names[0] == names[3]
    assert len(set(names)) == 3


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="safetensors"):
        model_identity(ModelConfig(path=str(tmp_path)), str(tmp_path))


def test_a_stranger_s_code_is_never_run_nor_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer with code of its own, at a terminal whose user says yes to everything."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Evil:\n    pass\n")
    code = {"auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", **code}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", **code}))
    monkeypatch.setattr("builtins.input", lambda *words: "y")
    with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
        load_tokenizer(str(folder), None)
    with pytest.raises(ModelError):
        open_snapshot(str(folder), None).config()
    assert not ran.exists()


def test_a_model_without_tokenizer_is_told_so(tmp_path: Path) -> None:
    setup = resolve(make_world(tmp_path, count=9))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()
    with pytest.raises(
        ConfigError, match=r"model has no tokenizer \(none of tokenizer.json.*copy the tokenizer's files"
    ):
        made(QUESTIONS, setup)


@pytest.mark.parametrize("modules", ['{"a": 1}', "[1, 2]", '[{"type": 3, "path": ""}]', "null", '"text"', "[[]]"])
def test_an_embedding_model_without_a_list_of_modules_is_refused_before_any_work(tmp_path: Path, modules: str) -> None:
    setup = resolve(make_world(tmp_path, count=9))
    (tmp_path / "encoder" / "modules.json").write_text(modules)
    with pytest.raises(EmbeddingError, match=r"modules.json is not a list of modules .*embedding.model=minilm"):
        locate(setup)
    with pytest.raises(EmbeddingError, match="not a list of modules"):
        load_encoder(str(tmp_path / "encoder"), "cpu")


@pytest.mark.parametrize("module", ["sentence_transformers.models.Nothing", "nowhere.Thing", "json.loads"])
def test_an_embedding_model_of_unknown_modules_is_one_message(tmp_path: Path, module: str) -> None:
    make_world(tmp_path, count=9)
    listed = [{"idx": 0, "name": "0", "path": "", "type": module}]
    (tmp_path / "encoder" / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(EmbeddingError, match="cannot be loaded"):
        load_encoder(str(tmp_path / "encoder"), "cpu")
