from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roma_ray.engine.batches import (
    PlannedBatches,
    chunks,
    epoch_order,
    is_letter,
    plan_batches,
    read_plan,
    write_plan,
)
from roma_ray.engine.forward import own_tokens, shared_prefix
from roma_ray.errors import ArtifactError
from roma_ray.questions.prompts import Prompt
from roma_ray.store.tables import write_table


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(16, 2000))
def test_every_row_is_planned_once_within_the_budget(tokens: list[int], budget: int) -> None:
    plan = plan_batches(tokens, budget)
    assert sorted(row for batch in plan for row in batch) == list(range(len(tokens)))
    for batch in plan:
        assert sum(tokens[r] for r in batch) <= budget or len(batch) == 1
    assert [tokens[b[0]] for b in plan] == sorted((tokens[b[0]] for b in plan), reverse=True)


def test_the_plan_depends_on_nothing_but_its_arguments() -> None:
    assert list(plan_batches([5, 9, 9, 2, 7], 18)) == [[1, 2], [4, 0, 3]]


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 60))
def test_the_plan_is_that_of_a_loop(tokens: list[int], budget: int) -> None:
    batches: list[list[int]] = []
    total = 0
    for row in sorted(range(len(tokens)), key=lambda row: (-tokens[row], row)):
        if batches and total + tokens[row] <= budget:
            batches[-1].append(row)
            total += tokens[row]
        else:
            batches.append([row])
            total = tokens[row]
    plan = plan_batches(tokens, budget)
    assert list(plan) == batches
    assert plan.sums(np.array(tokens, dtype=np.int64)).tolist() == [sum(tokens[row] for row in own) for own in batches]


@pytest.mark.parametrize("batches", [[], [[3, 1], [0], [2]]])
def test_a_plan_is_read_as_it_was_written(tmp_path: Path, batches: list[list[int]]) -> None:
    write_plan(tmp_path / "plan", PlannedBatches.of(batches), 7)
    prefix, plan = read_plan(tmp_path / "plan")
    assert (prefix, list(plan)) == (7, batches)


@pytest.mark.parametrize("rows", [["a"], [1], [["a"]], [[1], None], [[1, None]]])
def test_a_table_that_is_no_plan_is_refused(tmp_path: Path, rows: list[Any]) -> None:
    column = pa.array(rows)
    if rows[0] == [1]:
        column = column.cast(pa.list_(pa.int32()))
    write_table(tmp_path / "plan", {"rows": column}, pa.schema([("rows", column.type)]), {"prefix": 0})
    with pytest.raises(ArtifactError, match="is no plan of batches"):
        read_plan(tmp_path / "plan")


def test_epoch_order_is_a_function_of_seed_and_epoch_alone() -> None:
    rows = list(range(5, 50))
    first = epoch_order(rows, 3, 0)
    assert first == epoch_order(list(reversed(rows)), 3, 0)
    assert sorted(first) == rows
    assert first != epoch_order(rows, 3, 1) != epoch_order(rows, 4, 1)


def test_chunks_keep_the_order() -> None:
    assert chunks([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]


def test_own_tokens_and_the_shared_prefix() -> None:
    letter = Prompt("a", "t", "train", (1, 2, 3), ((4,), (5,)), (1, 1), 0, False)
    cloze = Prompt("b", "t", "train", (1, 2, 8, 9), ((4, 6, 7), (5,)), (3, 1), 0, False)
    assert is_letter(letter)
    assert not is_letter(cloze)
    assert own_tokens(letter, 0) == 3
    assert own_tokens(cloze, 1) == 5
    assert shared_prefix([letter, cloze]) == 2
    # A prompt keeps a token of its own, also where all are equal.
    assert shared_prefix([letter, letter]) == 2
