"""Layers with different numbers of experts: told from every form, and equal to the whole model without those experts."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.prune_experts import most_used, pruned, write_pruned
from roma_ray.config.finetune_settings import RegularizerConfig
from roma_ray.engine.collapse import routing_figures
from roma_ray.engine.objective import check_widths
from roma_ray.errors import CheckpointError, ConfigError, ModelError
from roma_ray.moe.adapters import put_routers, read_adapter, save_adapter
from roma_ray.moe.masters import RouterMasters
from roma_ray.moe.overriding import LINEAR, Interception, override_routing
from roma_ray.moe.reading import read_routing
from roma_ray.moe.replacing import replaced
from roma_ray.moe.routers import Router, find_routers
from roma_ray.moe.slices import load_slice, model_facts
from roma_ray.moe.uneven import PER_LAYER
from tests.tiny import DELTA_RULE, FAMILIES, MORE_FAMILIES, save_tiny, tiny_moe

# Their routers choose among four groups of two: six experts are no four groups.
GROUPED = ("deepseek_v2", "deepseek_v3")
IDS = torch.randint(3, 50, (2, 8), generator=torch.Generator().manual_seed(5))


def saved(name: str, folder: Path) -> tuple[Any, dict[int, list[int]]]:
    """A tiny whole model, and `folder`/pruned: every second MoE layer of it without two experts."""
    model = tiny_moe(name, seed=3)
    save_tiny(model, folder / "whole")
    routers = find_routers(model)
    count = routers[0].num_experts
    kept = {r.layer: [e for e in range(count) if n % 2 or e not in (1, 4)] for n, r in enumerate(routers)}
    write_pruned(str(folder / "whole"), folder / "pruned", kept, count)
    return model, kept


def shut(model: Any, router: Router, gone: list[int], stack: ExitStack) -> None:
    """Let a router of a whole model choose among the other experts alone."""
    forward = router.module.forward

    def without(*args: Any, **settings: Any) -> Any:
        with Interception(LINEAR, router, lambda logits_TE: logits_TE.index_fill(1, torch.tensor(gone), -1e9)):
            return forward(*args, **settings)

    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if f"layers.{router.layer}." in name and ("correction_bias" in name or "expert_bias" in name):
            tensor.data[..., gone] = -1e4
    stack.enter_context(replaced(router.module, without))


@pytest.mark.parametrize("name", [n for n in (*FAMILIES, *MORE_FAMILIES) if n not in GROUPED])
def test_a_pruned_model_is_the_whole_one_without_those_experts(name: str, tmp_path: Path) -> None:
    model, kept = saved(name, tmp_path)
    facts = model_facts(str(tmp_path / "pruned"))
    assert facts["experts_by_layer"] == [len(kept[layer]) for layer in facts["moe_layers"]]
    assert facts["num_experts"] == max(facts["experts_by_layer"]) > min(facts["experts_by_layer"])
    part = load_slice(str(tmp_path / "pruned"), dtype=torch.float32, with_lm_head=True)
    with ExitStack() as stack, torch.no_grad():
        for router in find_routers(model):
            if gone := [e for e in range(router.num_experts) if e not in kept[router.layer]]:
                shut(model, router, gone, stack)
        expected = model(input_ids=IDS).logits
        found = part.model(input_ids=IDS).logits
    tight = 1e-3 if name in DELTA_RULE else 1e-5
    torch.testing.assert_close(found, expected, atol=tight, rtol=tight)


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "minimax_m2"])
def test_routing_rows_are_as_wide_as_the_largest_layers(name: str, tmp_path: Path) -> None:
    _, kept = saved(name, tmp_path)
    whole = load_slice(str(tmp_path / "pruned"), dtype=torch.float32, with_lm_head=True)
    # A slice of the smaller layer alone has rows of the same width.
    first = load_slice(str(tmp_path / "pruned"), stop=1, dtype=torch.float32, with_lm_head=False)
    width = max(map(len, kept.values()))
    last_B1 = torch.full((2, 1), 7)
    for part in (whole, first):
        with read_routing(part.model, part.routers, last_B1) as tape, torch.no_grad():
            before = part.model(input_ids=IDS)
        assert tape.routing_BPLE.shape[-1] == width
    with read_routing(whole.model, whole.routers, last_B1) as tape, torch.no_grad():
        before = whole.model(input_ids=IDS).logits
    routing_BLE = tape.routing_BPLE[:, 0]
    torch.testing.assert_close(routing_BLE.sum(-1), torch.ones(routing_BLE.shape[:2]))
    assert all(not routing_BLE[:, n, router.num_experts :].any() for n, router in enumerate(whole.routers))
    # Its own routing gives its own answers; another does not.
    with override_routing(whole.model, whole.routers, routing_BLE, last_B1[:, 0]), torch.no_grad():
        torch.testing.assert_close(whole.model(input_ids=IDS).logits, before, atol=1e-4, rtol=1e-4)
    with override_routing(whole.model, whole.routers, routing_BLE.flip(-1), last_B1[:, 0]), torch.no_grad():
        assert not torch.allclose(whole.model(input_ids=IDS).logits, before, atol=1e-3)


def test_adapters_of_layers_with_different_numbers(tmp_path: Path) -> None:
    saved("olmoe", tmp_path)
    path = str(tmp_path / "pruned")
    part = load_slice(path, dtype=torch.float32, with_lm_head=True)
    masters = RouterMasters(part, [2, 3])
    state = {key: tensor + 1 for key, tensor in masters.state().items()}
    masters.detach()
    written = save_adapter(tmp_path / "adapter", part, state, base=path, revision=None, fingerprint="f")
    found = read_adapter(tmp_path / "adapter")
    assert found.num_experts == written.num_experts == 8
    put_routers(found, part)
    assert torch.equal(part.routers[2].gate.weight, state["layers.2.weight"])
    assert part.routers[2].gate.weight.shape[0] == 6
    manifest = tmp_path / "adapter" / "roma.json"
    values = json.loads(manifest.read_text())
    assert values["num_experts_per_layer"] == [6, 8]
    for wrong in ([8, 8], [6], [6, 6], "x", None):
        manifest.write_text(json.dumps({**values, "num_experts_per_layer": wrong}))
        with pytest.raises(CheckpointError, match="contradicts itself"):
            read_adapter(tmp_path / "adapter")


def undeclared(folder: Path) -> dict[str, Any]:
    """Take the declaration out of a pruned model's config.json; returns what is left."""
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    values.pop(PER_LAYER)
    (folder / "config.json").write_text(json.dumps(values))
    return values


