import itertools
import math

import pytest
import torch

from roma_ray.errors import ConfigError
from roma_ray.manifold.diagnostics import (
    expert_load,
    neighbor_distances,
    neighbor_overlap,
    routing_entropy,
    routing_kl,
    selection_overlap,
    silhouette,
    top_k_selection,
    with_random_members,
)
from roma_ray.manifold.losses import manifold_loss, neighbor_targets
from roma_ray.manifold.neighbors import Neighborhoods

QUESTIONS, LAYERS, EXPERTS, TOP_K = 9, 2, 6, 2


def routing(seed: int, rows: int = QUESTIONS) -> torch.Tensor:
    return torch.randn(rows, LAYERS, EXPERTS, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_entropy_is_the_literal_loop():
    r = routing(0)
    for layer in range(LAYERS):
        rows = r[:, layer].double().tolist()
        expected = sum(-sum(p * math.log(p) for p in row) for row in rows) / QUESTIONS
        assert routing_entropy(r)[layer].item() == pytest.approx(expected)
    one_hot = torch.eye(EXPERTS).unsqueeze(1)
    assert routing_entropy(one_hot).tolist() == [0]
    assert routing_entropy(torch.full((2, 1, 8), 1 / 8)).item() == pytest.approx(math.log(8))


def test_selection_and_load_are_the_literal_loop():
    r = routing(1)
    selected = top_k_selection(r, TOP_K)
    counts = [[0] * EXPERTS for _ in range(LAYERS)]
    for i, layer in itertools.product(range(QUESTIONS), range(LAYERS)):
        row = r[i, layer].tolist()
        best = sorted(range(EXPERTS), key=lambda e: (-row[e], e))[:TOP_K]
        assert selected[i, layer].tolist() == best
        for expert in best:
            counts[layer][expert] += 1
    load = expert_load(selected, EXPERTS)
    assert load.tolist() == [[count / (QUESTIONS * TOP_K) for count in row] for row in counts]
    torch.testing.assert_close(load.sum(1), torch.ones(LAYERS, dtype=torch.float64))


def test_selection_breaks_ties_by_expert_number():
    assert top_k_selection(torch.full((1, 1, 40), 1 / 40), 3).tolist() == [[[0, 1, 2]]]


def test_kl_is_the_literal_loop():
    tuned, base = routing(2), routing(3)
    for layer in range(LAYERS):
        expected = 0.0
        for row_p, row_q in zip(tuned[:, layer].double().tolist(), base[:, layer].double().tolist(), strict=True):
            expected += sum(p * math.log(p / q) for p, q in zip(row_p, row_q, strict=True)) / QUESTIONS
        assert routing_kl(tuned, base)[layer].item() == pytest.approx(expected)
    assert routing_kl(tuned, tuned).tolist() == [0, 0]
    sharp = torch.tensor([[[1.0, 0.0]]])
    assert routing_kl(sharp, torch.tensor([[[0.5, 0.5]]])).item() == pytest.approx(math.log(2))
    assert math.isfinite(routing_kl(torch.tensor([[[0.5, 0.5]]]), sharp).item())


def test_selection_overlap_is_the_literal_loop():
    a, b = top_k_selection(routing(4), 3), top_k_selection(routing(5), 3)
    for layer in range(LAYERS):
        shared = [len(set(a[i, layer].tolist()) & set(b[i, layer].tolist())) / 3 for i in range(QUESTIONS)]
        assert selection_overlap(a, b)[layer].item() == pytest.approx(sum(shared) / QUESTIONS)
    assert selection_overlap(a, a.flip(-1)).tolist() == [1, 1]


def literal_nearest(points: list[list[float]], row: int, k: int, groups: list[str]) -> set[int]:
    scored = [
        (math.dist(points[row], points[other]), other) for other in range(len(points)) if groups[other] != groups[row]
    ]
    return {other for _, other in sorted(scored)[:k]}


@pytest.mark.parametrize("repeated", [False, True])
def test_neighbor_overlap_is_the_literal_loop(repeated, monkeypatch):
    rows, k = 40, 3
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, 5, generator=generator)
    if repeated:
        # Rows of equal text lie side by side, so that counting them as neighbors would show.
        a[1::2] = a[::2] + 0.01 * a[1::2]
    b = torch.cat([a, 0.5 * torch.randn(rows, 3, generator=generator)], dim=1).reshape(rows, 2, 4)
    groups = [f"text {row // 2 if repeated else row}" for row in range(rows)]
    expected_jaccard = expected_recall = 0.0
    flat_a, flat_b = a.double().tolist(), b.flatten(1).double().tolist()
    for row in range(rows):
        near_a, near_b = literal_nearest(flat_a, row, k, groups), literal_nearest(flat_b, row, k, groups)
        expected_jaccard += len(near_a & near_b) / len(near_a | near_b) / rows
        expected_recall += len(near_a & near_b) / k / rows
    overlap = neighbor_overlap(a, b, k, groups if repeated else None)
    assert overlap.jaccard == pytest.approx(expected_jaccard)
    assert overlap.recall == pytest.approx(expected_recall)
    assert overlap.chance == pytest.approx(k / (rows - (2 if repeated else 1)))
    monkeypatch.setattr("roma_ray.manifold.diagnostics._BLOCK_DISTANCES", 100)
    assert neighbor_overlap(a, b, k, groups if repeated else None) == overlap


