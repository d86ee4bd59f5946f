import math

import psutil
import pytest
import torch

from roma_ray.errors import ConfigError, EmbeddingError
from roma_ray.manifold import similarity as similarity_module
from roma_ray.manifold.similarity import (
    UnitRows,
    adjacency_weights,
    cosine_at,
    gaussian_similarity,
    similarity_of_cosines,
)
from tests.manifold import literal


@pytest.mark.parametrize("kind", ["gaussian", "cosine"])
def test_similarity_of_pairs_is_the_formula(kind):
    table = literal.make_table(rows=12)
    unit = UnitRows(table.embeddings)
    rows = torch.arange(12).repeat_interleave(12)
    others = torch.arange(12).repeat(12)
    values = similarity_of_cosines(unit.cosines(rows, others), kind, 0.4)
    vectors = table.embeddings.double().tolist()
    expected = [literal.similarity(vectors[i], vectors[j], kind, 0.4) for i in range(12) for j in range(12)]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=1e-13)


def test_gaussian_is_eq_5_elementwise():
    squares = torch.tensor([0.0, 0.5, 2.0, 4.0])
    expected = [math.exp(-s / (2 * 0.3**2)) for s in squares.tolist()]
    torch.testing.assert_close(gaussian_similarity(squares, 0.3), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["gaussian", "cosine"])
@pytest.mark.parametrize("epsilon", [0.01, 0.3, 0.7, 1.0])
def test_cosine_at_inverts_the_similarity(kind, epsilon):
    cosine = torch.tensor(cosine_at(epsilon, kind, 0.4), dtype=torch.float64)
    assert similarity_of_cosines(cosine, kind, 0.4).item() == pytest.approx(epsilon, abs=1e-13)


def test_the_bits_of_a_pair_do_not_depend_on_the_others():
    table = literal.make_table(rows=400, width=97)
    unit = UnitRows(table.embeddings)
    rows, others = torch.arange(400), torch.arange(400).flip(0)
    whole = unit.cosines(rows, others)
    for part in (torch.tensor([3]), torch.tensor([399, 0, 17]), torch.arange(1, 400, 7)):
        assert torch.equal(unit.cosines(rows[part], others[part]), whole[part])


def test_chunks_of_pairs_join(monkeypatch):
    table = literal.make_table(rows=50)
    rows, others = torch.arange(50), torch.arange(50).flip(0)
    whole = UnitRows(table.embeddings).cosines(rows, others)
    monkeypatch.setattr("roma_ray.manifold.similarity._PAIRS_AT_ONCE", 7)
    assert torch.equal(UnitRows(table.embeddings).cosines(rows, others), whole)


def test_adjacency_is_eq_6():
    sizes = torch.tensor([3, 0, 1, 2])
    cosines = torch.tensor([0.9, 0.5, 0.1, 0.3, 0.7, 0.2], dtype=torch.float64)
    for kind in ("cosine", "gaussian"):
        values = similarity_of_cosines(cosines, kind, 0.4).tolist()
        expected = literal.weights(values[:3]) + literal.weights(values[3:4]) + literal.weights(values[4:])
        weights = adjacency_weights(cosines, sizes, kind, 0.4)
        torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)


def test_negative_cosines_weigh_nothing_and_only_negative_ones_weigh_equally():
    cosines = torch.tensor([0.5, 0.25, -0.4, -0.1, -0.2], dtype=torch.float64)
    weights = adjacency_weights(cosines, torch.tensor([3, 2]), "cosine", 1.0)
    torch.testing.assert_close(weights, torch.tensor([2 / 3, 1 / 3, 0, 0.5, 0.5], dtype=torch.float64))


def test_a_narrow_gaussian_does_not_divide_zero_by_zero():
    cosines = torch.tensor([0.2, 0.2, -0.9], dtype=torch.float64)
    assert (similarity_of_cosines(cosines, "gaussian", 0.01) == 0).all()
    weights = adjacency_weights(cosines, torch.tensor([3]), "gaussian", 0.01)
    assert weights.tolist() == [0.5, 0.5, 0.0]


def test_no_pairs():
    assert adjacency_weights(torch.zeros(0, dtype=torch.float64), torch.tensor([0, 0]), "gaussian", 1.0).tolist() == []


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_embeddings_without_direction_are_refused(bad):
    embeddings = torch.ones(4, 3)
    embeddings[2] = bad
    with pytest.raises(EmbeddingError, match=r"1 of 4 .*\[2\]"):
        UnitRows(embeddings)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
def test_a_width_that_is_not_positive_is_refused(sigma):
    with pytest.raises(ConfigError, match="sigma"):
        gaussian_similarity(torch.ones(1), sigma)


def test_the_cosines_of_many_pairs_take_the_memory_of_the_answer() -> None:
    """A thousand pairs' vectors at a time; results between them kept the heap from being used anew, and it grew by all of them."""
    process, seen = psutil.Process(), []

    class Watched(UnitRows):
        def take(self, rows_B: torch.Tensor) -> torch.Tensor:
            seen.append(process.memory_info().rss)
            return super().take(rows_B)

    rows_P = torch.zeros(250_000, dtype=torch.int64)
    assert len(Watched(torch.ones(8, 384)).cosines(rows_P, rows_P)) == len(rows_P)
    # All vectors in fp64 would be 0.77 GB a side.
    assert max(seen) - seen[8] < 2e8


@pytest.mark.parametrize("similarity", ["gaussian", "cosine"])
def test_weights_do_not_depend_on_the_blocks_of_questions(monkeypatch: pytest.MonkeyPatch, similarity) -> None:
    sizes = torch.tensor([3, 0, 1, 5, 0, 0, 2, 4])
    cosines = torch.linspace(-0.9, 1, int(sizes.sum()), dtype=torch.float64)
    whole = adjacency_weights(cosines, sizes, similarity, 0.3)
    for block in (1, 2, 3):
        monkeypatch.setattr(similarity_module, "_BLOCK", block)
        assert torch.equal(adjacency_weights(cosines, sizes, similarity, 0.3), whole)
