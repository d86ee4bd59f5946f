"""Finding routers and reading live routing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from roma_ray.errors import ModelError
from roma_ray.moe.families import Scoring, families_table, family, refusal, supported_families
from roma_ray.moe.reading import read_routing
from roma_ray.moe.refused import REASONS
from roma_ray.moe.routers import find_routers, routing_from_logits
from tests.tiny import FAMILIES, MORE_FAMILIES, padded_batch, tiny_config, tiny_moe

LAYERS = {
    "qwen2_moe": [1, 3, 5],
    "qwen3_moe": [1, 2, 4, 5],
    "deepseek_v2": [1, 2, 3, 4, 5],
    "deepseek_v3": [2, 3, 4, 5],
    "glm4_moe": [1, 2, 3, 4, 5],
    "dots1": [2, 3, 4, 5],
    "ernie4_5_moe": [1, 2, 3, 4],
    "flint": [2, 3, 4, 5],
    "nemotron_h": [1, 3, 5],
    "qwen3_vl_moe": [1, 2, 4, 5],
    "glm4v_moe": [1, 2, 3, 4, 5],
    **{
        name: [1, 2, 3, 4, 5]
        for name in [
            "deepseek",
            "afmoe",
            "laguna",
            "glm4_moe_lite",
            "exaone_moe",
            "mimo_v2_flash",
            "hy_v3",
            "mellum",
            "axk1",
            "lfm2_moe",
        ]
    },
}


def first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("name", FAMILIES + MORE_FAMILIES)
def test_routers_are_found(name: str) -> None:
    model = tiny_moe(name)
    routers = find_routers(model)
    assert [router.layer for router in routers] == LAYERS.get(name, list(range(6)))
    assert all(router.name == router.whole_name for router in routers)
    assert routers[0].num_experts == (6 if name == "mixtral" else 8)
    assert routers[0].top_k == (2 if name == "mixtral" else 3)
    modules = dict(model.named_modules())
    assert all(modules[router.name] is router.gate for router in routers)


@pytest.mark.parametrize("name", FAMILIES + MORE_FAMILIES)
def test_the_family_table_says_what_the_router_does(name: str) -> None:
    """The weights that a router gives its experts are proportional to r, so the scoring in the table is the real one."""
    model = tiny_moe(name)
    routers, outputs, made = find_routers(model), [], []
    handles = [r.module.register_forward_hook(lambda m, i, o: outputs.append(o)) for r in routers]
    handles += [r.gate.register_forward_hook(lambda m, i, o: made.append(first(o))) for r in routers]
    ids, mask, _ = padded_batch()
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    rule = family(model.config)
    for logits, (_, weights, index) in zip(made, outputs, strict=True):
        chosen = routing_from_logits(logits, rule).gather(-1, index)
        torch.testing.assert_close(
            weights / weights.sum(-1, keepdim=True), chosen / chosen.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6
        )
        other = Scoring.SOFTMAX if rule.scoring is Scoring.SIGMOID else Scoring.SIGMOID
        wrong = routing_from_logits(logits, other).gather(-1, index)
        assert not torch.allclose(
            weights / weights.sum(-1, keepdim=True), wrong / wrong.sum(-1, keepdim=True), rtol=1e-3
        )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES + MORE_FAMILIES)
def test_reading_maps_flat_tokens_back_to_rows(name: str, side: str) -> None:
    model = tiny_moe(name)
    ids, mask, last = padded_batch(side=side)
    routers = find_routers(model)
    recorded: dict[int, torch.Tensor] = {}
    handles = [
        r.gate.register_forward_hook(lambda m, i, o, layer=r.layer: recorded.__setitem__(layer, first(o)))
        for r in routers
    ]
    positions = torch.stack([last, last - 1, torch.tensor([-1, 0, 2])], dim=1)
    with read_routing(model, routers, positions) as tape:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    routing = tape.routing_BPLE
    assert routing.shape == (3, 3, len(routers), routers[0].num_experts)
    assert routing.dtype is torch.float32
    for column, router in enumerate(routers):
        logits = recorded[router.layer].reshape(*ids.shape, -1).float()
        for row in range(3):
            for slot in range(3):
                position = int(positions[row, slot])
                if position < 0:
                    assert bool((routing[row, slot, column] == 0).all())
                    continue
                scores = (
                    logits[row, position].sigmoid()
                    if family(model.config).scoring is Scoring.SIGMOID
                    else logits[row, position].exp()
                )
                torch.testing.assert_close(routing[row, slot, column], scores / scores.sum(), rtol=1e-5, atol=1e-7)
    gradient = torch.autograd.grad(routing[0, 0, -1, 0], routers[-1].gate.weight)[0]
    assert float(gradient.abs().sum()) > 0


def test_reading_leaves_no_hooks_and_wants_a_table() -> None:
    model = tiny_moe("olmoe")
    routers = find_routers(model)
    with pytest.raises(ValueError, match="table"), read_routing(model, routers, torch.tensor([1])):
        pass
    with (
        read_routing(model, routers, torch.tensor([[1]])) as tape,
        pytest.raises(AssertionError, match="after a forward"),
    ):
        _ = tape.routing_BPLE
    assert not any(router.gate._forward_hooks for router in routers)


def test_the_documents_list_the_families_that_there_are() -> None:
    assert families_table() in (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def test_refusals() -> None:
    dense = AutoModelForCausalLM.from_config(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    )
    with pytest.raises(ModelError, match="'llama' model cannot be tuned"):
        find_routers(dense)
    with pytest.raises(ModelError, match="sparsemixer"):
        find_routers(tiny_moe("phimoe"))
    assert set(FAMILIES + MORE_FAMILIES) == set(supported_families())


def test_every_moe_of_transformers_is_listed_or_refused_with_a_reason_of_its_own() -> None:
    """Whatever configuration of the installed transformers counts experts, and every reason given is of one there is."""
    root = Path(transformers.__file__).parent / "models"
    with_experts, known = set(), set()
    for file in root.glob("*/configuration_*.py"):
        for block in re.split(r"(?m)^class ", file.read_text(encoding="utf-8"))[1:]:
            model_type = re.search(r'(?m)^    model_type = "([^"]+)"', block)
            if model_type is None:
                continue
            known.add(model_type[1])
            if re.search(r"(?m)^    \w*num_(local_)?experts: |^    n_routed_experts: |^    expert_capacity: ", block):
                with_experts.add(model_type[1])
    # Language models that are listed by the multimodal models around them.
    listed = {*supported_families(), "qwen3_vl_moe_text", "glm4v_moe_text"}
    assert len(with_experts) > 60
    assert sorted(with_experts - listed - REASONS.keys()) == []
    assert not listed & REASONS.keys()
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24):
        assert sorted(REASONS.keys() - known) == []
    for model_type in sorted(with_experts - listed):
        assert REASONS[model_type] in refusal(model_type)


def test_a_multimodal_model_is_refused_by_its_language_models_reason() -> None:
    class Text:
        model_type = "mixtral"

    class Whole:
        model_type = "some_vl"

        def get_text_config(self) -> Text:
            return Text()

    with pytest.raises(ModelError, match="'mixtral', but this multimodal form of it has not been checked"):
        family(Whole())
    Text.model_type = "deepseek_v32"
    with pytest.raises(ModelError, match="an indexer of its own"):
        family(Whole())


def test_a_dense_gemma_4_is_refused() -> None:
    for name in ("gemma4", "gemma4_text"):
        with pytest.raises(ModelError, match="it has none"):
            family(tiny_config(name, enable_moe_block=False))


def test_phi_moe_is_refused_because_gradient_does_not_reach_all_its_routers() -> None:
    """The reason given in the refusal, kept true: when this fails, Phi-MoE can be allowed."""
    model = tiny_moe("phimoe")
    ids, mask, last = padded_batch()
    routers = [m for n, m in model.named_modules() if n.endswith("mlp.router")]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[range(3), last], torch.tensor([5, 6, 7]))
    gradients = torch.autograd.grad(loss, [router.weight for router in routers])
    assert min(float(gradient.abs().sum()) for gradient in gradients) == 0.0


def test_a_model_with_an_adapter_is_refused() -> None:
    from peft import LNTuningConfig, get_peft_model

    model = get_peft_model(tiny_moe("olmoe"), LNTuningConfig(target_modules=["model.layers.2.mlp.gate"]))
    with pytest.raises(ModelError, match="merge it first"):
        find_routers(model.base_model.model)
