"""The token tree holds every path, shares what is worth it, and batches stay about the budget."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from roma_ray.benchmarks.request_tree import common_prefix, grow, plan_paths, tree_tokens

paths_of = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14).map(tuple), min_size=1, max_size=25)


@given(paths_of, st.sampled_from([1, 3, 8]))
def test_every_path_is_in_the_tree(paths: list[tuple[int, ...]], least: int) -> None:
    tree = grow(paths, least)
    for path in paths:
        for count in (1, len(path)):
            places = tree.places(path, count)
            assert tuple(tree.segments[s].ids[o] for s, o in places) == path[len(path) - count :]
    assert all(s.ids and s.parent < n for n, s in enumerate(tree.segments))
    assert grow(paths[::-1], least) == tree
    if least == 1:
        assert tree.tokens == len({path[:n] for path in paths for n in range(1, len(path) + 1)})


@given(paths_of, st.integers(4, 60))
def test_batches_hold_every_path_once(paths: list[tuple[int, ...]], budget: int) -> None:
    plan = plan_paths(paths, budget)
    assert sorted(n for batch in plan for n in batch) == list(range(len(paths)))
    for batch in plan:
        distinct = {paths[n] for n in batch}
        assert len(distinct) == 1 or grow([paths[n] for n in batch], 1).tokens <= budget


def test_common_prefix() -> None:
    assert [common_prefix((1, 2, 3), other) for other in [(1, 2, 4), (1, 2), (2,), (1, 2, 3)]] == [2, 2, 0, 3]


def test_a_short_common_start_is_not_shared() -> None:
    paths = [(7, 7, *([n] * 10)) for n in range(4)]
    assert all(segment.parent == -1 for segment in grow(paths).segments)
    assert len(grow([(*range(20), n) for n in range(4)]).segments) == 5


def test_a_tree_s_tokens_are_those_that_run() -> None:
    """What estimates count by: a long common start once, each path's own tokens as often as they are."""
    start = tuple(range(40))
    paths = [(*start, 50, 51), (*start, 60), (7, 8, 9), (*start, 70, 52, 53)]
    assert tree_tokens(paths) == sum(len(segment.ids) for segment in grow(paths).segments) == 40 + 2 + 1 + 3 + 3
