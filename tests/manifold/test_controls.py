"""The controls of the neighborhood: drawn successes, dealt-out neighborhoods, a question's own routing."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roma_ray.errors import ConfigError, NeighborError
from roma_ray.manifold import neighbors
from roma_ray.manifold.neighbors import Neighborhoods, derangement, find_neighbors
from tests.manifold import literal
from tests.manifold.finding import assert_same, found


def test_random_is_a_function_of_seed_and_id():
    table = literal.make_table(rows=100)
    one = found(table, method="random", k=5, seed=1)
    assert_same(one, found(table, method="random", k=5, seed=1))
    assert not torch.equal(one.indices, found(table, method="random", k=5, seed=2).indices)
    # Asking for fewer rows changes nobody's draw.
    half = table.training & (torch.arange(100) % 2 == 0)
    part = found(table, method="random", k=5, seed=1, queried_N=half)
    for row in half.nonzero()[:, 0].tolist():
        assert torch.equal(part.of(row)[0], one.of(row)[0])


@pytest.mark.parametrize(("successes", "k"), [(40, 2), (6, 3)])
def test_random_is_uniform_over_other_texts(successes, k):
    rows = 2000
    table = literal.make_table(rows=rows, equal_texts=False)
    table.training[:] = True
    table.successful = torch.arange(rows) < successes
    table.texts[1] = table.texts[0]
    got = found(table, method="random", k=k, seed=3)
    asked = torch.arange(rows) >= successes
    assert (got.sizes == k).all()
    counts = torch.bincount(got.indices[asked[got.rows]], minlength=rows)[:successes].double()
    expected = (rows - successes) * k / successes
    assert ((counts - expected).abs() < 5 * expected**0.5).all()
    for row in range(successes):
        assert got.of(row)[0].unique().numel() == k
        assert row not in got.of(row)[0].tolist()
    assert 0 not in got.of(1)[0].tolist()


@pytest.mark.parametrize(("per_task", "k"), [(40, 2), (6, 3)])
def test_task_is_uniform_over_other_texts_of_the_own_task(per_task, k):
    """`k` far below and near the number of the task's successes: two ways to draw."""
    rows = 3000
    table = literal.make_table(rows=rows, equal_texts=False)
    table.training[:] = True
    tasks = torch.tensor([int(name.split()[1]) for name in table.tasks])
    table.successful = torch.zeros(rows, dtype=torch.bool)
    for task in (0, 1):
        table.successful[(tasks == task).nonzero()[:per_task, 0]] = True
    first, second = table.successful.nonzero()[:, 0][tasks[table.successful] == 0][:2].tolist()
    table.texts[second] = table.texts[first]
    got = found(table, method="task", k=k, seed=3)
    # The third task has no success, hence no neighbors.
    assert got.sizes.tolist() == [0 if task == 2 else k for task in tasks.tolist()]
    assert torch.equal(tasks[got.indices], tasks[got.rows])
    assert first not in got.of(second)[0].tolist()
    for row in (tasks < 2).nonzero()[:, 0].tolist():
        assert got.of(row)[0].unique().numel() == k
        assert row not in got.of(row)[0].tolist()
    counts = torch.bincount(got.indices[~table.successful[got.rows]], minlength=rows).double()
    for task in (0, 1):
        expected = ((tasks == task).sum() - per_task) * k / per_task
        drawn = counts[table.successful & (tasks == task)]
        assert ((drawn - expected).abs() < 5 * expected**0.5).all()
    assert not torch.equal(got.indices, found(table, method="task", k=k, seed=4).indices)


def test_where_all_are_of_one_task_task_is_random():
    table = literal.make_table(rows=80, distinct=20)
    options = {**table.columns, "similarity": "cosine", "sigma": 0.4, "k": 4, "seed": 5}
    random, task = (
        find_neighbors(table.embeddings, table.successful, **{**options, "method": method, "tasks": ["one"] * 80})
        for method in ("random", "task")
    )
    assert_same(random, task)


def test_tasks_without_another_success_are_refused():
    table = literal.make_table(rows=60)
    settings_ = {"method": "task", "similarity": "cosine", "sigma": 0.4}
    with pytest.raises(NeighborError, match="their tasks have no successful question of another text"):
        find_neighbors(table.embeddings, table.successful, **{**table.columns, "tasks": table.ids}, **settings_)
    for tasks in (None, table.tasks[1:]):
        with pytest.raises(ConfigError, match="needs `tasks`"):
            find_neighbors(table.embeddings, table.successful, **{**table.columns, "tasks": tasks}, **settings_)


@pytest.mark.parametrize("method", ["random", "task"])
def test_drawn_neighbors_are_weighted_by_similarity(method):
    table = literal.make_table(rows=40)
    got = found(table, method=method, k=4, similarity="gaussian")
    vectors = table.embeddings.double().tolist()
    for row in table.training.nonzero()[:, 0].tolist():
        indices, _, weights = got.of(row)
        values = [literal.similarity(vectors[row], vectors[j], "gaussian", 0.4) for j in indices.tolist()]
        assert weights.tolist() == pytest.approx(literal.weights(values), abs=1e-12)


