"""Scattered rows come out in order, whether they are held or lie in scratch; what lacks or comes twice is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pytest

from roma_ray.errors import ArtifactError
from roma_ray.store import row_order
from roma_ray.store.row_order import in_row_order


def scattered(rows: int, seed: int = 0) -> list[pa.Table]:
    """Tables of up to nine rows, with lists of which some are null."""
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    parts = [order[start : start + 9] for start in range(0, rows, 9)]
    return [
        pa.table({"row": part, "text": [f"q{n}" for n in part], "wide": [None if n % 5 == 0 else [n, n] for n in part]})
        for part in parts
    ]


@pytest.mark.parametrize(("block", "cut"), [(1000, 2**26), (16, 200), (16, 2**26), (7, 1), (50, 2000)])
def test_rows_come_out_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, block: int, cut: int) -> None:
    monkeypatch.setattr(row_order, "BLOCK_ROWS", block)
    monkeypatch.setattr(row_order, "_CUT_BYTES", cut)
    blocks = list(in_row_order(iter(scattered(100)), 100, tmp_path))
    assert [len(part) for part in blocks] == [min(block, 100 - start) for start in range(0, 100, block)]
    found = pa.concat_tables(blocks)
    assert found.column("row").to_pylist() == list(range(100))
    assert found.column("text").to_pylist() == [f"q{n}" for n in range(100)]
    assert found.column("wide").to_pylist() == [None if n % 5 == 0 else [n, n] for n in range(100)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("block", [1000, 16])
def test_rows_that_lack_or_come_twice_or_do_not_exist_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, block: int
) -> None:
    monkeypatch.setattr(row_order, "BLOCK_ROWS", block)
    tables = scattered(100)
    for wrong in (
        tables[1:],
        [*tables, tables[0]],
        [*tables, pa.table({"row": [100], "text": ["x"], "wide": [[1, 2]]})],
    ):
        with pytest.raises(ArtifactError, match="does not hold each question once"):
            list(in_row_order(iter(wrong), 100, tmp_path))
        assert list(tmp_path.iterdir()) == []
