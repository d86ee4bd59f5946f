"""Some rows of a question table, one after another, are those of the whole one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from roma_ray.engine import question_table
from roma_ray.engine.question_table import iterate_rows, read_table
from tests.engine.test_stored_prompts import write


@pytest.mark.parametrize("at_once", [1, 3, 8192])
def test_rows_of_a_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(question_table, "_ROWS_AT_ONCE", at_once)
    path, columns = tmp_path / "questions.parquet", ["id", "prompt_ids", "context"]
    write(path, 40)
    rows = [tuple(row[name] for name in columns) for row in read_table(path).to_pylist()]
    mask = np.random.default_rng(0).random(40) < 0.4
    assert list(iterate_rows(path, columns, mask)) == [row for row, there in zip(rows, mask, strict=True) if there]
    assert list(iterate_rows(path, columns, np.zeros(40, dtype=bool))) == []
