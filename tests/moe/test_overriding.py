"""Overriding routing: exact for the model's own routing, the family's own code for everything else."""

from __future__ import annotations

import pytest
import torch

from roma_ray.moe.overriding import override_routing
from roma_ray.moe.reading import read_routing
from roma_ray.moe.routers import find_routers
from tests.tiny import FAMILIES, MORE_FAMILIES, padded_batch, tiny_moe


def run(model, ids, mask):
    """Logits, and each router's (weights, indices)."""
    routers, seen = find_routers(model), []
    handles = [r.module.register_forward_hook(lambda m, i, o: seen.append((o[1], o[2]))) for r in routers]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits, seen


def own_routing(model, ids, mask, positions_BP):
    with torch.no_grad(), read_routing(model, find_routers(model), positions_BP) as tape:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return tape.routing_BPLE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_own_routing_changes_nothing(family: str, dtype: torch.dtype) -> None:
    model = tiny_moe(family, dtype=dtype)
    ids, mask, last = padded_batch(side="left")
    routers = find_routers(model)
    routing = own_routing(model, ids, mask, last[:, None])[:, 0]
    with torch.no_grad():
        want, before = run(model, ids, mask)
        with override_routing(model, routers, routing, last):
            got, after = run(model, ids, mask)
        again, _ = run(model, ids, mask)
    assert torch.equal(want, again), "the override outlived its block"
    for (weights, index), (new_weights, new_index) in zip(before, after, strict=True):
        assert torch.equal(index, new_index)
        assert weights.dtype is new_weights.dtype
    real = mask.bool()
    # LFM2 scores its experts in the model's own type, so that replaced scores are rounded once more.
    atol = 0.05 if family == "lfm2_moe" and dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(got[real], want[real], rtol=2e-5 if dtype is torch.float32 else 2e-2, atol=atol)


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_override_is_what_the_router_uses_and_only_there(family: str) -> None:
    model = tiny_moe(family)
    ids, mask, last = padded_batch()
    routers = find_routers(model)
    generator = torch.Generator().manual_seed(3)
    shape = (len(ids), len(routers), routers[0].num_experts)
    routing = torch.softmax(2 * torch.randn(shape, generator=generator), dim=-1)
    positions = last.clone()
    positions[1] = -1
    with torch.no_grad():
        want, _ = run(model, ids, mask)
        with override_routing(model, routers, routing, positions):
            got, seen = run(model, ids, mask)
    # Not to the bit: other tokens in an expert's batch may change the kernel that multiplies it.
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[0, : last[0]], want[0, : last[0]], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got[0, last[0]], want[0, last[0]])
    width = ids.shape[1]
    for layer, (weights, index) in enumerate(seen):
        row = 2 * width + int(last[2])
        chosen = routing[2, layer, index[row]]
        # Weights are proportional to r over the chosen experts in every family.
        ratio = weights[row] / weights[row].sum()
        torch.testing.assert_close(ratio, chosen / chosen.sum(), rtol=1e-4, atol=1e-6)


def test_gradient_reaches_the_override_and_zero_entries_are_finite() -> None:
    for family in ("olmoe", "gpt_oss", "deepseek_v3"):
        model = tiny_moe(family).requires_grad_(False)
        ids, mask, last = padded_batch()
        routing = own_routing(model, ids, mask, last[:, None])[:, 0].clone()
        routing[0, 0, routing[0, 0].argmin()] = 0.0
        routing.requires_grad_(True)
        with override_routing(model, find_routers(model), routing, last):
            logits, _ = run(model, ids, mask)
        torch.log_softmax(logits[0, last[0]], dim=-1)[5].backward()
        assert routing.grad is not None
        assert bool(torch.isfinite(routing.grad).all())
        assert bool((routing.grad[0].abs().sum(-1) > 0).all()), family
        assert bool((routing.grad[1:] == 0).all())


def test_one_hot_override_of_a_sigmoid_family_is_not_clipped() -> None:
    model = tiny_moe("glm4_moe", n_group=1, topk_group=1)
    ids, mask, last = padded_batch()
    routers = find_routers(model)
    routing = torch.zeros(3, len(routers), 8)
    routing[:, :, 6] = 1.0
    with torch.no_grad(), override_routing(model, routers, routing, last):
        _, seen = run(model, ids, mask)
    for weights, index in seen:
        row = int(last[0])
        assert float(weights[row][index[row] == 6] / weights[row].sum()) == pytest.approx(1.0)


def test_several_positions_and_wrong_shapes() -> None:
    model = tiny_moe("mixtral")
    ids, mask, last = padded_batch()
    routers = find_routers(model)
    positions = torch.stack([last, last - 1], dim=1)
    routing = own_routing(model, ids, mask, positions)
    with torch.no_grad():
        want, _ = run(model, ids, mask)
        with override_routing(model, routers, routing, positions):
            got, _ = run(model, ids, mask)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="does not fit"):
        with override_routing(model, routers, routing[:, 0, :-1], last):
            pass


def test_an_error_inside_the_block_restores_the_routers() -> None:
    model = tiny_moe("olmoe")
    routers = find_routers(model)
    with (
        pytest.raises(RuntimeError, match="inside"),
        override_routing(model, routers, torch.ones(1, 6, 8) / 8, torch.tensor([0])),
    ):
        raise RuntimeError("inside")
    assert all("forward" not in router.module.__dict__ for router in routers)
