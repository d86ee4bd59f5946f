"""The gates of benchmarks/engine.py that do not depend on the machine: exactness of every path, and counted arithmetic."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from roma_ray.moe.masters import RouterMasters
from roma_ray.moe.slices import load_slice

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def engine() -> Any:
    """The benchmark as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("engine")
    for name in ("engine", "common"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def world(engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """16 layers with the last 5 tuned, 32 prompts of 50-200 tokens, as in the benchmark, in a narrow model."""
    folder = tmp_path_factory.mktemp("narrow")
    engine.save_model(folder, hidden=96, expert_width=96, heads=2, experts=8, top_k=2, vocabulary=2_358)
    whole = load_slice(str(folder), dtype=torch.float32, with_lm_head=True)
    head = load_slice(str(folder), start=11, dtype=torch.float32, with_lm_head=True)
    prompts = engine.make_prompts(engine.BATCH, 2_358)
    targets = torch.softmax(3 * torch.randn(engine.BATCH, 5, 8, generator=torch.Generator().manual_seed(1)), -1)
    return engine.World(whole, head, prompts, targets, list(range(11, 16)))


def test_every_path_gives_the_same_loss_and_gradients_and_the_last_a_fifth_of_the_arithmetic(
    engine: Any, world: Any
) -> None:
    masters = {"whole": RouterMasters(world.whole, world.layers), "head": RouterMasters(world.head, world.layers)}
    found = {}
    for name in engine.PATHS:
        with FlopCounterMode(display=False) as counter:
            loss, gradients = engine.step(world, name, masters)
        found[name] = (counter.get_total_flops(), loss, gradients)
    flops, loss, gradients = found["plain"]
    for name, (_, other, theirs) in found.items():
        assert abs(float(other / loss) - 1) <= 1e-5, name
        for mine, his in zip(gradients, theirs, strict=True):
            assert float((mine - his).norm() / mine.norm()) <= 1e-5, name
    assert flops / found["full"][0] >= 5
    assert found["packed"][0] > found["trimmed"][0] > found["full"][0]
