"""fp32 masters: training sees what the export holds, and nothing else moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from roma_ray.errors import CheckpointError, ModelError
from roma_ray.moe.adapters import load_adapter, save_adapter
from roma_ray.moe.masters import RouterMasters, frozen_digest
from roma_ray.moe.slices import load_slice
from tests.padded import slice_logits
from tests.tiny import FAMILIES, MORE_FAMILIES, padded_batch, save_tiny, tiny_moe


def train_a_little(part, masters: RouterMasters, inputs, mask, positions, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(masters.parameters(), lr=3e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = slice_logits(part, inputs, mask, positions)
        torch.nn.functional.cross_entropy(logits[:, 0].float(), torch.tensor([5, 6, 7])).backward()
        optimizer.step()


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_bf16_model_trains_what_it_exports(family: str, tmp_path: Path) -> None:
    model = tiny_moe(family, dtype=torch.bfloat16)
    part = load_slice(save_tiny(model, tmp_path), dtype=torch.bfloat16, with_lm_head=True)
    ids, mask, last = padded_batch(side="left")
    layers = [router.layer for router in part.routers][-2:]
    masters = RouterMasters(part, layers)
    before, start = frozen_digest(part.model), masters.state()
    train_a_little(part, masters, ids, mask, last[:, None])
    assert frozen_digest(part.model) == before, "a frozen tensor moved"
    trained = masters.state()
    assert not any(torch.equal(trained[key], start[key]) for key in start)
    assert all(p.dtype is torch.float32 for p in masters.parameters())
    with torch.no_grad():
        live = slice_logits(part, ids, mask, last[:, None])
        masters.detach()
        save_adapter(tmp_path / "adapter", part, trained, base=str(tmp_path), revision=None, fingerprint="f")
        fresh = load_slice(str(tmp_path), dtype=torch.bfloat16, with_lm_head=True)
        untouched = slice_logits(fresh, ids, mask, last[:, None])
        load_adapter(tmp_path / "adapter", fresh)
        reloaded = slice_logits(fresh, ids, mask, last[:, None])
    assert torch.equal(live, reloaded)
    assert not torch.equal(live, untouched)


def test_gpt_oss_trains_its_router_bias(tmp_path: Path) -> None:
    part = load_slice(save_tiny(tiny_moe("gpt_oss"), tmp_path), start=3, dtype=torch.float32, with_lm_head=True)
    masters = RouterMasters(part, [4, 5])
    assert set(masters.parameters_by_layer[5]) == {"weight", "bias"}
    assert set(masters.state()) == {"layers.4.weight", "layers.4.bias", "layers.5.weight", "layers.5.bias"}


def test_selection_bias_is_never_trained(tmp_path: Path) -> None:
    part = load_slice(save_tiny(tiny_moe("deepseek_v3"), tmp_path), dtype=torch.float32, with_lm_head=True)
    assert list(RouterMasters(part, [5]).parameters_by_layer[5]) == ["weight"]


def test_detach_gives_the_original_back() -> None:
    model = tiny_moe("gpt_oss")
    from roma_ray.moe.routers import find_routers

    before, names = frozen_digest(model), list(dict(model.named_parameters()))
    masters = RouterMasters(find_routers(model), [0, 5])
    assert frozen_digest(model) != before
    with torch.no_grad():
        for parameter in masters.parameters():
            parameter.add_(1.0)
    masters.detach()
    masters.detach()
    assert frozen_digest(model) == before
    assert list(dict(model.named_parameters())) == names


def test_state_round_trip_and_refusals() -> None:
    from roma_ray.moe.routers import find_routers

    routers = find_routers(tiny_moe("olmoe"))
    masters = RouterMasters(routers, [2, 5])
    state = {key: tensor + 0.25 for key, tensor in masters.state().items()}
    masters.load(state)
    assert all(torch.equal(masters.state()[key], state[key]) for key in state)
    with pytest.raises(CheckpointError, match="other layers"):
        masters.load({"layers.2.weight": state["layers.2.weight"]})
    with pytest.raises(CheckpointError, match="shape"):
        masters.load({**state, "layers.2.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="NaN"):
        masters.load({**state, "layers.2.weight": state["layers.2.weight"] * float("nan")})
    with pytest.raises(ModelError, match="no router"):
        RouterMasters(routers, [17])
