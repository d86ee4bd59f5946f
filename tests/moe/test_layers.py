"""Names of layers and tokens (the paper's ablations)."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roma_ray.errors import ConfigError
from roma_ray.moe.layers import aligned_positions, check_names, select_layers, token_positions

SIXTEEN = tuple(range(16))


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ("L5", (11, 12, 13, 14, 15)),
        ("F2", (0, 1)),
        ("M3", (6, 7, 8)),
        ("M4", (6, 7, 8, 9)),
        ("F2M3", (0, 1, 6, 7, 8)),
        ("F1M2L2", (0, 7, 8, 14, 15)),
        ("All", SIXTEEN),
        ("all", SIXTEEN),
        ("L16", SIXTEEN),
        ([12, 3], (3, 12)),
        ((11,), (11,)),
    ],
)
def test_layers(spec, want) -> None:
    assert select_layers(spec, SIXTEEN) == want


def test_layers_count_moe_layers_only() -> None:
    assert select_layers("L2", [1, 3, 5, 7]) == (5, 7)
    assert select_layers("M2", [1, 3, 5, 7]) == (3, 5)
    assert select_layers([3], [1, 3, 5]) == (3,)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("F9L9", "overlap"),
        ("L2L3", "overlap"),
        ("F7M3", "overlap"),
        ("L17", "16 MoE layers"),
        ("L0", "not a name"),
        ("X5", "not a name"),
        ("", "not a name"),
        ("L5,", "not a name"),
        ("l5", "not a name"),
        ([], "no layers"),
        ([3, 3], "twice"),
        ([3, 16], "not MoE layers"),
    ],
)
def test_bad_layers(spec, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        select_layers(spec, SIXTEEN)


@pytest.mark.parametrize(
    ("spec", "bad"),
    [
        *[(spec, True) for spec in ("L2L3", "X5", "", [], [3, 3], [-1, 2])],
        *[(spec, False) for spec in ("F9L9", "L17", "all", [3, 16])],
    ],
)
def test_names_that_no_model_has_are_known_without_one(spec, bad: bool) -> None:
    with pytest.raises(ConfigError) if bad else nullcontext():
        check_names(spec, "Last1")
    with pytest.raises(ConfigError, match="not a name"):
        check_names("L5", "Final")


@pytest.mark.parametrize(
    ("spec", "length", "want"),
    [
        ("Last1", 9, (8,)),
        ("Last3", 9, (6, 7, 8)),
        ("First2", 9, (0, 1)),
        ("Mid3", 9, (3, 4, 5)),
        ("M2", 9, (3, 4)),
        ("First1Last1", 9, (0, 8)),
        ("Last3", 2, (0, 1)),
        ("First1Last1", 1, (0,)),
        ("All", 3, (0, 1, 2)),
    ],
)
def test_tokens(spec: str, length: int, want: tuple[int, ...]) -> None:
    assert token_positions(spec, length) == want


@pytest.mark.parametrize(
    ("spec", "length"), [("Last1", 0), ("Last1Last2", 9), ("Last", 9), ("Last0", 9), ("Final1", 9)]
)
def test_bad_tokens(spec: str, length: int) -> None:
    with pytest.raises(ConfigError):
        token_positions(spec, length)


@given(st.integers(1, 60), st.integers(1, 60))
def test_middle_is_where_the_paper_puts_it(count: int, total: int) -> None:
    if count > total:
        with pytest.raises(ConfigError):
            select_layers(f"M{count}", range(total))
        return
    start = (total - count) // 2
    assert select_layers(f"M{count}", range(total)) == tuple(range(start, start + count))
    assert token_positions(f"Mid{count}", total) == tuple(range(start, start + count))


@pytest.mark.parametrize(
    ("spec", "length", "want"),
    [
        ("Last3", 7, (4, 5, 6)),
        ("Last3", 2, (-1, 0, 1)),
        ("First3", 2, (0, 1, -1)),
        ("First2Last2", 3, (0, 1, -1, 2)),
        ("Last2First2", 9, (7, 8, 0, 1)),
        ("Mid2", 1, (0, -1)),
        ("All", 3, (-1, -1, 0, 1, 2)),
    ],
)
def test_aligned_positions_lie_in_places_that_correspond(spec: str, length: int, want: tuple[int, ...]) -> None:
    assert aligned_positions(spec, length, 5) == want


@pytest.mark.parametrize("spec", ["First1", "First3", "Mid3", "Last2", "First2Mid1Last3", "All"])
def test_aligned_positions_are_the_same_positions(spec: str) -> None:
    for length in range(1, 12):
        places = aligned_positions(spec, length, 11)
        assert tuple(sorted(place for place in places if place >= 0)) == token_positions(spec, length)
        assert len(places) == len(aligned_positions(spec, 11, 11))
    with pytest.raises(ConfigError):
        aligned_positions("Last1Last2", 3, 5)
