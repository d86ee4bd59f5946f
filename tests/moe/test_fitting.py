"""A checkpoint that lacks a tensor, or has one of another shape, is refused by that tensor's name before it takes memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from roma_ray.errors import ModelError
from roma_ray.moe.backbones import backbone_of, model_class_of, plain_key
from roma_ray.moe.exporting import export_routers
from roma_ray.moe.fitting import check_fit, skeleton_of
from roma_ray.moe.slices import load_slice, model_facts, wanted_keys
from roma_ray.moe.snapshot import open_snapshot
from tests.moe.test_adapters import tuned_adapter
from tests.padded import slice_logits
from tests.tiny import FAMILIES, MORE_FAMILIES, WRAPPERS, padded_batch, save_tiny, tiny_config, tiny_moe

WHOLE = {"dtype": torch.float32, "with_lm_head": True}
EXPERT = "model.layers.3.mlp.experts.2.up_proj.weight"


def edit(folder: str | Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a single-file checkpoint."""
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def configure(folder: str | Path, **values: object) -> None:
    file = Path(folder) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# Parts of names in files that transformers calls otherwise in the model.
RENAMED = (
    "_linear",
    "router.layer",
    "attention_sink_bias",
    "expert_bias",
    "softmax_offset",
    "experts.fc1",
    "experts.fc2",
)


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_every_stored_tensor_is_needed_and_its_absence_is_named(family: str, tmp_path: Path) -> None:
    path = Path(save_tiny(tiny_moe(family), tmp_path))
    config = backbone_of(tiny_config(family))
    keys = wanted_keys(
        open_snapshot(str(path)), 0, config.num_hidden_layers, embeddings=True, norm=True, with_lm_head=True
    )
    with safe_open(path / "model.safetensors", framework="pt") as handle:
        # A multimodal model's towers alone are not needed.
        assert all(key in keys or (family in WRAPPERS and plain_key(key) == key) for key in handle.keys())  # noqa: SIM118
        shapes = {plain: tuple(handle.get_slice(key).get_shape()) for key, plain in keys.items()}
    skeleton = skeleton_of(model_class_of(config, with_lm_head=True), config)
    check_fit(skeleton, shapes, str(path))
    for key in shapes:
        # One dense layer, one with experts, and of those one: the others are like them.
        if "layers" in key and not re.search(r"layers\.[04]\.(?!.*experts\.[^2]\.)", key):
            continue
        # The end of the name is its own in every family: transformers renames what comes before it.
        end = key.split(".")
        name = end[-1] if end[-1] not in ("weight", "bias") else ".".join(end[-2:])
        with pytest.raises(ModelError) as refused:
            check_fit(skeleton, {k: shape for k, shape in shapes.items() if k != key}, str(path))
        assert "is missing" in str(refused.value)
        assert name in str(refused.value) or any(part in key for part in RENAMED), (key, str(refused.value))
        with pytest.raises(ModelError, match=r"has shape|numbers, not"):
            check_fit(skeleton, {**shapes, key: (*shapes[key][:-1], shapes[key][-1] + 1)}, str(path))


@pytest.mark.parametrize(
    ("key", "whole", "head", "trunk"),
    [
        ("model.norm.weight", False, False, True),
        ("model.embed_tokens.weight", False, True, False),
        ("lm_head.weight", False, False, True),
        (EXPERT, False, True, False),
        ("model.layers.4.self_attn.q_norm.weight", False, False, True),
    ],
)
def test_a_slice_needs_what_it_uses_and_nothing_else(
    tmp_path: Path, key: str, whole: bool, head: bool, trunk: bool
) -> None:
    path = save_tiny(tiny_moe("olmoe"), tmp_path)
    edit(path, lambda tensors: tensors.pop(key))
    parts = {
        "whole": (whole, {"with_lm_head": True}),
        "head": (head, {"start": 4, "with_lm_head": True}),
        "trunk": (trunk, {"stop": 4, "with_lm_head": False}),
    }
    for loads, arguments in parts.values():
        if loads:
            load_slice(path, dtype=torch.float32, **arguments)
        else:
            with pytest.raises(ModelError, match=rf": {key} is missing"):
                load_slice(path, dtype=torch.float32, **arguments)


def test_tied_embeddings_may_be_stored_under_either_name(tmp_path: Path) -> None:
    model = tiny_moe("granitemoe")
    path = save_tiny(model, tmp_path)
    key = "model.embed_tokens.weight"
    edit(path, lambda tensors: tensors.update({"lm_head.weight": tensors.pop(key)}))
    ids, mask, last = padded_batch()
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[range(3), last]
        part = load_slice(path, **WHOLE)
        torch.testing.assert_close(slice_logits(part, ids, mask, last[:, None])[:, 0], want)
    edit(path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=f"{key} is missing"):
        load_slice(path, start=3, **WHOLE)


def test_an_expert_of_another_shape_is_named(tmp_path: Path) -> None:
    path = save_tiny(tiny_moe("olmoe"), tmp_path)
    for shape in ((24, 31), (24,), (32, 24)):
        edit(path, lambda tensors, shape=shape: tensors.update({EXPERT: torch.zeros(shape)}))
        with pytest.raises(ModelError, match=rf"{EXPERT} has shape \({shape[0]},.*the other experts' is \(24, 32\)"):
            load_slice(path, start=2, stop=4, dtype=torch.float32, with_lm_head=False)


def test_experts_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    """As many numbers as there should be, all experts alike, and yet no two projections that can be joined."""
    path = save_tiny(tiny_moe("olmoe"), tmp_path)
    turned = {f"model.layers.3.mlp.experts.{e}.up_proj.weight": torch.zeros(32, 24) for e in range(8)}
    edit(path, lambda tensors: tensors.update(turned))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_slice(path, **WHOLE)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"vocab_size": 2**30}, "vocab_size is 1.07e"),
        ({"vocab_size": 2**23}, r"embed_tokens.weight has shape \(96, 32\), not \(8388608, 32\)"),
        ({"hidden_size": 2**27}, "has shape"),
        ({"intermediate_size": 2**27}, "hold .* numbers, not"),
        ({"num_experts": 4}, "experts.4.gate_proj.weight is of an expert beyond the last, 3"),
        ({"num_hidden_layers": 7}, "model.layers.6.self_attn.q_proj.weight is missing"),
    ],
)
def test_a_configuration_of_another_size_takes_no_memory(
    tmp_path: Path, values: dict[str, int], match: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = save_tiny(tiny_moe("olmoe"), tmp_path)
    configure(path, **values)
    capfd.readouterr()
    with pytest.raises(ModelError, match=match):
        load_slice(path, **WHOLE)
    assert capfd.readouterr().err == "", "the one error message is all that a user should see"


def test_a_vocabulary_that_no_model_has_is_refused_before_any_work(tmp_path: Path) -> None:
    path = save_tiny(tiny_moe("olmoe"), tmp_path)
    configure(path, vocab_size=2**30)
    with pytest.raises(ModelError, match=r"vocab_size is 1\.07e"):
        model_facts(path)


def test_a_merged_export_of_a_model_with_a_gap_is_refused(tmp_path: Path) -> None:
    path = save_tiny(tiny_moe("olmoe"), tmp_path / "base")
    tuned_adapter(path, tmp_path / "adapter", torch.float32, 4)
    edit(path, lambda tensors: tensors.pop("model.layers.0.self_attn.k_norm.weight"))
    with pytest.raises(ModelError, match=r"layers.0.self_attn.k_norm.weight is missing"):
        export_routers(tmp_path / "adapter", tmp_path / "merged", form="merged")
    assert not (tmp_path / "merged").exists()
