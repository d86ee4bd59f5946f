"""The reference's routing JSON, out and in; gaps are errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roma_ray.errors import CheckpointError
from roma_ray.moe.inspection import describe, inspect
from roma_ray.moe.routing_json import RoutingEntry, read_routing_json, write_routing_json


def entry(name: str = "7-870", seed: int = 0, layers: tuple[int, ...] = (11, 12), experts: int = 4) -> RoutingEntry:
    rows = torch.softmax(torch.randn(len(layers), experts, generator=torch.Generator().manual_seed(seed)), dim=-1)
    return RoutingEntry(name, "Which?\nA. “this”\nAnswer:", 27, ":", layers, rows, "A", "B", False)


def as_json(**changes: Any) -> dict[str, Any]:
    weights = {"expert_0": 0.25, "expert_1": 0.75}
    layers = [{"layer": 3, "routing_weights": dict(weights)}, {"layer": 4, "routing_weights": dict(weights)}]
    value = {
        "input_text": "q",
        "last_token_routing": {"token_id": 27, "token_text": ":", "layers": layers},
        "correct_answer": "A",
        "model_answer": "A",
        "is_correct": True,
    }
    return {**value, **changes}


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    entries = [entry(), entry("8-1", seed=1)]
    write_routing_json(tmp_path / "r.json", entries)
    back = read_routing_json(tmp_path / "r.json", layers=[11, 12], num_experts=4)
    for one, other in zip(entries, back, strict=True):
        assert torch.equal(one.routing_LE, other.routing_LE)
        assert {**vars(one), "routing_LE": None} == {**vars(other), "routing_LE": None}
    content = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    layer = content["7-870"]["last_token_routing"]["layers"][0]
    assert layer["layer"] == 11
    assert list(layer["routing_weights"]) == ["expert_0", "expert_1", "expert_2", "expert_3"]


def test_layers_come_in_the_order_asked(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"a": as_json()}))
    assert read_routing_json(tmp_path / "r.json", layers=[4, 3])[0].layers == (4, 3)


def _without(path: tuple[Any, ...]) -> dict[str, Any]:
    value = as_json()
    place: Any = value
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    return value


def _with_weights(weights: dict[str, Any]) -> dict[str, Any]:
    value = as_json()
    value["last_token_routing"]["layers"][1]["routing_weights"] = weights
    return value


@pytest.mark.parametrize(
    ("second", "match"),
    [
        (_without(("last_token_routing", "layers", 0)), r"layers \[4\], but \[3, 4\] are needed"),
        (_without(("last_token_routing", "layers", 1, "routing_weights", "expert_1")), "begins with expert_1"),
        (_without(("last_token_routing", "token_id")), "lacks 'token_id'"),
        (_without(("is_correct",)), "lacks 'is_correct'"),
        (as_json(is_correct="yes"), "true or false"),
        (_with_weights({"expert_0": 0.5, "expert_2": 0.5}), "begins with expert_1"),
        (_with_weights({"expert_0": 0.1, "expert_1": 0.1, "expert_2": 0.8}), "begins with expert_2"),
        (_with_weights({"expert_0": -0.5, "expert_1": 1.5}), "negative"),
        (_with_weights({"expert_0": 0.5, "expert_1": 0.4}), "sum to 0.9"),
        (_with_weights({"expert_0": "many", "expert_1": 0.4}), "could not convert"),
        ([1], "not an object"),
    ],
)
def test_gaps_and_bad_weights_name_the_question(tmp_path: Path, second: Any, match: str) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"first": as_json(), "second": second}))
    with pytest.raises(CheckpointError, match=rf"question 'second': .*{match}"):
        read_routing_json(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[]", "must be an object"),
        ("{}", "must be an object"),
        ('{"a": 1', "cannot be read as JSON"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ('{"a": NaN}', "NaN is not a number"),
        ('{"a": {}}\n{"b": {}}', "cannot be read as JSON"),
    ],
)
def test_files_of_another_form(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(CheckpointError, match=match):
        inspect(tmp_path / "r.json")


def test_a_layer_or_expert_count_that_is_asked_for(tmp_path: Path) -> None:
    write_routing_json(tmp_path / "r.json", [entry()])
    with pytest.raises(CheckpointError, match=r"\[11, 12, 13\] are needed"):
        read_routing_json(tmp_path / "r.json", layers=[11, 12, 13])
    with pytest.raises(CheckpointError, match="expert_4"):
        read_routing_json(tmp_path / "r.json", num_experts=8)
    assert "questions: 1" in describe(tmp_path / "r.json")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 99), st.text(min_size=1, max_size=8))
def test_any_written_file_reads_back(
    tmp_path_factory: pytest.TempPathFactory, layers: int, experts: int, seed: int, name: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    written = entry(name.encode("utf-8", "ignore").decode() or "x", seed, tuple(range(layers)), experts)
    write_routing_json(path, [written])
    (back,) = read_routing_json(path)
    assert back.id == written.id
    assert torch.equal(back.routing_LE, written.routing_LE)
