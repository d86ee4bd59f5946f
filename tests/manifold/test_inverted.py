"""The approximate search against the exact one, and the exact one in shards."""

from __future__ import annotations

import pytest
import torch

from roma_ray.manifold import inverted
from roma_ray.manifold.inverted import InvertedLists, Lookup, ShardedSearch, propose
from roma_ray.manifold.neighbors import Neighborhoods, find_neighbors
from roma_ray.manifold.search import TorchSearch
from roma_ray.manifold.similarity import UnitRows


def vectors(rows: int, width: int = 24, topics: int = 40, seed: int = 0) -> torch.Tensor:
    """Rows around some topics, as sentence embeddings lie."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(topics, width, generator=generator)
    which = torch.randint(topics, (rows,), generator=generator)
    return centers[which] + 0.7 * torch.randn(rows, width, generator=generator)


def search(table: torch.Tensor, **settings: object) -> Neighborhoods:
    rows = len(table)
    everything = torch.ones(rows, dtype=torch.bool)
    texts = [f"t{row - row % 2 if row < 40 else row}" for row in range(rows)]
    ids = [f"q{row:05d}" for row in range(rows)]
    options = {"k": 3, "similarity": "cosine", "sigma": 0.5, "backend": "torch", "device": "cpu", **settings}
    return find_neighbors(table, everything, training_N=everything, ids=ids, text_keys=texts, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("shard", [2**20, 700])
def test_recall_is_what_is_said(shard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most true neighbors are found, the share is the one reported, and the rules hold: never itself, never an equal text."""
    monkeypatch.setattr(inverted, "SHARD_ROWS", shard)
    table = vectors(2000)
    exact, near = search(table), search(table, exact_up_to=500)
    assert exact.recall == 1.0
    hits = [len(set(exact.of(n)[0].tolist()) & set(near.of(n)[0].tolist())) / 3 for n in range(2000)]
    assert sum(hits) / 2000 >= 0.95
    assert near.recall == pytest.approx(sum(hits) / 2000, abs=0.03)
    assert (near.sizes == 3).all()
    assert (near.rows != near.indices).all()
    assert not [n for n in range(40) if n ^ 1 in near.of(n)[0].tolist()]
    again = search(table, exact_up_to=500)
    assert torch.equal(again.indices, near.indices)


def test_it_does_not_scan_everything() -> None:
    """On data that has lists at all, a fraction of them is enough."""
    unit = torch.nn.functional.normalize(vectors(3000))
    lists = InvertedLists(unit)
    wanted = TorchSearch(unit, torch.device("cpu")).top(unit[:200], 4)[1]
    assert lists.tuned(unit[:200], wanted, 11, torch.ones_like(wanted, dtype=torch.bool))[0] <= len(lists.means_LC) // 4
    assert lists.top(unit[:5], 11, len(lists.means_LC))[1][:, 0].tolist() == [0, 1, 2, 3, 4]


def test_where_lists_find_too_little_the_search_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inverted, "_AIM", 0.0)
    table = torch.randn(1500, 64, generator=torch.Generator().manual_seed(1))
    unit, rows = UnitRows(table), torch.arange(1500)
    assert propose(unit, Lookup(rows, rows, 4, 11), torch.device("cpu")).recall < 0.95
    got = search(table, exact_up_to=500)
    assert got.recall == 1.0
    assert torch.equal(got.indices, search(table).indices)


def test_many_equal_texts_are_searched_exactly() -> None:
    """Rows whose proposals are all of their own text get their neighbors all the same."""
    table = vectors(900)
    table[:60] = table[0]
    texts = ["same"] * 60 + [f"t{n}" for n in range(840)]
    everything, ids = torch.ones(900, dtype=torch.bool), [f"q{n:03d}" for n in range(900)]
    options = {"k": 3, "similarity": "cosine", "sigma": 0.5, "backend": "torch", "device": "cpu"}
    near, exact = (
        find_neighbors(table, everything, training_N=everything, ids=ids, text_keys=texts, exact_up_to=limit, **options)  # type: ignore[arg-type]
        for limit in (100, 1000)
    )
    for row in range(60):
        assert torch.equal(near.of(row)[0], exact.of(row)[0])


def test_shards_give_the_exact_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = search(vectors(500))
    ball = search(vectors(500), method="epsilon", epsilon=0.6)
    monkeypatch.setattr(inverted, "SHARD_ROWS", 64)
    assert torch.equal(search(vectors(500)).indices, whole.indices)
    assert torch.equal(search(vectors(500), method="epsilon", epsilon=0.6).indices, ball.indices)
    sharded = ShardedSearch(UnitRows(vectors(500)), torch.arange(500), torch.device("cpu"))
    assert sharded.top(torch.nn.functional.normalize(vectors(500)[:9]), 2)[1][:, 0].tolist() == list(range(9))
