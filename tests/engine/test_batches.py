from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from roma_ray.engine.batches import chunks, epoch_order, is_letter, plan_batches
from roma_ray.engine.forward import own_tokens, shared_prefix
from roma_ray.questions.prompts import Prompt


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(16, 2000))
def test_every_row_is_planned_once_within_the_budget(tokens: list[int], budget: int) -> None:
    plan = plan_batches(tokens, budget)
    assert sorted(row for batch in plan for row in batch) == list(range(len(tokens)))
    for batch in plan:
        assert sum(tokens[r] for r in batch) <= budget or len(batch) == 1
    assert [tokens[b[0]] for b in plan] == sorted((tokens[b[0]] for b in plan), reverse=True)


def test_the_plan_depends_on_nothing_but_its_arguments() -> None:
    assert list(plan_batches([5, 9, 9, 2, 7], 18)) == [[1, 2], [4, 0, 3]]


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
