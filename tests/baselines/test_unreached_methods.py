"""Where one expert is taken and its weight scaled to 1, methods that would follow rounding noise are refused, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from roma_ray.baselines.bench import Bench, open_bench
from roma_ray.baselines.dense_backprop import DefaultVectors
from roma_ray.baselines.head_passes import HeadRun
from roma_ray.baselines.method_registry import METHODS
from roma_ray.engine.progress import Silence
from roma_ray.engine.setup import resolve
from roma_ray.errors import UnmovedError
from roma_ray.moe.reach import UNREACHED
from roma_ray.moe.routers import find_routers
from roma_ray.runs.pipeline import run
from tests.baselines.conftest import BASELINES
from tests.tiny import save_tiny, tiny_moe
from tests.world import make_world


@pytest.fixture(scope="module")
def unreached(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root: Path = tmp_path_factory.mktemp("top1-bench")
    config = make_world(root, "olmoe", count=60, baselines=BASELINES, finetune={"epochs": 1})
    vocabulary = json.loads((root / "model" / "config.json").read_text())["vocab_size"]
    model = tiny_moe("olmoe", seed=3, vocab_size=vocabulary, num_experts_per_tok=1, norm_topk_prob=True)
    save_tiny(model, root / "model")
    setup = resolve(config, device="cpu")
    return open_bench(setup, dict(run(setup, Silence(), until="neighbors").stages))


@pytest.mark.parametrize("name", ["c3po", "router_tuning", "oracle_tuning", "oracle", "oracle_control"])
def test_a_method_that_would_follow_noise_is_refused(unreached: Bench, name: str) -> None:
    method = METHODS[name]
    with pytest.raises(UnmovedError, match="rounding noise"):
        method.fit(unreached, method.prepare(unreached, 0), 0.003, 0)


@pytest.mark.parametrize(
    "name", ["c3po_kernel", "c3po_mode", "expert_steering", "dense_backprop", "fragile_tokens", "prompt_tuning"]
)
def test_a_method_with_something_else_to_follow_is_not(unreached: Bench, name: str) -> None:
    method, rows = METHODS[name], unreached.rows["test"][:4]
    fitted = method.fit(unreached, method.prepare(unreached, 0), 0.003, 0)
    assert len(method.predict(unreached, fitted, rows, 0).rows) == len(rows)


def test_the_gates_hear_of_the_task_through_the_default_vectors(unreached: Bench) -> None:
    fitted = METHODS["dense_backprop"].fit(unreached, {}, 0.003, 0)
    assert fitted.facts["probe"]["reach"] >= UNREACHED
    pretrained = {router.layer: router.gate.weight for router in unreached.head.routers}
    gates = [name for name in fitted.tensors if not name.startswith("default.")]
    assert len(gates) == len(unreached.setup.layers)
    assert all(not any(torch.equal(fitted.tensors[name], gate) for gate in pretrained.values()) for name in gates)


def test_reach_where_there_is_one(letter: Bench) -> None:
    assert HeadRun(letter, letter.rows["train"][:8]).reach() >= UNREACHED


def test_weights_with_default_vectors_against_a_literal_loop() -> None:
    """An expert's weight stands to that of the chosen one, 1, as the r of both."""
    model = tiny_moe("olmoe", seed=2, num_experts_per_tok=1, norm_topk_prob=True)
    router = find_routers(model)[-1]
    block = model.get_submodule(router.name.rpartition(".")[0])
    vectors = DefaultVectors(model, [router], 0.5)
    hidden_TD = torch.randn(7, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with vectors.installed(), vectors.read_weights([router]) as found, torch.no_grad():
        logits_TE, weights_TK, index_TK = router.module(hidden_TD)
        block.experts(hidden_TD, index_TK, weights_TK)
    for t in range(7):
        r_E = logits_TE[t].softmax(-1)
        chosen = int(index_TK[t, 0])
        for e in range(router.num_experts):
            assert float(found[router.layer][t, e]) == pytest.approx(float(r_E[e] / r_E[chosen]), rel=1e-4)
