"""A hub model: resolved to a commit, and only the shards that a slice needs are asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.prune_experts import write_pruned
from roma_ray.errors import ModelError
from roma_ray.moe import snapshot
from roma_ray.moe.slices import load_slice, model_facts
from tests.padded import slice_logits
from tests.tiny import padded_batch, save_tiny, tiny_moe

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A hub with one repository, `lab/tiny`, and a record of the files that are downloaded from it."""
    repository, cache = tmp_path / "repository", tmp_path / "cache" / "snapshots" / COMMIT
    asked: list[tuple[str, str | None]] = []

    def download(repo: str, name: str, *, revision: str | None = None) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        asked.append((name, revision))
        if repo != "lab/tiny" or not (repository / name).exists():
            raise LocalEntryNotFoundError(f"{name} is not there")
        cache.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(repository / name, cache / name)
        return str(cache / name)

    monkeypatch.setattr(snapshot, "hf_hub_download", download)
    return repository, asked


def test_only_the_needed_shards_of_one_commit_are_downloaded(hub) -> None:
    repository, asked = hub
    model = tiny_moe("mixtral")
    save_tiny(model, repository, max_shard_size="60KB")
    weight_map = json.loads((repository / "model.safetensors.index.json").read_text())["weight_map"]
    head = load_slice("lab/tiny", start=5, dtype=torch.float32, with_lm_head=True, revision="main")
    assert head.revision == COMMIT
    needed = {f for k, f in weight_map.items() if k.startswith(("model.layers.5.", "model.norm", "lm_head"))}
    assert len(needed) < len(set(weight_map.values()))
    assert {name for name, _ in asked if name.endswith(".safetensors")} == needed
    assert asked[0] == ("config.json", "main")
    assert {revision for _, revision in asked[1:]} == {COMMIT}, "files of a moving branch must not be mixed"


def test_a_repository_with_a_single_file(hub) -> None:
    repository, _ = hub
    model = tiny_moe("olmoe")
    save_tiny(model, repository)
    assert model_facts("lab/tiny")["revision"] == COMMIT
    part = load_slice("lab/tiny", dtype=torch.float32, with_lm_head=True)
    ids, mask, last = padded_batch()
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[range(3), last]
        torch.testing.assert_close(slice_logits(part, ids, mask, last[:, None])[:, 0], want)


def test_unknown_repositories_and_missing_weights(hub) -> None:
    repository, _ = hub
    with pytest.raises(ModelError, match=r"cannot get config.json of 'lab/other'"):
        model_facts("lab/other")
    save_tiny(tiny_moe("olmoe"), repository)
    (repository / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="Only safetensors"):
        load_slice("lab/tiny", dtype=torch.float32, with_lm_head=True)


def test_what_is_known_of_a_model_costs_no_weights(hub) -> None:
    repository, asked = hub
    save_tiny(tiny_moe("olmoe", seed=5), repository)
    facts = model_facts("lab/tiny")
    assert facts["experts_by_layer"] == [8] * 6
    assert "model.safetensors" not in {name for name, _ in asked}


def test_layers_that_differ_are_told_of_a_hub_model_by_its_gates(hub, tmp_path: Path) -> None:
    repository, _ = hub
    save_tiny(tiny_moe("olmoe", seed=5), tmp_path / "whole")
    kept = {layer: list(range(6 if layer == 2 else 8)) for layer in range(6)}
    write_pruned(str(tmp_path / "whole"), tmp_path / "pruned", kept, 8)
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    config.pop("num_experts_per_layer")
    tensors = load_file(tmp_path / "pruned" / "model.safetensors")
    repository.mkdir()
    (repository / "config.json").write_text(json.dumps(config))
    names = {key: f"part-{'layers.2.' in key:d}.safetensors" for key in tensors}
    for name in set(names.values()):
        save_file({key: t for key, t in tensors.items() if names[key] == name}, repository / name, {"format": "pt"})
    (repository / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert model_facts("lab/tiny")["experts_by_layer"] == [8, 8, 6, 8, 8, 8]
