"""Tensors put whole, read whole or mapped; damage is seen by size before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from roma_ray.store.tensors import (
    DAMAGED,
    check_extent,
    mapped,
    read_metadata,
    read_tensors,
    shapes,
    write_matrix,
    write_tensors,
)


def test_what_is_put_comes_back(tmp_path: Path) -> None:
    file, values = tmp_path / "folder" / "x.safetensors", {"a": torch.arange(12.0).reshape(4, 3), "b": torch.ones(2)}
    write_tensors(file, values, {"state": "{}"})
    found, metadata = read_tensors(file)
    assert {key: value.tolist() for key, value in found.items()} == {k: v.tolist() for k, v in values.items()}
    assert metadata == read_metadata(file) == {"state": "{}"}
    assert shapes(file) == {"a": (4, 3), "b": (2,)}
    assert mapped(file, "a")[1:3].tolist() == values["a"][1:3].tolist()
    assert check_extent(file)["a"]["shape"] == [4, 3]


def test_damage_is_told(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    write_tensors(file, {"a": torch.ones(100)})
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(EOFError, match="instead of"):
        check_extent(file)
    for content in (b"", whole[:4], whole[:20], b"\xff" * 40, b"\x02\0\0\0\0\0\0\0[]"):
        file.write_bytes(content)
        with pytest.raises((ValueError, EOFError)):
            check_extent(file)
        with pytest.raises(DAMAGED):
            read_tensors(file)
    file.unlink()
    with pytest.raises(DAMAGED):
        read_tensors(file)


def test_a_matrix_in_parts_has_the_bytes_of_one_that_is_put_whole(tmp_path: Path) -> None:
    for rows in (1, 7, 1000):
        whole = torch.randn(rows, 3)
        write_tensors(tmp_path / "whole", {"embeddings": whole})
        parts = [part.numpy() for part in whole.split(300)]
        write_matrix(tmp_path / "parts", "embeddings", (rows, 3), parts)
        assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
