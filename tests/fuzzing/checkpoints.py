"""Readers of router checkpoints and models: routing JSON, router_ft.pt, adapter folders, a model's own configuration."""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from roma_ray.moe.adapters import PEFT_CONFIG, WEIGHTS, RouterCheckpoint, layer_of, read_adapter, write_adapter
from roma_ray.moe.folders import MANIFEST
from roma_ray.moe.inspection import describe
from roma_ray.moe.reference import read_reference
from roma_ray.moe.routing_json import read_routing_json
from roma_ray.moe.slices import model_facts
from roma_ray.moe.whole import base_tensors
from tests.fuzzing.damage import VALUES, damaged, damaged_json
from tests.fuzzing.runner import Target

Opened = tuple[st.SearchStrategy[Any], Callable[[Any], None]]


def routing_json(folder: Path) -> Opened:
    """The reference's routing files."""
    path = folder / "routing.json"

    def entry(shift: int) -> dict[str, Any]:
        rows = [{f"expert_{e}": w for e, w in enumerate([0.5, 0.25, 0.125, 0.125])} for _ in range(2)]
        return {
            "input_text": f"text {shift}",
            "last_token_routing": {
                "token_id": shift,
                "token_text": ":",
                "layers": [{"layer": 11 + n, "routing_weights": row} for n, row in enumerate(rows)],
            },
            "correct_answer": "A",
            "model_answer": "B",
            "is_correct": shift % 2 == 0,
        }

    def read(data: bytes) -> None:
        path.write_bytes(data)
        entries = read_routing_json(path)
        assert entries
        shapes = {(e.layers, tuple(e.routing_LE.shape)) for e in entries}
        assert len(shapes) == 1
        for e in entries:
            assert len(set(e.layers)) == len(e.layers) == len(e.routing_LE)
            assert all(type(layer) is int and layer >= 0 for layer in e.layers), e.layers
            assert bool((e.routing_LE >= 0).all())
            assert torch.allclose(e.routing_LE.sum(1), torch.ones(len(e.layers)), atol=0.02)
        describe(path)

    return damaged_json({f"q{n}": entry(n) for n in range(2)}), read


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


_TENSORS = st.sampled_from(
    [
        torch.zeros(4, 6),
        torch.zeros(6),
        torch.zeros(0, 6),
        torch.zeros(4, 6, dtype=torch.int64),
        torch.zeros(4, 6, dtype=torch.complex64),
        torch.full((4, 6), math.nan),
        torch.zeros(4, 6).to_sparse(),
        torch.zeros(4, 6, dtype=torch.float8_e4m3fn),
        torch.zeros(4, 6, requires_grad=True),
        torch.zeros(1, 1).expand(4, 6),
        torch.zeros(4, 6, device="meta"),
        torch.nn.Parameter(torch.zeros(4, 6)),
    ]
)
_KEYS = st.sampled_from(
    ["layers.11.mlp.gate.weight", "model.layers.11.mlp.gate.weight", "layers.12.mlp.gate.bias", "layers.1.2.weight"]
) | st.text(max_size=12)


def router_ft(folder: Path) -> Opened:
    """The reference's router_ft.pt: damaged files, odd contents, pickles with code."""
    path = folder / "router_ft.pt"
    state = {f"layers.{n}.mlp.gate.weight": torch.randn(4, 6) for n in (11, 12)}
    good = {"target_layers": [11, 12], "state_dict": state, "model_name": "m"}
    legacy = io.BytesIO()
    torch.save(good, legacy, _use_new_zipfile_serialization=False)
    files = [_saved(good), legacy.getvalue(), pickle.dumps(good), pickle.dumps(print), _saved({"a": Path("x")})]
    odd = st.fixed_dictionaries(
        {
            "target_layers": st.lists(st.integers(-1, 13), max_size=3) | VALUES,
            "state_dict": st.dictionaries(_KEYS, _TENSORS | VALUES, max_size=3) | VALUES,
        },
        optional={"model_name": VALUES},
    ).map(_saved)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = read_reference(path)
        assert found.layers
        assert all(layer >= 0 for layer in found.layers)
        for key, tensor in found.tensors.items():
            assert layer_of(key) in found.layers
            assert tensor.is_floating_point()
            assert tensor.numel() > 0
            assert bool(torch.isfinite(tensor.float()).all())
            assert not tensor.requires_grad
        describe(path)

    return st.one_of(damaged(files), odd), read


