from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from roma_ray.engine.batches import chunks, epoch_order, is_letter, plan_batches, prompt_shape
from roma_ray.questions.prompts import Prompt

SHAPES = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 6)), min_size=1, max_size=60)


@given(SHAPES, st.integers(16, 2000))
def test_every_row_is_planned_once_within_the_budget(shapes: list[tuple[int, int]], budget: int) -> None:
    lengths, counts = [s[0] for s in shapes], [s[1] for s in shapes]
    plan = plan_batches(lengths, counts, budget)
    assert sorted(row for batch in plan for row in batch) == list(range(len(shapes)))
    for batch in plan:
        padded = max(lengths[r] for r in batch) * sum(counts[r] for r in batch)
        assert padded <= budget or len(batch) == 1
    assert [lengths[b[0]] for b in plan] == sorted((lengths[b[0]] for b in plan), reverse=True)


def test_the_plan_depends_on_nothing_but_its_arguments() -> None:
    lengths, counts = [5, 9, 9, 2, 7], [1, 1, 1, 1, 1]
    assert plan_batches(lengths, counts, 18) == [[1, 2], [4, 0], [3]]


def test_epoch_order_is_a_function_of_seed_and_epoch_alone() -> None:
    rows = list(range(5, 50))
    first = epoch_order(rows, 3, 0)
    assert first == epoch_order(list(reversed(rows)), 3, 0)
    assert sorted(first) == rows
    assert first != epoch_order(rows, 3, 1) != epoch_order(rows, 4, 1)


def test_chunks_keep_the_order() -> None:
    assert chunks([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]


def test_prompt_shape_counts_what_scoring_runs() -> None:
    letter = Prompt("a", "t", "train", (1, 2, 3), ((4,), (5,)), (1, 1), 0, False)
    cloze = Prompt("b", "t", "train", (1, 2, 3), ((4, 6, 7), (5,)), (3, 1), 0, False)
    assert is_letter(letter)
    assert not is_letter(cloze)
    assert prompt_shape(letter) == (3, 1)
    assert prompt_shape(cloze) == (5, 2)
