"""The distillation loss against literal Kullback-Leibler divergences, value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from roma_ray.engine.distillation import Targets, distillation_losses, divergences, likeliest
from roma_ray.engine.forward import lay_out
from roma_ray.questions.prompts import Prompt

V = 17


def drawn(seed: int, rows: int = 5, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def literal(teacher_GV: Tensor, student_GV: Tensor, count: int) -> list[Tensor]:
    """KL over the teacher's `count` likeliest tokens and the rest as one outcome, place by place, outcome by outcome."""
    found = []
    for p_V, q_V in zip(teacher_GV.double().softmax(-1), student_GV.double().softmax(-1), strict=True):
        kept = p_V.argsort(descending=True)[:count].tolist()
        total = torch.zeros((), dtype=torch.float64)
        for token in kept:
            total = total + p_V[token] * (p_V[token].log() - q_V[token].log())
        others = [token for token in range(V) if token not in kept]
        if others:
            p, q = sum(p_V[token] for token in others), sum(q_V[token] for token in others)
            total = total + p * (p.log() - q.log())  # type: ignore[union-attr, operator]
        found.append(total)
    return found


@pytest.mark.parametrize("count", [1, 4, V - 1, V, V + 5])
def test_value_and_gradient_are_those_of_a_literal_loop(count: int) -> None:
    teacher_GV, student_GV = drawn(0), drawn(1).requires_grad_()
    found_G = divergences(student_GV, likeliest(teacher_GV, count))
    expected_G = torch.stack(literal(teacher_GV, student_GV, min(count, V)))
    torch.testing.assert_close(found_G.double(), expected_G, atol=1e-5, rtol=1e-5)
    (mine,) = torch.autograd.grad(found_G.sum(), [student_GV])
    (theirs,) = torch.autograd.grad(expected_G.sum(), [student_GV])
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)
    assert float(mine.abs().max()) > 0.01


def test_the_whole_vocabulary_gives_the_exact_divergence_and_fewer_tokens_never_more() -> None:
    teacher_GV, student_GV = drawn(2), drawn(3)
    exact_G = torch.nn.functional.kl_div(
        student_GV.log_softmax(-1), teacher_GV.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(divergences(student_GV, likeliest(teacher_GV, V)), exact_G)
    before = torch.zeros_like(exact_G)
    for count in range(1, V):
        found_G = divergences(student_GV, likeliest(teacher_GV, count))
        assert (found_G >= -1e-6).all()
        assert (found_G <= exact_G + 1e-5).all()
        # Splitting an outcome off the rest can only tell more.
        assert (found_G >= before - 1e-5).all()
        before = found_G


def test_a_student_that_says_the_same_has_no_loss_and_no_gradient() -> None:
    logits_GV = drawn(4).requires_grad_()
    found_G = divergences(logits_GV, likeliest(logits_GV.detach(), 3))
    torch.testing.assert_close(found_G, torch.zeros(5), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(found_G.sum(), [logits_GV])
    assert float(gradient.abs().max()) < 1e-6


def test_a_teacher_that_is_certain_leaves_nothing_to_the_rest() -> None:
    teacher_GV = torch.full((1, V), -1e9)
    teacher_GV[0, 3] = 0.0
    student_GV = drawn(5, 1).requires_grad_()
    targets = likeliest(teacher_GV, 2)
    assert targets.rest_G.item() == -math.inf or math.exp(targets.rest_G.item()) == 0
    found_G = divergences(student_GV, targets)
    torch.testing.assert_close(found_G, -student_GV.log_softmax(-1)[:, 3])
    (gradient,) = torch.autograd.grad(found_G.sum(), [student_GV])
    assert bool(torch.isfinite(gradient).all())


def test_the_loss_is_the_mean_over_an_answers_tokens_summed_over_questions() -> None:
    prompts = [
        Prompt("a", "t", "train", (1, 2), ((3, 4, 5),), (1,), 0, False),
        Prompt("b", "t", "train", (1, 6, 7), ((8,),), (1,), 0, False),
    ]
    layout = lay_out(prompts, prefix=1, gold_only=True)
    keep = layout.keep()
    assert len(keep) == 4
    logits_NV, teacher_GV = drawn(6, 4), drawn(7, 4)
    found = distillation_losses(logits_NV, keep, layout, likeliest(teacher_GV, 4))
    one = literal(teacher_GV, logits_NV, 4)
    assert float(found) == pytest.approx(float(sum(one[:3]) / 3 + one[3]), rel=1e-5)


def test_the_likeliest_come_first_with_their_own_log_probabilities() -> None:
    logits_GV = drawn(8)
    found: Targets = likeliest(logits_GV, 3)
    for g, logp_V in enumerate(logits_GV.log_softmax(-1)):
        values, ids = logp_V.sort(descending=True)
        assert found.ids_Gn[g].tolist() == ids[:3].tolist()
        torch.testing.assert_close(found.logp_Gn[g], values[:3])
        assert float(found.rest_G[g].exp()) == pytest.approx(1 - float(values[:3].exp().sum()), abs=1e-6)
