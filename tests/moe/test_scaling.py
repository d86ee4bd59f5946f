"""Router logits times a factor, in every family's own code."""

from __future__ import annotations

import pytest
import torch

from roma_ray.errors import ModelError
from roma_ray.moe.reading import read_routing
from roma_ray.moe.routers import find_routers, router_parameters
from roma_ray.moe.scaling import scaled_logits
from tests.tiny import FAMILIES, MORE_FAMILIES, padded_batch, tiny_moe


def outputs(model, ids, mask, last):
    with torch.no_grad(), read_routing(model, find_routers(model), last[:, None]) as tape:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits, tape.routing_BPLE


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_half_the_logits_are_those_of_half_the_gate_to_the_bit(family: str) -> None:
    model = tiny_moe(family)
    ids, mask, last = padded_batch()
    routers = find_routers(model)
    usual, _ = outputs(model, ids, mask, last)
    with scaled_logits(routers, torch.full((ids.numel(), len(routers), routers[0].num_experts), 0.5)):
        scaled, routing = outputs(model, ids, mask, last)
    again, _ = outputs(model, ids, mask, last)
    assert torch.equal(usual, again), "the factors outlived their block"
    with torch.no_grad():
        for router in routers:
            for parameter in router_parameters(router).values():
                parameter.mul_(0.5)
    halved, its_routing = outputs(model, ids, mask, last)
    assert torch.equal(scaled, halved)
    assert torch.equal(routing, its_routing)
    assert not torch.equal(usual, halved)


def test_each_token_layer_and_expert_has_its_own_factor() -> None:
    model = tiny_moe("olmoe")
    ids, mask, last = padded_batch()
    routers = find_routers(model)
    factors = torch.ones(ids.numel(), len(routers), 8)
    factors[ids.shape[1] + int(last[1]), 2] = torch.tensor([1.0, 1, 0, 1, 0, 1, 1, 1])
    _, usual = outputs(model, ids, mask, last)
    with scaled_logits(routers, factors):
        _, routing = outputs(model, ids, mask, last)
    # Two logits of 0 are two equal weights; a later layer hears of it, an earlier one and other sequences do not.
    changed = routing[1, 0]
    assert changed[2, 2] == changed[2, 4] != usual[1, 0, 2, 2]
    assert torch.equal(changed[:2], usual[1, 0, :2])
    assert not torch.equal(changed[3:], usual[1, 0, 3:])
    torch.testing.assert_close(routing[[0, 2]], usual[[0, 2]], rtol=1e-5, atol=1e-6)
    expected = usual[1, 0, 2].log() * factors[ids.shape[1] + int(last[1]), 2]
    shift = usual[1, 0, 2].log() - changed[2].log()
    # log r is the logits up to a constant, which the kept ones show.
    assert shift[[0, 1, 3, 5, 6, 7]].std() < 1e-5
    assert expected[2] == 0


def test_a_router_of_another_kind_is_refused_and_left_as_it_was() -> None:
    model = tiny_moe("olmoe")
    (router, *_) = find_routers(model)
    router.module.__dict__["forward"] = strange = lambda hidden_states: hidden_states
    with pytest.raises(ModelError, match="does not compute"), scaled_logits([router], torch.ones(3, 1, 8)):
        router.module(torch.zeros(3, 4))
    assert router.module.__dict__["forward"] is strange