def test_neighbor_overlap_of_a_space_with_itself_and_with_noise():
    generator = torch.Generator().manual_seed(7)
    a, noise = torch.randn(300, 8, generator=generator), torch.randn(300, 8, generator=generator)
    assert neighbor_overlap(a, 2 * a + 1, 5).recall == 1
    far = neighbor_overlap(a, noise, 5)
    assert far.recall == pytest.approx(far.chance, abs=0.02)
    with pytest.raises(ConfigError, match="more than 5"):
        neighbor_overlap(a[:5], a[:5], 5)
    with pytest.raises(ConfigError):
        neighbor_overlap(a, a, 3, ["same"] * 300)


def test_silhouette_is_the_literal_loop_and_draws_by_the_generator():
    generator = torch.Generator().manual_seed(8)
    tasks = ["one", "two", "three"] * 10
    points = torch.randn(30, 4, generator=generator) + torch.tensor([[0.0], [3.0], [6.0]]).repeat(10, 1)
    values = []
    listed = points.double().tolist()
    for i in range(30):
        mean = {
            task: sum(math.dist(listed[i], listed[j]) for j in range(30) if tasks[j] == task and j != i)
            / (10 - (task == tasks[i]))
            for task in set(tasks)
        }
        own, other = mean[tasks[i]], min(value for task, value in mean.items() if task != tasks[i])
        values.append((other - own) / max(own, other))
    seeded = torch.Generator
    assert silhouette(points, tasks, seeded().manual_seed(0)) == pytest.approx(sum(values) / 30)
    part = silhouette(points, tasks, seeded().manual_seed(1), max_rows=12)
    assert part == silhouette(points, tasks, seeded().manual_seed(1), max_rows=12)
    assert part != silhouette(points, tasks, seeded().manual_seed(2), max_rows=12)
    assert silhouette(points, ["one"] * 30, generator) is None
    assert silhouette(points, [str(i) for i in range(30)], generator) is None


def neighborhoods_of(lists):
    sizes = torch.tensor([len(one) for one in lists])
    return Neighborhoods(
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]),
        indices=torch.tensor([j for one in lists for j in one]),
        similarities=torch.ones(int(sizes.sum()), dtype=torch.float64),
        weights=torch.tensor([1 / len(one) for one in lists for _ in one], dtype=torch.float64),
        queried=torch.ones(len(lists), dtype=torch.bool),
    )


def test_neighbor_distances_are_eq_7_with_live_and_stored_rows():
    """Also against the form that training computes: the distance to the mean target, and the spread."""
    stored, live = routing(9), routing(10)
    near = neighborhoods_of([[1, 2], [0], [4, 5, 6], [0, 1], [2], [6], [7, 8], [8], [0]])
    rows = [0, 2, 3, 8]
    found = neighbor_distances(live[rows], rows, stored, near)
    for n, row in enumerate(rows):
        others, _, weights = near.of(row)
        literal = sum(
            float(w)
            * sum((x - y) ** 2 for x, y in zip(live[row].flatten().tolist(), stored[j].flatten().tolist(), strict=True))
            for j, w in zip(others.tolist(), weights.tolist(), strict=True)
        )
        assert float(found[n]) == pytest.approx(literal, rel=1e-6)
    targets = neighbor_targets(near, stored).take(torch.tensor(rows))
    trained = manifold_loss(live[rows], targets)
    assert float(found.sum()) == pytest.approx(float(trained), rel=1e-5)


def test_the_control_draws_from_s_and_never_the_question_itself():
    near = neighborhoods_of([[1, 2], [0], [1, 2, 0]] * 20)
    successful = torch.zeros(60, dtype=torch.bool)
    successful[[0, 1, 2]] = True
    control = with_random_members(near, successful, torch.Generator().manual_seed(0))
    assert torch.equal(control.offsets, near.offsets)
    assert torch.equal(control.weights, near.weights)
    assert set(control.indices.tolist()) == {0, 1, 2}
    assert not (control.indices == control.rows).any()
    again = with_random_members(near, successful, torch.Generator().manual_seed(0))
    assert torch.equal(control.indices, again.indices)
