"""What a process holds of a model from one work to the next."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from roma_ray.engine.held_slices import HeldSlices
from roma_ray.engine.model_spec import ModelSpec
from roma_ray.errors import ModelError
from roma_ray.moe.routers import router_parameters
from tests.tiny import save_tiny, tiny_moe


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    return ModelSpec(save_tiny(tiny_moe("olmoe"), tmp_path), None, "float32", "eager", "sdpa", "cpu", 1)


def test_the_same_slice_is_lent_again_with_the_base_models_gates(spec: ModelSpec) -> None:
    held = HeldSlices()
    with held.opening(spec):
        first = spec.load(2, None, with_lm_head=True)
    base = [{n: p.detach().clone() for n, p in router_parameters(r).items()} for r in first.routers]
    with torch.no_grad():
        for router in first.routers:
            for parameter in router_parameters(router).values():
                parameter.add_(1)
    with held.opening(spec):
        again = spec.load(2, None, with_lm_head=True)
    assert again is first
    assert held.loaded == 1
    for router, values in zip(again.routers, base, strict=True):
        for name, parameter in router_parameters(router).items():
            assert torch.equal(parameter, values[name])
    # Beside a work that is being opened nothing is held.
    assert spec.load(2, None, with_lm_head=True) is not first


def test_what_the_next_work_does_not_need_is_gone_before_it_loads(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldSlices()
    with held.opening(spec):
        seen = weakref.ref(spec.load(0, None, with_lm_head=True).model)
    assert seen() is not None
    there: list[bool] = []
    load = ModelSpec._load

    def watched(self: ModelSpec, start: int, stop: int | None, *, with_lm_head: bool) -> object:
        there.append(seen() is not None)
        return load(self, start, stop, with_lm_head=with_lm_head)

    monkeypatch.setattr(ModelSpec, "_load", watched)
    with held.opening(spec):
        trunk = weakref.ref(spec.load(0, 2, with_lm_head=False).model)
        spec.load(2, None, with_lm_head=True)
    assert there == [False, False]
    # A work that asks for a part of it leaves the rest to nobody; one of another kind leaves nothing.
    with held.opening(spec):
        spec.load(2, None, with_lm_head=True)
    assert held.loaded == 3
    assert trunk() is None
    with held.opening("minilm"):
        assert not held._held


def test_after_a_failure_nothing_is_held(spec: ModelSpec) -> None:
    held = HeldSlices()

    def fails() -> None:
        with held.opening(spec):
            spec.load(2, None, with_lm_head=True)
            raise ModelError("no")

    with pytest.raises(ModelError):
        fails()
    with held.opening(spec):
        spec.load(2, None, with_lm_head=True)
    assert held.loaded == 2
