import pytest
import torch
import torch.nn.functional as F

from roma_ray.errors import NeighborError
from roma_ray.manifold import losses
from roma_ray.manifold.losses import (
    NeighborTargets,
    manifold_kl,
    manifold_loss,
    neighbor_targets,
    position_targets,
    pulled,
)
from roma_ray.manifold.neighbors import Neighborhoods, find_neighbors
from tests.manifold import literal

QUESTIONS, LAYERS, EXPERTS = 14, 3, 5


def ragged(sizes: list[int], seed: int = 0) -> Neighborhoods:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.cat([torch.randperm(len(sizes), generator=generator)[:size] for size in sizes])
    raw = torch.rand(len(indices), generator=generator, dtype=torch.float64) + 0.01
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    weights = torch.cat([part / part.sum() for part in raw.split(sizes)])
    return Neighborhoods(offsets, indices, raw, weights, torch.ones(len(sizes), dtype=torch.bool))


SIZES = [3, 0, 1, 5, 3, 0, 14, 2, 3, 3, 1, 0, 9, 3]


def routing(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(QUESTIONS, LAYERS, EXPERTS, generator=generator, dtype=torch.float64).softmax(-1).to(dtype)


def pairs(neighborhoods: Neighborhoods) -> list[list[tuple[int, float]]]:
    own = [neighborhoods.of(row) for row in range(QUESTIONS)]
    return [list(zip(indices.tolist(), weights.tolist(), strict=True)) for indices, _, weights in own]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_manifold_loss_and_gradient_are_the_literal_double_loop(dtype, tolerance):
    neighborhoods, stored = ragged(SIZES), routing(1, dtype)
    live = routing(2, dtype).requires_grad_()
    targets = neighbor_targets(neighborhoods, stored)
    assert targets.mean.dtype == targets.spread.dtype == dtype
    loss = manifold_loss(live, targets)
    (gradient,) = torch.autograd.grad(loss, live)
    exact = live.detach().double().requires_grad_()
    expected = literal.manifold(exact, stored.double(), pairs(neighborhoods))
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_the_kl_and_its_gradient_are_the_literal_loop(dtype, tolerance):
    neighborhoods, stored = ragged(SIZES), routing(1, dtype)
    stored[:, 1, 2] = 0  # an expert that nobody takes in a layer
    logits = torch.randn(QUESTIONS, LAYERS, EXPERTS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    live = logits.to(dtype).requires_grad_()
    loss = manifold_kl(live.softmax(-1), neighbor_targets(neighborhoods, stored))
    (gradient,) = torch.autograd.grad(loss, live)
    exact = logits.clone().requires_grad_()
    expected = literal.manifold_kl(exact.softmax(-1), stored.double(), pairs(neighborhoods))
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance)


def test_the_gradient_of_the_kl_in_the_logits_is_r_minus_m_layer_by_layer():
    targets = neighbor_targets(ragged(SIZES), routing(1))
    logits = torch.randn(QUESTIONS, LAYERS, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    logits.requires_grad_()
    live = logits.softmax(-1)
    (gradient,) = torch.autograd.grad(manifold_kl(live, targets), logits)
    expected = torch.where(targets.present[:, None, None], live.detach() - targets.mean, 0)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_near_a_corner_the_squared_distance_starves_and_the_kl_does_not():
    mean = torch.tensor([[[0.3, 0.7, 0.0]]])
    targets = NeighborTargets(mean, torch.zeros(1), torch.tensor([True]))
    logits = torch.tensor([[[20.0, 0.0, 0.0]]], requires_grad=True)
    squared, kl = (
        torch.autograd.grad(distance(logits.softmax(-1), targets), logits)[0]
        for distance in (manifold_loss, manifold_kl)
    )
    assert squared.abs().max() < 1e-6
    torch.testing.assert_close(kl, torch.tensor([[[0.7, -0.7, 0.0]]]), rtol=1e-5, atol=1e-5)
    # Where the other probability underflowed both are finite.
    gone = torch.tensor([[[200.0, 0.0, 0.0]]], requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(manifold_kl(gone.softmax(-1), targets), gone)[0]).all()


def test_the_kl_is_zero_at_the_mean_row_and_for_empty_neighborhoods():
    targets = neighbor_targets(ragged(SIZES), routing(1))
    assert manifold_kl(targets.mean.clone(), targets).item() == pytest.approx(0, abs=1e-14)
    nothing = neighbor_targets(ragged([0] * QUESTIONS), routing(1))
    live = routing(2).requires_grad_()
    loss = manifold_kl(live, nothing)
    assert loss == 0
    assert torch.autograd.grad(loss, live)[0].abs().sum() == 0


def test_the_neighbors_mean_row_serves_the_kl_up_to_a_constant():
    """sum_j W_ij KL(r_j || r_i) has the gradient of KL(m_i || r_i), whatever k is."""
    neighborhoods, stored, live = ragged(SIZES), routing(1), routing(2).requires_grad_()
    total = live.new_zeros(())
    for i, own in enumerate(pairs(neighborhoods)):
        for j, weight in own:
            total = total + weight * (stored[j] * (stored[j].log() - live[i].log())).sum()
    (expected,) = torch.autograd.grad(total, live)
    (got,) = torch.autograd.grad(manifold_kl(live, neighbor_targets(neighborhoods, stored)), live)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "distance"), [("squared", manifold_loss), ("kl", manifold_kl)])
