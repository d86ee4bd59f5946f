"""The second term of eq. 9 by name."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch

from roma_ray.config.finetune_settings import RegularizerConfig
from roma_ray.manifold.losses import DISTANCES, NeighborTargets, manifold_kl, manifold_loss
from roma_ray.manifold.priors import routing_kl
from roma_ray.manifold.regularizers import REGULARIZERS, Regularized, entropy, l1, l2, yardstick
from tests.manifold.test_losses import EXPERTS, LAYERS, QUESTIONS, routing


def test_entropy_is_the_literal_kl_to_uniform():
    live = routing(2).requires_grad_()
    expected = live.new_zeros(())
    for i in range(QUESTIONS):
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                p = live[i, layer, expert]
                expected = expected + p * (p.log() + math.log(EXPERTS))
    loss = entropy(Regularized(live))
    torch.testing.assert_close(loss, expected)
    # On the simplex only differences between experts matter; the constant log E per unit of mass is not one.
    (got,) = torch.autograd.grad(loss, live)
    (wanted,) = torch.autograd.grad(expected, live)
    torch.testing.assert_close(got - got.mean(-1, keepdim=True), wanted - wanted.mean(-1, keepdim=True))
    uniform = torch.full((4, LAYERS, EXPERTS), 1 / EXPERTS, dtype=torch.float64)
    assert entropy(Regularized(uniform)).item() == pytest.approx(0, abs=1e-12)


def test_entropy_step_raises_the_entropy_even_from_a_one_hot_row():
    logits = torch.tensor([[[0.0, -2.0, 1.0, -200.0]]], requires_grad=True)
    assert (logits.softmax(-1) == 0).any(), "the row should hold an underflow"
    loss = entropy(Regularized(logits.softmax(-1)))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(gradient).all()
    assert entropy(Regularized((logits - 0.1 * gradient).softmax(-1))) < loss


@pytest.mark.parametrize("sign", ["raise", "lower"])
@pytest.mark.parametrize("target", [None, 0.0, 0.5, 0.8, 1.0])
def test_entropy_up_or_down_and_as_far_as_the_target_is_the_literal_loop(sign, target):
    logits = 2 * torch.randn(QUESTIONS, LAYERS, EXPERTS, generator=torch.Generator().manual_seed(1)).double()
    logits.requires_grad_()
    live = logits.softmax(-1)
    end = {"raise": 1.0, "lower": 0.0}[sign] if target is None else target
    expected, moved = live.new_zeros(()), 0
    for i in range(QUESTIONS):
        for layer in range(LAYERS):
            own = live.new_zeros(())
            for expert in range(EXPERTS):
                own = own - live[i, layer, expert] * live[i, layer, expert].log()
            left = end * math.log(EXPERTS) - own if sign == "raise" else own - end * math.log(EXPERTS)
            if left > 0:
                expected, moved = expected + left, moved + 1
    if target in (0.5, 0.8):
        assert 0 < moved < QUESTIONS * LAYERS, "some rows should be past the target, others not"
    loss = entropy(Regularized(live, entropy_sign=sign, entropy_target=target))
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss, logits, retain_graph=True)
    wanted = torch.autograd.grad(expected, logits)[0] if moved else torch.zeros_like(got)
    torch.testing.assert_close(got, wanted)


def test_norms_are_literal_sums():
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(4, 3, generator=generator), torch.randn(5, generator=generator)]
    numbers = [value for theta in parameters for value in theta.flatten().tolist()]
    one = Regularized(routing(2)[:1], parameters=parameters)
    assert l1(one).item() == pytest.approx(sum(abs(x) for x in numbers), rel=1e-6)
    assert l2(one).item() == pytest.approx(sum(x * x for x in numbers), rel=1e-6)


@pytest.mark.parametrize(("norm", "slope"), [(l1, torch.sign), (l2, lambda theta: 2 * theta)])
def test_the_mean_of_a_norm_over_any_split_of_the_batch_is_the_norm(norm, slope):
    theta = [torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()]
    parts = [norm(Regularized(routing(2)[rows], parameters=theta)) for rows in (slice(0, 5), slice(5, None))]
    mean = sum(parts) / QUESTIONS
    torch.testing.assert_close(mean, norm(Regularized(routing(2)[:1], parameters=theta)))
    (gradient,) = torch.autograd.grad(mean, theta)
    torch.testing.assert_close(gradient, slope(theta[0].detach()))


def test_every_name_of_the_configuration_is_a_regularizer():
    assert set(REGULARIZERS) == set(get_args(RegularizerConfig.model_fields["kind"].annotation))
    live = routing(2).requires_grad_()
    targets = NeighborTargets(routing(1), torch.rand(QUESTIONS, dtype=torch.float64), torch.arange(QUESTIONS) > 0)
    on = Regularized(live, targets, [torch.ones(2, 3)])
    assert REGULARIZERS["manifold"](on) == manifold_loss(live, targets)
    assert REGULARIZERS["manifold"](replace(on, distance="kl")) == manifold_kl(live, targets)
    assert set(DISTANCES) == set(get_args(RegularizerConfig.model_fields["distance"].annotation))
    assert REGULARIZERS["entropy"](on) == entropy(on)
    assert REGULARIZERS["base"](on) == REGULARIZERS["prior"](on) == routing_kl(live, targets)
    assert REGULARIZERS["l1"](on) == REGULARIZERS["l2"](on) == 6 * QUESTIONS
    none = REGULARIZERS["none"](on)
    assert none == 0
    assert not none.requires_grad


@pytest.mark.parametrize("distance", ["squared", "kl"])
def test_the_yardstick_s_gradient_is_that_of_targets_as_far_away_as_r_is_long(distance):
    logits = torch.randn(QUESTIONS, LAYERS, EXPERTS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    logits.requires_grad_()
    live = logits.softmax(-1)
    targets = NeighborTargets(routing(1), torch.zeros(QUESTIONS), torch.arange(QUESTIONS) > 0)
    on = Regularized(live, targets, distance=distance)
    scale = yardstick("manifold", on)
    assert scale is not None
    (gradient,) = torch.autograd.grad(scale, live, retain_graph=True)
    # Each entry is r away from its target, up or down: 2 |r - m| = 2 r, or m / r = 0 or 2.
    if distance == "squared":
        torch.testing.assert_close(gradient[1:].abs(), 2 * live.detach()[1:])
    else:
        assert set(gradient[1:].abs().flatten().round(decimals=9).tolist()) == {0.0, 2.0}
    assert gradient[0].abs().sum() == 0
    # A target a part of that away has that part of its gradient.
    near = targets._replace(mean=live.detach() * (1 + 1e-3))
    (small,) = torch.autograd.grad(DISTANCES["squared"](live, near), live)
    assert (small.norm() / (2 * live[1:]).norm()).item() == pytest.approx(1e-3)


@pytest.mark.parametrize("kind", ["base", "prior"])
def test_the_yardstick_of_a_fixed_pull_is_a_factor_e_away(kind):
    logits = torch.randn(QUESTIONS, LAYERS, EXPERTS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    live = logits.requires_grad_().softmax(-1)
    targets = NeighborTargets(routing(1), torch.zeros(QUESTIONS), torch.arange(QUESTIONS) > 0)
    scale = yardstick(kind, Regularized(live, targets))
    assert scale is not None
    # d KL(r || q) / dr = log(r / q) + 1, with log(r / q) = 1 or -1.
    (gradient,) = torch.autograd.grad(scale, live)
    assert set(gradient[1:].abs().flatten().round(decimals=9).tolist()) == {0.0, 2.0}
    assert gradient[0].abs().sum() == 0


@pytest.mark.parametrize("kind", ["none", "l1", "l2", "entropy"])
def test_a_term_that_pulls_to_no_routing_has_no_yardstick(kind):
    assert yardstick(kind, Regularized(routing(2))) is None
