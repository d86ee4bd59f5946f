"""Successful neighborhoods against a literal loop."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roma_ray.errors import ConfigError, NeighborError
from roma_ray.manifold import ranking
from roma_ray.manifold.neighborhood_summary import summarise
from roma_ray.manifold.neighbors import successful_set
from roma_ray.manifold.quantiles import quantiles
from roma_ray.manifold.search import TorchSearch, resolve_backend
from tests.manifold import literal
from tests.manifold.finding import assert_same, found

BACKENDS = [
    "torch",
    pytest.param("faiss", marks=pytest.mark.skipif("not __import__('importlib').util.find_spec('faiss')")),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gaussian", "cosine"])
@pytest.mark.parametrize("distinct", [None, 6])
@pytest.mark.parametrize("method", ["knn", "epsilon"])
def test_neighbors_are_those_of_the_literal_loop(backend, kind, distinct, method):
    table = literal.make_table(distinct=distinct)
    epsilon = {"cosine": 0.3, "gaussian": 0.02}[kind]
    got = found(table, method=method, k=3, epsilon=epsilon, similarity=kind, backend=backend, batch_rows=16)
    limits = {"k": 3, "epsilon": None} if method == "knn" else {"k": None, "epsilon": epsilon}
    sizes = []
    for row in range(len(table.ids)):
        indices, similarities, weights = got.of(row)
        expected = literal.neighbors(table, row, kind, 0.4, **limits) if table.training[row] else []
        assert indices.tolist() == expected, f"row {row}"
        sizes.append(len(expected))
        if expected:
            vectors = table.embeddings.double().tolist()
            values = [literal.similarity(vectors[row], vectors[j], kind, 0.4) for j in expected]
            assert similarities.tolist() == pytest.approx(values, abs=1e-12)
            assert weights.tolist() == pytest.approx(literal.weights(values), abs=1e-12)
            assert weights.sum().item() == pytest.approx(1, abs=1e-14)
    assert got.sizes.tolist() == sizes
    assert len(set(sizes)) > 1, "the table should make neighborhoods of several sizes"


@pytest.mark.parametrize("method", ["knn", "epsilon", "random", "task"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_never_itself_never_an_equal_text_only_successes(method, backend):
    table = literal.make_table(rows=120, distinct=5)
    got = found(table, method=method, k=4, epsilon=0.2, backend=backend)
    assert len(got.indices) > 100
    for i, j in zip(got.rows.tolist(), got.indices.tolist(), strict=True):
        assert i != j
        assert table.texts[i] != table.texts[j]
        assert table.successful[j]
        assert table.training[i]


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(5, 90),
    distinct=st.integers(2, 20),
    k=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    block=st.integers(1, 100),
    method=st.sampled_from(["knn", "epsilon", "random", "task"]),
    kind=st.sampled_from(["gaussian", "cosine"]),
    epsilon=st.sampled_from([0.05, 0.2, 0.5]),
)
def test_backends_blocks_and_table_order_give_the_same_bits(rows, distinct, k, seed, block, method, kind, epsilon):
    pytest.importorskip("faiss")
    table = literal.make_table(rows, 6, seed, distinct)
    options = {"method": method, "k": k, "similarity": kind, "epsilon": epsilon, "sigma": 0.9, "seed": seed}
    try:
        one = found(table, **options)
    except NeighborError:
        with pytest.raises(NeighborError):
            found(table, **options, backend="faiss", batch_rows=block)
        return
    assert_same(one, found(table, **options, backend="faiss", batch_rows=block))
    assert_same(one, found(table, **options, backend="torch", batch_rows=block))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    shuffled = literal.Table(
        table.embeddings[order],
        table.successful[order],
        table.training[order],
        [table.ids[row] for row in order.tolist()],
        [table.texts[row] for row in order.tolist()],
    )
    other = found(shuffled, **options)
    for place, row in enumerate(order.tolist()):
        indices, similarities, weights = other.of(place)
        assert torch.equal(order[indices], one.of(row)[0])
        assert torch.equal(similarities, one.of(row)[1])
        assert torch.equal(weights, one.of(row)[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_tables_with_near_ties_agree_with_an_fp64_ranking(backend):
    # Rows a few fp32 roundings apart: an fp32 index orders them at will.
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(30, 384, generator=generator, dtype=torch.float64).repeat_interleave(20, 0)
    table = literal.make_table(rows=600, width=384)
    table.embeddings = base + 1e-5 * torch.randn(600, 384, generator=generator, dtype=torch.float64)
    got = found(table, k=5, backend=backend, batch_rows=128)
    unit = table.embeddings / table.embeddings.norm(dim=1, keepdim=True)
    scores = unit @ unit.T
    scores[:, ~table.successful] = -9
    scores.fill_diagonal_(-9)
    expected = scores.topk(5).indices[table.training]
    assert torch.equal(got.indices.reshape(-1, 5), expected)


@pytest.mark.parametrize("method", ["knn", "epsilon"])
def test_an_imprecise_index_gives_the_same_neighbors(method, monkeypatch):
    table = literal.make_table(rows=300, width=16, distinct=60)
    options = {"method": method, "k": 3, "epsilon": 0.4}
    exact = found(table, **options)

    class Coarse(TorchSearch):
        # As a GPU's TF32 products do: ten bits of mantissa.
        def __init__(self, candidates_MC, device):
            super().__init__(candidates_MC.bfloat16(), device)

    monkeypatch.setattr(ranking, "open_search", lambda unit, backend, device: Coarse(unit, torch.device("cpu")))
    assert_same(found(table, **options), exact)


def test_tiles_of_candidates_join(monkeypatch):
    table = literal.make_table(rows=200, distinct=40)
    whole = [found(table, method=method, epsilon=0.3) for method in ("knn", "epsilon")]
    monkeypatch.setattr("roma_ray.manifold.search.TILE_SCORES", 500)
    for method, expected in zip(("knn", "epsilon"), whole, strict=True):
        assert_same(found(table, method=method, epsilon=0.3), expected)


def test_many_equal_texts_are_fetched_past(monkeypatch):
    # 150 copies of each question's text are nearer than its first permitted neighbor, beyond the first fetch.
    table = literal.make_table(rows=300, width=4, distinct=2, equal_texts=False)
    table.successful = table.training.clone()
    vectors = table.embeddings[:, 0]
    table.texts = [f"{value:.4f}" for value in vectors.tolist()]
    got = found(table, k=3)
    for row in table.training.nonzero()[:, 0].tolist():
        assert len(got.of(row)[0]) == 3
        assert got.of(row)[0].tolist() == literal.neighbors(table, row, "cosine", 1.0, 3, None)


def test_fewer_eligible_than_k():
    table = literal.make_table(rows=20)
    table.successful = torch.zeros(20, dtype=torch.bool)
    table.training[:] = True
    table.successful[[4, 9]] = True
    for method in ("knn", "random"):
        sizes = found(table, method=method, k=5).sizes
        assert sizes[4] == sizes[9] == 1
        assert sizes.sum() == 18 * 2 + 2


def test_queried_rows_may_be_others_than_training_rows():
    table = literal.make_table(rows=80)
    queried = ~table.training
    got = found(table, k=3, queried_N=queried)
    assert torch.equal(got.sizes > 0, queried)
    assert table.training[got.indices].all()


def test_an_epsilon_too_high_is_an_error_with_advice():
    table = literal.make_table(rows=100, width=64)
    with pytest.raises(NeighborError) as caught:
        found(table, method="epsilon", epsilon=0.7, similarity="gaussian", sigma=0.4)
    text = str(caught.value)
    assert "epsilon 0.7 is too high for the gaussian similarity with sigma 0.4" in text
    assert "similarity: cosine" in text
    assert "q50 " in text
    assert str(pickle.loads(pickle.dumps(caught.value))) == text
    with pytest.raises(NeighborError, match="too high for the cosine"):
        found(table, method="epsilon", epsilon=0.99)


def test_almost_all_empty_is_still_allowed_at_ninety_percent():
    table = literal.make_table(rows=10, width=32)
    table.training[:] = True
    table.successful[:] = True
    table.embeddings[1] = table.embeddings[0] * 3
    got = found(table, method="epsilon", epsilon=0.999, queried_N=torch.arange(10) > 0)
    assert got.sizes.tolist() == [0, 1] + [0] * 8
    with pytest.raises(NeighborError):
        found(table, method="epsilon", epsilon=0.999, queried_N=torch.arange(10) > 1)


def test_too_many_pairs_are_refused_before_they_fill_the_memory(monkeypatch):
    monkeypatch.setattr(ranking, "MAX_PAIRS", 100)
    with pytest.raises(NeighborError, match=r"raise epsilon above 0\.01"):
        found(literal.make_table(), method="epsilon", epsilon=0.01)


def test_all_texts_equal_leaves_no_neighbor():
    table = literal.make_table()
    table.texts = ["same"] * len(table.ids)
    with pytest.raises(NeighborError, match="same text"):
        found(table)


def test_successful_questions_must_be_training_questions():
    table = literal.make_table()
    table.training[0] = False
    with pytest.raises(NeighborError, match=table.ids[0]):
        found(table)
    assert not successful_set(table.successful, table.training)[0]
    table.successful[:] = False
    with pytest.raises(NeighborError, match="no question is successful"):
        found(table)
    with pytest.raises(NeighborError, match="none of the"):
        successful_set(table.successful, table.training)


@pytest.mark.parametrize(
    ("option", "word"),
    [
        ({"method": "nearest"}, "knn, epsilon, random, task, shuffled, self"),
        ({"similarity": "dot"}, "gaussian, cosine"),
        ({"k": 0}, "k must"),
        ({"method": "epsilon", "epsilon": 0.0}, "epsilon"),
        ({"method": "epsilon", "epsilon": 1.5}, "epsilon"),
        ({"similarity": "gaussian", "sigma": 0.0}, "sigma"),
        ({"backend": "annoy"}, "auto, faiss, torch"),
        ({"batch_rows": 0}, "batch_rows"),
    ],
)
def test_settings_out_of_range_are_refused(option, word):
    with pytest.raises(ConfigError, match=word):
        found(literal.make_table(), **option)


def test_a_missing_faiss_is_named_and_auto_does_without(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    assert resolve_backend("auto", "cpu")[0] == "torch"
    with pytest.raises(NeighborError, match="set the backend to `torch`"):
        resolve_backend("faiss", "cpu")


def test_summary():
    table = literal.make_table()
    got = found(table, method="epsilon", epsilon=0.7)
    summary = summarise(got)
    sizes = sorted(got.sizes[table.training].tolist())
    assert summary.queried == int(table.training.sum())
    assert summary.empty == sizes.count(0) > 0
    assert summary.empty_fraction == summary.empty / summary.queried
    assert summary.pairs == sum(sizes)
    assert (summary.sizes["q0"], summary.sizes["q100"]) == (sizes[0], sizes[-1])
    assert summary.similarities["q0"] >= 0.7
    assert summary.negative_fraction == 0
    far = summarise(found(table, method="random"))
    assert far.negative_fraction == pytest.approx((found(table, method="random").similarities < 0).double().mean())
    assert far.negative_fraction > 0


def test_quantiles_are_those_of_torch():
    values = torch.randn(501, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    marks = (0.0, 0.1, 0.333, 0.5, 1.0)
    expected = torch.quantile(values, torch.tensor(marks, dtype=torch.float64)).tolist()
    assert list(quantiles(values, marks).values()) == pytest.approx(expected, abs=1e-14)
    assert quantiles(values[:0]) == {}