def test_a_pull_at_each_position_is_the_literal_loop_over_positions(name, distance):
    neighborhoods, positions = ragged(SIZES), 4
    generator = torch.Generator().manual_seed(7)
    present = torch.rand(QUESTIONS, positions, generator=generator) < 0.6
    present[:, 3] = torch.arange(QUESTIONS) == 6  # one question has a place that no neighbor but itself has
    shape = (QUESTIONS, positions, LAYERS, EXPERTS)
    stored, live = (torch.randn(shape, generator=generator, dtype=torch.float64).softmax(-1) for _ in range(2))
    stored, live = (rows.masked_fill(~present[:, :, None, None], 0.0) for rows in (stored, live))
    live.requires_grad_()
    expected, used = live.new_zeros(()), 0
    for place in range(positions):
        for i, own in enumerate(pairs(neighborhoods)):
            having = [(j, weight) for j, weight in own if present[j, place]]
            if not present[i, place] or not having:
                continue
            used += 1
            total = sum(weight for _, weight in having)
            shared = [(j, weight / total) for j, weight in having]
            loop = literal.manifold if name == "squared" else literal.manifold_kl
            expected = expected + loop(live[i : i + 1, place], stored[:, place], [shared])
    assert 0 < used < int(present.sum())
    targets = position_targets(neighborhoods, stored, present)
    loss = distance(pulled(live, targets), targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (gradient,), (wanted,) = (torch.autograd.grad(x, live, retain_graph=True) for x in (loss, expected))
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_a_pull_at_the_only_position_is_eq_7():
    neighborhoods, stored, live = ragged(SIZES), routing(1), routing(2)
    targets = neighbor_targets(neighborhoods, stored)
    each = position_targets(neighborhoods, stored[:, None], torch.ones(QUESTIONS, 1, dtype=torch.bool))
    torch.testing.assert_close(manifold_loss(pulled(live[:, None], each), each), manifold_loss(live, targets))
    torch.testing.assert_close(each.mean, targets.mean)


def test_each_question_of_a_batch_gets_its_own_term():
    neighborhoods, stored, live = ragged(SIZES), routing(1), routing(2)
    targets = neighbor_targets(neighborhoods, stored)
    for row in range(QUESTIONS):
        batch = torch.tensor([row])
        one = [pairs(neighborhoods)[row]]
        expected = literal.manifold(live[batch], stored, one)
        torch.testing.assert_close(manifold_loss(live[batch], targets.take(batch)), expected, rtol=1e-12, atol=1e-14)
    batch = torch.tensor([6, 1, 12, 6])
    whole = manifold_loss(live[batch], targets.take(batch))
    parts = sum(manifold_loss(live[[row]], targets.take(torch.tensor([row]))) for row in batch.tolist())
    torch.testing.assert_close(whole, parts)


def test_manifold_gradient_by_gradcheck():
    targets = neighbor_targets(ragged(SIZES), routing(1))
    live = routing(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: manifold_loss(r, targets), (live,))


def test_gradient_reaches_every_layer_and_no_neighbor():
    neighborhoods = ragged(SIZES)
    stored = routing(1).requires_grad_()
    logits = torch.randn(QUESTIONS, LAYERS, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    logits.requires_grad_()
    targets = neighbor_targets(neighborhoods, stored)
    assert not targets.mean.requires_grad
    assert not targets.spread.requires_grad
    manifold_loss(logits.softmax(-1), targets).backward()
    assert stored.grad is None
    norms = logits.grad.norm(dim=-1)
    present = neighborhoods.sizes > 0
    assert (norms[present] > 1e-4).all()
    assert (norms[~present] == 0).all()


def test_an_empty_neighborhood_gives_zero_and_is_counted():
    targets = neighbor_targets(ragged(SIZES), routing(1))
    empty = torch.tensor([1, 5, 11])
    batch = targets.take(empty)
    assert int((~batch.present).sum()) == 3
    assert manifold_loss(routing(2)[empty], batch) == 0
    assert int((~targets.present).sum()) == 3
    nothing = neighbor_targets(ragged([0] * QUESTIONS), routing(1))
    assert manifold_loss(routing(2), nothing) == 0


def test_spread_stays_exact_where_neighbors_are_nearly_equal():
    # In fp32, s_i - ||m_i||^2 of rows 1e-5 apart would be rounding noise, half of it negative.
    base = routing(1)[:1].repeat(QUESTIONS, 1, 1)
    stored = (base + 1e-5 * (routing(2) - routing(3))).float()
    neighborhoods = ragged(SIZES)
    targets = neighbor_targets(neighborhoods, stored)
    for row, own in enumerate(pairs(neighborhoods)):
        rows = stored.double()
        mean = sum((weight * rows[j] for j, weight in own), torch.zeros(LAYERS, EXPERTS, dtype=torch.float64))
        expected = sum(weight * float((rows[j] - mean).square().sum()) for j, weight in own)
        assert targets.spread[row].item() == pytest.approx(expected, rel=1e-4, abs=1e-15)
        assert targets.spread[row] >= 0


def test_targets_do_not_depend_on_the_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 60, (500,), generator=generator).tolist()
    neighborhoods = ragged(sizes)
    stored = torch.rand(500, 2, 16, generator=generator)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = neighbor_targets(neighborhoods, stored)
        torch.set_num_threads(2)
        two = neighbor_targets(neighborhoods, stored)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.mean, two.mean)
    assert torch.equal(one.spread, two.spread)


