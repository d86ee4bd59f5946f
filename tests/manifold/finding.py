"""Neighborhoods of a made-up table, as tests ask for them."""

import torch

from roma_ray.manifold.neighbors import Neighborhoods, find_neighbors
from tests.manifold import literal


def found(table: literal.Table, **settings_) -> Neighborhoods:
    settings_ = {"similarity": "cosine", "sigma": 0.4, "backend": "torch", "device": "cpu", **settings_}
    return find_neighbors(table.embeddings, table.successful, **table.columns, **settings_)


def assert_same(a: Neighborhoods, b: Neighborhoods) -> None:
    for name in ("offsets", "indices", "similarities", "weights", "queried"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
