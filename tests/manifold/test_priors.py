"""KL to a fixed routing, and which routing that is, against plain loops."""

import math

import pytest
import torch

from roma_ray.manifold import priors
from roma_ray.manifold.losses import NeighborTargets
from roma_ray.manifold.priors import base_targets, routing_kl, task_targets, uniform_targets
from roma_ray.manifold.regularizers import Regularized, entropy
from tests.manifold.test_losses import EXPERTS, LAYERS, QUESTIONS, routing

TASKS = [f"task {number % 4}" for number in range(QUESTIONS)]
SUCCESSFUL = torch.tensor([number % 4 != 3 and number % 3 > 0 for number in range(QUESTIONS)])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_the_kl_and_its_gradient_are_the_literal_loop(dtype, tolerance):
    fixed, present = routing(1, dtype), torch.arange(QUESTIONS) % 5 > 0
    logits = torch.randn(QUESTIONS, LAYERS, EXPERTS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    live = logits.to(dtype).requires_grad_()
    loss = routing_kl(live.softmax(-1), NeighborTargets(fixed, torch.zeros(QUESTIONS, dtype=dtype), present))
    (gradient,) = torch.autograd.grad(loss, live)
    exact = logits.to(dtype).double().requires_grad_()
    rows = exact.softmax(-1)
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(QUESTIONS):
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                if present[i]:
                    r, q = rows[i, layer, expert], float(fixed[i, layer, expert])
                    expected = expected + r * (r.log() - math.log(q))
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance)


def test_experts_that_underflowed_leave_loss_and_gradient_finite():
    logits = torch.tensor([[[0.0, -200.0, 1.0]]], requires_grad=True)
    live = logits.softmax(-1)
    assert (live == 0).any()
    loss = routing_kl(live, NeighborTargets(torch.tensor([[[1.0, 0.0, 0.0]]]), torch.zeros(1), torch.tensor([True])))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 0, 2] > 0, "an expert that q leaves out loses weight"


def test_the_own_routing_is_its_own_target():
    stored = routing(1)
    targets = base_targets(stored)
    assert torch.equal(targets.mean, stored)
    live = stored.clone().requires_grad_()
    loss = routing_kl(live, targets)
    assert loss.item() == 0
    # On the simplex, where an equal slope for all experts is none.
    (gradient,) = torch.autograd.grad(loss, live)
    assert torch.equal(gradient, torch.ones_like(gradient))


def test_kl_to_every_expert_alike_is_the_entropy_term():
    live = routing(2)
    torch.testing.assert_close(routing_kl(live, uniform_targets(routing(1))), entropy(Regularized(live)))


def test_the_task_prior_is_the_mean_of_its_successes_by_a_loop(monkeypatch):
    stored = routing(1, torch.float32)
    targets = task_targets(stored, TASKS, SUCCESSFUL)
    assert targets.mean.dtype == torch.float32
    assert (targets.spread == 0).all()
    for row in range(QUESTIONS):
        members = [n for n in range(QUESTIONS) if TASKS[n] == TASKS[row] and SUCCESSFUL[n]]
        assert bool(targets.present[row]) == bool(members)
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                total = sum(float(stored[n, layer, expert]) for n in members)
                mean = total / len(members) if members else 0.0
                assert float(targets.mean[row, layer, expert]) == pytest.approx(mean, rel=1e-6)
    assert not targets.present[TASKS.index("task 3")], "one task should have no success"
    for block in (1, 3):
        monkeypatch.setattr(priors, "_BLOCK_ROWS", block)
        for one, other in zip(task_targets(stored, TASKS, SUCCESSFUL), targets, strict=True):
            assert torch.equal(one, other)
    assert targets.present.sum() > QUESTIONS / 2