@pytest.mark.parametrize(("rows", "distinct"), [(60, None), (60, 12), (30, None)])
@pytest.mark.parametrize("seed", [0, 1])
def test_shuffled_is_another_questions_neighborhood_with_its_sizes_and_weights(rows, distinct, seed):
    table = literal.make_table(rows=rows, distinct=distinct)
    near, got = (
        found(table, k=4, similarity="gaussian"),
        found(table, method="shuffled", k=4, similarity="gaussian", seed=seed),
    )
    asked = table.training.nonzero()[:, 0].tolist()

    def member(neighborhoods: Neighborhoods, row: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        indices, _, weights = neighborhoods.of(row)
        return tuple(indices.tolist()), tuple(weights.tolist())

    # Every neighborhood is dealt once, whole; nobody has one of its own text's, nor itself in it.
    assert sorted(member(got, row) for row in asked) == sorted(member(near, row) for row in asked)
    vectors = table.embeddings.double().tolist()
    for row in asked:
        own = [other for other in asked if table.texts[other] == table.texts[row]]
        assert not set(got.of(row)[0].tolist()) & set(own)
        givers = [other for other in asked if member(near, other) == member(got, row)]
        assert set(givers) - set(own)
        values = [literal.similarity(vectors[row], vectors[j], "gaussian", 0.4) for j in got.of(row)[0].tolist()]
        assert got.of(row)[1].tolist() == pytest.approx(values, abs=1e-12)
    moved = [row for row in asked if member(got, row) != member(near, row)]
    assert len(moved) > 0.8 * len(asked)
    assert got.sizes[~table.training].sum() == 0


def test_neighborhoods_of_any_size_are_dealt_whole():
    sizes = torch.tensor([2, 0, 3, 1, 0, 0])
    queried = torch.tensor([True, True, True, True, False, False])
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    weights = torch.tensor([0.7, 0.3, 0.2, 0.5, 0.3, 1.0], dtype=torch.float64)
    near = Neighborhoods(offsets, torch.tensor([4, 5, 5, 4, 0, 2]), weights.clone(), weights, queried)
    # In the order 3, 2, 1, 0 everyone would get the next one's: 3 that of 2, 2 that of 1, 1 that of 0, 0 that of 3.
    got = neighbors._dealt(near, torch.arange(6), [4, 3, 2, 1, 9, 9])
    assert got.sizes.tolist() == [1, 2, 0, 3, 0, 0]
    for row, giver in {3: 2, 2: 1, 1: 0, 0: 3}.items():
        for ours, theirs in zip(got.of(row), near.of(giver), strict=True):
            assert torch.equal(ours, theirs)
    # In the order 2, 0, 3, 1 question 0 would get 3's, which holds it; 3 cannot have its own, so 0 changes with 1.
    other = neighbors._dealt(
        replace(near, indices=torch.tensor([4, 5, 5, 4, 3, 0])), torch.arange(6), [1, 3, 0, 2, 9, 9]
    )
    assert {row: other.of(row)[0].tolist() for row in range(4)} == {2: [4, 5], 0: [5, 4, 3], 3: [], 1: [0]}


def test_shuffled_is_a_function_of_seed_and_ids():
    table = literal.make_table(rows=100)
    one = found(table, method="shuffled", seed=1)
    assert_same(one, found(table, method="shuffled", seed=1))
    assert not torch.equal(one.indices, found(table, method="shuffled", seed=2).indices)


def test_what_cannot_be_shuffled_is_refused():
    # Either success is the other's only neighbor: neither neighborhood can go to anyone but its owner.
    table = literal.make_table(rows=20, equal_texts=False)
    table.training = torch.arange(20) < 2
    table.successful = table.training.clone()
    with pytest.raises(NeighborError, match="2 question\\(s\\) cannot be shuffled"):
        found(table, method="shuffled")
    # One question with a neighbor among training questions has nobody to change with.
    alone = torch.arange(20) == 5
    assert found(table, queried_N=alone).sizes[5] == 2
    with pytest.raises(NeighborError, match="1 question\\(s\\) cannot be shuffled"):
        found(table, method="shuffled", queried_N=alone)
    table.successful[:] = False
    for method in ("shuffled", "self"):
        with pytest.raises(NeighborError, match="no question is successful"):
            found(table, method=method)


@given(count=st.integers(0, 7), seed=st.integers(0, 10_000), share=st.sampled_from([0.3, 0.6, 0.9, 1.0]))
def test_a_derangement_fits_throughout(count, seed, share):
    generator = torch.Generator().manual_seed(seed)
    allowed = (torch.rand(count, count, generator=generator) < share).fill_diagonal_(False).tolist()
    order = torch.randperm(count, generator=generator).tolist()
    got = derangement(order, lambda item, image: allowed[item][image])
    if got is None:
        # Swaps may miss what a search over all permutations finds, but not where everything but the item itself fits.
        assert share < 1 or count == 1
        return
    assert sorted(got) == sorted(got.values()) == list(range(count))
    assert all(allowed[item][image] for item, image in got.items())


def test_self_is_every_queried_question_alone():
    table = literal.make_table(rows=40)
    queried = torch.arange(40) % 3 == 0
    for asked in (None, queried):
        got = found(table, method="self", k=7, queried_N=asked)
        mask = table.training if asked is None else asked
        assert torch.equal(got.queried, mask)
        for row in range(40):
            indices, similarities, weights = got.of(row)
            assert indices.tolist() == ([row] if mask[row] else [])
            assert similarities.tolist() == weights.tolist() == [1.0] * len(indices)
    alone = found(table, method="self", queried_N=torch.arange(40) == 5)
    assert alone.indices.tolist() == [5]