@pytest.mark.parametrize("name", ["olmoe", "mixtral", "gpt_oss", "granitemoe", "afmoe"])
def test_a_checkpoint_that_declares_nothing_is_read_by_its_gates(name: str, tmp_path: Path) -> None:
    _, kept = saved(name, tmp_path)
    declared = model_facts(str(tmp_path / "pruned"))
    undeclared(tmp_path / "pruned")
    assert model_facts(str(tmp_path / "pruned")) == declared
    load_slice(str(tmp_path / "pruned"), dtype=torch.float32, with_lm_head=True)
    assert declared["experts_by_layer"] == [len(found) for found in kept.values()]


def test_transformers_own_form_is_understood(tmp_path: Path) -> None:
    _, kept = saved("qwen3_moe", tmp_path)
    folder = tmp_path / "pruned"
    declared = model_facts(str(folder))
    values = undeclared(folder)
    values["per_layer_config"] = {str(layer): {"num_experts": len(found)} for layer, found in kept.items()}
    (folder / "config.json").write_text(json.dumps(values))
    assert model_facts(str(folder)) == declared


def read_and_load(path: str) -> None:
    model_facts(path)
    load_slice(path, dtype=torch.float32, with_lm_head=True)


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ([6, 8, 6], "is not one number of experts for each of 6 layers"),
        ("six", "is not one number"),
        ([6, 8, -1, 8, 6, 8], "is not one number"),
        ([6, 8, 6, 8, 6, 10**6], "is not one number"),
        ([0] * 6, "is not one number"),
        ([6, 8, 0, 8, 6, 8], "gives layer 2 no experts"),
        ([6, 8, 2, 8, 6, 8], "chooses 3 of 2 experts in layer 2"),
        ([6, 8, 7, 8, 6, 8], "gate.weight has shape"),
        ([8] * 6, "gate.weight has shape"),
    ],
)
def test_numbers_that_are_none_are_refused(counts: Any, told: str, tmp_path: Path) -> None:
    saved("olmoe", tmp_path)
    file = tmp_path / "pruned" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), PER_LAYER: counts}))
    with pytest.raises(ModelError, match=told):
        read_and_load(str(tmp_path / "pruned"))


def test_a_checkpoint_that_lost_an_expert_is_no_uneven_one(tmp_path: Path) -> None:
    save_tiny(tiny_moe("olmoe", seed=3), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {key: tensor for key, tensor in load_file(file).items() if "layers.2.mlp.experts.7." not in key}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.experts\.7\.\w+\.weight is missing"):
        load_slice(str(tmp_path), dtype=torch.float32, with_lm_head=True)


@pytest.mark.parametrize("name", GROUPED)
def test_groups_of_experts_must_stay_whole(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    with pytest.raises(ModelError, match="4 groups of equal size"):
        model_facts(str(tmp_path / "pruned"))


def test_which_experts_stay() -> None:
    loads = {0: torch.tensor([5.0, 1.0, 4.0]), 3: torch.tensor([0.0, 9.0, 2.0])}
    assert most_used(loads, 0.5, 1) == {0: [0, 2], 3: [1]}
    assert most_used(loads, 0.1, 2) == {0: [0, 2], 3: [1, 2]}
    kept = pruned(
        {"model.layers.0.mlp.experts.2.up.weight": torch.ones(2), "lm_head.weight": torch.ones(3)}, {0: [0, 2]}, 3
    )
    assert list(kept) == ["model.layers.0.mlp.experts.1.up.weight", "lm_head.weight"]


def test_figures_and_terms_know_the_layers_own_numbers(tmp_path: Path) -> None:
    saved("olmoe", tmp_path)
    routers = load_slice(str(tmp_path / "pruned"), dtype=torch.float32, with_lm_head=True).routers[:2]
    rows = torch.zeros(4, 2, 8)
    rows[:, :, :3] = 1 / 3
    found = routing_figures(rows, rows, 3, [router.num_experts for router in routers])
    assert (found["unused_experts"], found["experts"]) == ([3, 5], [6, 8])
    for term in (
        RegularizerConfig(kind="prior", prior="uniform"),
        RegularizerConfig(kind="entropy", entropy_target=0.5),
    ):
        with pytest.raises(ConfigError, match=r"\[6, 8\]"):
            check_widths(routers, term)
        check_widths(routers[:1], term)
    check_widths(routers, RegularizerConfig(kind="manifold"))