def whole_targets(neighborhoods: Neighborhoods, stored: torch.Tensor) -> NeighborTargets:
    """All questions at once, layer by layer."""

    def weighted(rows: torch.Tensor) -> torch.Tensor:
        bags = {"mode": "sum", "per_sample_weights": neighborhoods.weights, "include_last_offset": True}
        return F.embedding_bag(neighborhoods.indices, rows, neighborhoods.offsets, **bags)

    mean, spread = torch.zeros_like(stored), torch.zeros(len(stored), dtype=torch.float64)
    for layer in range(stored.shape[1]):
        rows = stored[:, layer].double()
        own = weighted(rows)
        mean[:, layer] = own.to(stored.dtype)
        square = weighted(rows.square().sum(1, keepdim=True))[:, 0]
        spread += (square - own.square().sum(1)).clamp_min(0)
    return NeighborTargets(mean, spread.to(stored.dtype), neighborhoods.sizes > 0)


def assert_same(one: NeighborTargets, other: NeighborTargets) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)


@pytest.mark.parametrize("pairs_held", [1, 7, 64, 1000, 10**6])
@pytest.mark.parametrize("kind", ["few", "dense", "mixed", "none"])
def test_targets_have_the_bits_of_all_questions_at_once(monkeypatch, kind, pairs_held):
    monkeypatch.setattr(losses, "_BLOCK_PAIRS", pairs_held)
    generator = torch.Generator().manual_seed(1)
    low, high = {"few": (0, 4), "dense": (150, 200), "mixed": (0, 200), "none": (0, 1)}[kind]
    sizes = torch.randint(low, high, (200,), generator=generator)
    if kind == "mixed":
        sizes[torch.rand(200, generator=generator) < 0.5] = 0
        sizes[-3:] = 0
    neighborhoods = ragged(sizes.tolist())
    stored = torch.rand(200, 3, 37, generator=generator)
    assert_same(neighbor_targets(neighborhoods, stored), whole_targets(neighborhoods, stored))
    present = torch.rand(200, 2, generator=generator) < 0.8
    by_place = [whole_targets(losses._having(neighborhoods, present[:, n]), stored[:, n : n + 2]) for n in (0, 1)]
    places = torch.stack([stored[:, :2], stored[:, 1:]], dim=1)
    expected = NeighborTargets(
        torch.cat([one.mean for one in by_place], dim=1),
        by_place[0].spread + by_place[1].spread,
        by_place[0].present | by_place[1].present,
    )
    assert_same(position_targets(neighborhoods, places, present), expected)


