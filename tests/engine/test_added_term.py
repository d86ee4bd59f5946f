"""The manifold term in other people's loops: the same gradients as the project's own objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

from roma_ray.engine.added_term import ManifoldTerm, manifold_trainer, train_only_routers
from roma_ray.errors import ConfigError, ModelError
from roma_ray.manifold.losses import NeighborTargets, manifold_loss
from roma_ray.moe.text_routing import prompt_positions, routing_rows
from tests.tiny import tiny_moe

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16], [17, 18, 19]]
LAYERS = (3, 4, 5)


class Ids:
    """A tokenizer whose texts are numbers."""

    pad_token_id = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(number) for number in text.split()]}


def targets_for(count: int, experts: int) -> NeighborTargets:
    generator = torch.Generator().manual_seed(5)
    mean = torch.softmax(torch.randn(count, len(LAYERS), experts, generator=generator), -1)
    present = torch.ones(count, dtype=torch.bool)
    present[1] = False
    return NeighborTargets(mean * present[:, None, None], torch.rand(count, generator=generator), present)


def examples() -> list[dict[str, Any]]:
    """One answer token a question, so that the mean over tokens is the mean over questions."""
    rows = []
    for row, prompt in enumerate(PROMPTS):
        ids = [*prompt, 20 + row]
        width = 7 - len(ids)
        rows.append(
            {
                "input_ids": ids + [0] * width,
                "attention_mask": [1] * len(ids) + [0] * width,
                "labels": [-100] * len(prompt) + [20 + row] + [-100] * width,
                "row": row,
            }
        )
    return rows


def literal(model: Any, targets: NeighborTargets, weight: float) -> dict[str, Tensor]:
    """Gate gradients of the mean loss, one question at a time through the stock forward."""
    total = torch.zeros(())
    from roma_ray.moe.reading import read_routing
    from roma_ray.moe.routers import find_routers

    routers = [router for router in find_routers(model) if router.layer in LAYERS]
    for row, prompt in enumerate(PROMPTS):
        with read_routing(model, routers, torch.tensor([[len(prompt) - 1]])) as tape:
            logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        task = torch.nn.functional.cross_entropy(logits[None], torch.tensor([20 + row]))
        total = total + task + weight * manifold_loss(tape.routing_BPLE[:, 0], targets.take(torch.tensor([row])))
    (total / len(PROMPTS)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_term_by_kl_is_the_loop_over_layers() -> None:
    model, targets = tiny_moe("olmoe", seed=1).eval(), targets_for(len(PROMPTS), 8)
    train_only_routers(model, LAYERS)
    term = ManifoldTerm(model, targets, weight=3.0, layers=LAYERS, distance="kl")
    total = 0.0
    for row, prompt in enumerate(PROMPTS):
        with term.reading(torch.ones(1, len(prompt))):
            model(input_ids=torch.tensor([prompt]))
        live = routing_rows(model, Ids(), [" ".join(map(str, prompt))], layers=LAYERS)[0]
        mean = targets.mean[row]
        expected = 3.0 * float((mean * (mean / live).log()).sum()) if targets.present[row] else 0.0
        assert term.loss(torch.tensor([row])).item() == pytest.approx(expected, rel=1e-4)
        total += expected
    assert total > 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stock_trainer_with_the_term_has_our_gradients(tmp_path: Path, accumulation: int) -> None:
    model = tiny_moe("olmoe", seed=1).eval()
    targets = targets_for(len(PROMPTS), 8)
    gates = train_only_routers(model, LAYERS)
    expected = literal(model, targets, 3.0)
    assert len(expected) == len(LAYERS) == len(gates)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.zero_grad()

    seen: dict[str, Tensor] = {}

    class Noting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            return super().step(closure)

    term = ManifoldTerm(model, targets, weight=3.0, layers=LAYERS)
    trainer = manifold_trainer(term)(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=len(PROMPTS) // accumulation,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
            remove_unused_columns=False,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            seed=0,
        ),
        train_dataset=examples(),
        optimizers=(Noting(gates, lr=0.1), None),
    )
    trainer.train()
    assert set(seen) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-4, atol=1e-6)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p.detach(), before[name])}
    assert changed == set(expected)


def test_examples_without_their_row_are_refused(tmp_path: Path) -> None:
    model = tiny_moe("olmoe", seed=1).eval()
    train_only_routers(model, LAYERS)
    term = ManifoldTerm(model, targets_for(len(PROMPTS), 8), weight=1.0, layers=LAYERS)
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    with pytest.raises(ConfigError, match="remove_unused_columns"):
        manifold_trainer(term)(model=model, args=arguments, train_dataset=examples()).train()


def test_the_term_needs_as_many_layers_as_its_targets() -> None:
    model = tiny_moe("olmoe", seed=1).eval()
    with pytest.raises(ConfigError, match="3 layers"):
        ManifoldTerm(model, targets_for(4, 8), weight=1.0, layers=LAYERS[:2])
    with pytest.raises(ModelError, match="no router"):
        ManifoldTerm(model, targets_for(4, 8), weight=1.0, layers=(3, 4, 77))


def test_gates_of_a_low_precision_model_are_not_trained_as_they_are() -> None:
    with pytest.raises(ModelError, match="float32"):
        train_only_routers(tiny_moe("olmoe", seed=1, dtype=torch.bfloat16))


@pytest.mark.parametrize("tokens", ["Last1", "Last3", "First1"])
def test_positions_do_not_depend_on_the_side_of_the_padding(tokens: str) -> None:
    right = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    left = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    at_right, at_left = prompt_positions(right, tokens), prompt_positions(left, tokens)
    assert torch.equal(at_right[1], at_left[1])
    assert torch.equal(at_right[0] + 2 * (at_right[0] >= 0), at_left[0])


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "qwen3_moe"])
def test_routing_rows_are_those_of_each_text_alone(family: str) -> None:
    model = tiny_moe(family, seed=2).eval()
    texts = [" ".join(map(str, prompt)) for prompt in PROMPTS]
    together = routing_rows(model, Ids(), texts, batch_size=3)
    alone = torch.cat([routing_rows(model, Ids(), [text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.sum(-1), torch.ones(together.shape[:2]))
    with pytest.raises(ModelError, match="eval"):
        routing_rows(model.train(), Ids(), texts)
