"""torch's ragged FlashAttention is taken where a small call of the kind succeeds, and left alone elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from roma_ray.moe import varlen as module
from roma_ray.moe.varlen import serves, succeeds

CALL = ("cpu", torch.bfloat16, 4, 2, 16)


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    succeeds.cache_clear()
    yield
    succeeds.cache_clear()


def without_kernel(query: Tensor, *others: Any, **settings: Any) -> Tensor:
    raise RuntimeError("No available kernel. Aborting execution.")


def of_torch_2_10(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
) -> Tensor:
    return query * 1


def whole(query: Tensor, *others: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool) -> Tensor:
    assert enable_gqa
    return query * scale


def without_windows(query: Tensor, *others: Any, window_size: tuple[int, int], **settings: Any) -> Tensor:
    if window_size[0] >= 0:
        raise NotImplementedError("windows")
    return query * 1


@pytest.mark.parametrize(
    ("function", "plain", "windowed"),
    [
        (without_kernel, False, False),
        (of_torch_2_10, False, False),
        (without_windows, True, False),
        (whole, True, True),
    ],
)
def test_what_a_torch_or_a_device_cannot_do_is_found_by_trying(
    function: Callable[..., Tensor], plain: bool, windowed: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    with torch.inference_mode():
        assert succeeds(*CALL, False) is plain
        assert succeeds(*CALL, True) is windowed


def test_a_torch_without_the_module_has_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert not succeeds(*CALL, False)


def test_the_cpu_is_not_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "succeeds", lambda *call: pytest.fail("tried on a CPU"))
    query = torch.zeros(1, 4, 3, 16, dtype=torch.bfloat16)
    assert not serves(query, query, query, None)