def adapters(folder: Path) -> Opened:
    """Adapter folders with one of their three files damaged."""
    target = folder / "adapter"
    tensors = {f"model.layers.{n}.mlp.gate.weight": torch.randn(4, 6) for n in (11, 12)}
    checkpoint = RouterCheckpoint(tensors, {}, "base", None, "olmoe", (11, 12), 4, "float32", "f" * 16)
    write_adapter(target, checkpoint)
    files = {name: (target / name).read_bytes() for name in (MANIFEST, WEIGHTS, PEFT_CONFIG)}
    manifest, peft = json.loads(files[MANIFEST]), json.loads(files[PEFT_CONFIG])
    strategy = st.one_of(
        damaged_json(manifest).map(lambda d: (MANIFEST, d)),
        damaged_json(manifest).map(lambda d: (MANIFEST, d)),
        damaged([files[WEIGHTS]]).map(lambda d: (WEIGHTS, d)),
        damaged_json(peft).map(lambda d: (PEFT_CONFIG, d)),
    )

    def read(named: tuple[str, bytes]) -> None:
        for name, data in files.items():
            (target / name).write_bytes(data)
        (target / named[0]).write_bytes(named[1])
        found = read_adapter(target)
        for key, tensor in found.tensors.items():
            assert torch.equal(tensor, tensors[key]), f"{key} changed unseen"
            assert tensor.shape[0] == found.num_experts
        assert set(found.tensors) == set(tensors), "a tuned router was lost unseen"
        assert found.layers == (11, 12)
        assert isinstance(getattr(torch, found.dtype, None), torch.dtype)
        for text in (found.base_model, found.model_type, found.fingerprint):
            assert text
        describe(target)

    return strategy, read


def model_configurations(folder: Path) -> Opened:
    """A stranger's config.json, which decides what classes are built and how large."""
    from tests.tiny import tiny_config

    target = folder / "model"
    configs = []
    for family in ("olmoe", "qwen3_moe", "deepseek_v2", "gpt_oss"):
        tiny_config(family).save_pretrained(str(target))
        value = json.loads((target / "config.json").read_text())
        configs.append({**value, "architectures": ["X"]})
    remote = {"auto_map": {"AutoConfig": "x.Evil", "AutoModelForCausalLM": "x.Evil"}, "model_type": "evil"}
    (target / "x.py").write_text("raise SystemExit('a stranger code ran')\n")

    def read(data: bytes) -> None:
        (target / "config.json").write_bytes(data)
        facts = model_facts(str(target))
        assert facts["num_experts"] >= 1
        assert facts["moe_layers"]
        assert all(0 <= layer < facts["num_layers"] for layer in facts["moe_layers"])
        assert 1 <= facts["top_k"] <= facts["num_experts"]

    return st.one_of(*[damaged_json({**c, **extra}) for c in configs for extra in ({}, remote)]), read


def model_weights(folder: Path) -> Opened:
    """A stranger's safetensors files and the index that says which of them holds what."""
    from tests.tiny import save_tiny, tiny_moe

    target = folder / "model"
    save_tiny(tiny_moe("olmoe", num_hidden_layers=4), target, max_shard_size="40KB")
    index = target / "model.safetensors.index.json"
    shard = sorted(target.glob("*.safetensors"))[0]
    files = {path: path.read_bytes() for path in (index, shard)}
    names = [f"model.layers.{n}.mlp.gate.weight" for n in range(4)]
    expected = {name: tensor.clone() for name, tensor in base_tensors(str(target), names).items()}

    def read(named: tuple[int, bytes]) -> None:
        for path, data in files.items():
            path.write_bytes(data)
        list(files)[named[0]].write_bytes(named[1])
        for name, tensor in base_tensors(str(target), names).items():
            assert tensor.shape == expected[name].shape

    return st.one_of(
        damaged_json(json.loads(files[index])).map(lambda d: (0, d)), damaged([files[shard]]).map(lambda d: (1, d))
    ), read


CHECKPOINTS = (
    Target("routing JSON", routing_json, 15),
    Target("router_ft.pt", router_ft, 10),
    Target("adapter folders", adapters, 10),
    Target("model configurations", model_configurations, 2),
    Target("model weights", model_weights, 2),
)
