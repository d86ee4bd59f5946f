"""Neighborhoods on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from roma_ray.errors import NeighborError
from roma_ray.manifold.neighbors import Neighborhoods
from roma_ray.stages import neighborhoods
from roma_ray.store.artifacts import Store

FOUND = Neighborhoods(
    offsets=torch.tensor([0, 2, 2, 2, 3]),
    indices=torch.tensor([1, 3, 0]),
    similarities=torch.tensor([0.9, 0.8, 0.7], dtype=torch.float64),
    weights=torch.tensor([0.6, 0.4, 1.0], dtype=torch.float64),
    queried=torch.tensor([True, False, True, True]),
)


def test_what_is_written_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Store(tmp_path).stage("neighbors", {}, {}, 1)
    stage.path.mkdir(parents=True)
    neighborhoods._write(stage, FOUND)
    read = neighborhoods.read_neighborhoods(stage, 4)
    for name in ("offsets", "indices", "similarities", "weights", "queried"):
        assert torch.equal(getattr(read, name), getattr(FOUND, name)), name
    monkeypatch.setattr(neighborhoods, "_MOST_PAIRS", 2)
    with pytest.raises(NeighborError, match="3 pairs of neighbors are more"):
        neighborhoods._write(stage, FOUND)