@pytest.mark.parametrize("pairs_held", [1, 10**6])
def test_the_first_row_with_a_neighbor_that_is_not_finite_is_named_whatever_the_blocks(monkeypatch, pairs_held):
    monkeypatch.setattr(losses, "_BLOCK_PAIRS", pairs_held)
    stored, neighborhoods = routing(1), ragged(SIZES)
    stored[neighborhoods.of(3)[0][2], 2, 1] = float("inf")
    first = min(row for row in range(QUESTIONS) if not torch.isfinite(stored[neighborhoods.of(row)[0]]).all())
    with pytest.raises(NeighborError, match=f"question row {first} "):
        neighbor_targets(neighborhoods, stored)


def test_targets_lie_where_the_caller_wants_them():
    made = []

    def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        made.append(torch.zeros(shape, dtype=dtype))
        return made[-1]

    stored, neighborhoods = routing(1), ragged(SIZES)
    targets = neighbor_targets(neighborhoods, stored, zeros)
    assert targets.mean is made[0]
    everywhere = torch.ones(QUESTIONS, 2, dtype=torch.bool)
    targets = position_targets(neighborhoods, stored[:, None].expand(-1, 2, -1, -1), everywhere, zeros)
    assert (len(made), targets.mean.data_ptr()) == (2, made[1].data_ptr())


def test_from_embeddings_to_the_loss():
    table = literal.make_table(rows=QUESTIONS)
    table.training[:] = True
    neighborhoods = find_neighbors(
        table.embeddings, table.successful, **table.columns, similarity="gaussian", sigma=0.4, backend="torch"
    )
    vectors = table.embeddings.double().tolist()
    listed = []
    for row in range(QUESTIONS):
        own = literal.neighbors(table, row, "gaussian", 0.4, 3, None)
        values = [literal.similarity(vectors[row], vectors[j], "gaussian", 0.4) for j in own]
        listed.append(list(zip(own, literal.weights(values), strict=True)))
    expected = literal.manifold(routing(2), routing(1), listed)
    torch.testing.assert_close(manifold_loss(routing(2), neighbor_targets(neighborhoods, routing(1))), expected)


def test_a_routing_row_that_is_not_finite_is_refused_only_where_it_is_a_neighbor():
    neighborhoods = ragged([2, *([0] * (QUESTIONS - 1))])
    used = neighborhoods.indices.tolist()
    stored = routing(1)
    stored[next(row for row in range(QUESTIONS) if row not in used)] = float("nan")
    neighbor_targets(neighborhoods, stored)
    stored[used[1], 2, 0] = float("nan")
    with pytest.raises(NeighborError, match="row 0"):
        neighbor_targets(neighborhoods, stored)


def test_shapes_that_do_not_fit_are_bugs():
    targets = neighbor_targets(ragged(SIZES), routing(1))
    with pytest.raises(AssertionError):
        manifold_loss(routing(2)[:3], targets)
