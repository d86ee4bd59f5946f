"""A sweep's figures show each setting at its place, on the scale that fits."""

from __future__ import annotations

import numpy as np
import pytest

from roma_ray.figures.sweep_figures import Bar, Level, factor_levels, grid_line, grid_maps, logarithmic


def level(labels: tuple[str, ...], numbers: tuple[float | None, ...], value: float, centre: bool = False) -> Level:
    return Level(labels, numbers, (value, 0.03), (value - 0.5, 0.01), centre)


def test_a_grid_of_one_number_is_a_line_over_its_scale() -> None:
    rates = [1e-3, 1e-5, 1e-4]
    levels = [level((f"{rate:g}",), (rate,), 0.5 + 10 * rate, rate == 1e-4) for rate in rates]
    validation, gain = grid_line("learning_rate", levels, 0.5).axes
    assert validation.get_xscale() == gain.get_xscale() == "log"
    assert list(validation.lines[0].get_xdata()) == sorted(rates)
    assert list(validation.lines[0].get_ydata()) == pytest.approx([50.01, 50.1, 51])
    assert list(gain.lines[0].get_ydata()) == pytest.approx([0.01, 0.1, 1])
    (mark,) = [line for line in validation.lines if line.get_label() == "the centre"]
    assert list(mark.get_xdata()) == [1e-4]
    assert [text.get_text() for text in validation.get_xticklabels()] == ["1e-05", "0.0001", "0.001"]
    even = [level((str(k),), (float(k),), 0.5) for k in (1, 3, 5)]
    assert grid_line("k", even, 0.5).axes[0].get_xscale() == "linear"


def test_a_grid_of_names_is_dots_in_the_file_s_order() -> None:
    axis = grid_line("kind", [level((name,), (None,), 0.5) for name in ("manifold", "none", "l1")], 0.5).axes[0]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["manifold", "none", "l1"]
    assert axis.lines[0].get_linestyle() == "None"


def test_a_grid_of_two_settings_is_a_map_with_every_figure_in_its_cell() -> None:
    levels = [
        level((f"{rate:g}", weight), (rate, None if weight == "auto" else float(weight)), 0.5 + n / 100, n == 1)
        for n, (rate, weight) in enumerate([(1e-3, "10"), (1e-5, "0.1"), (1e-3, "0.1"), (1e-3, "auto")])
    ]
    validation, gain = grid_maps(("learning_rate", "weight"), levels).axes
    assert [text.get_text() for text in validation.get_yticklabels()] == ["1e-05", "0.001"]
    assert [text.get_text() for text in validation.get_xticklabels()] == ["0.1", "10", "auto"]
    shown = validation.images[0].get_array()
    np.testing.assert_allclose(np.ma.filled(shown, np.nan), [[51, np.nan, np.nan], [52, 50, 53]])
    assert {text.get_text() for text in gain.texts} == {"+0.00", "+1.00", "+2.00", "+3.00"}
    low, high = gain.images[0].get_clim()
    assert low == -high
    # The centre's cell is framed.
    assert validation.patches[0].get_xy() == (-0.5, -0.5)


def test_levels_that_are_numbers_are_a_line_and_both_kinds_of_error_are_named() -> None:
    bars = [Bar(str(k), 0.5 + k / 100, 0.02, k == 3, None, 0.01, float(k)) for k in (1, 3, 5)]
    figure = factor_levels(bars, 0.5, 0.02, paper=None, paper_base=None)
    (axis,) = figure.axes
    assert list(axis.lines[0].get_ydata()) == pytest.approx([51, 53, 55])
    names = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"± standard error over questions", "± standard error over seeds", "the centre", "base model"} <= names
    named = [Bar(name, 0.5, 0.02, False, None) for name in ("a", "b")]
    figure = factor_levels(named, 0.5, 0.02, paper=None, paper_base=None)
    assert len(figure.axes[0].patches) >= 2
    assert "± standard error over seeds" not in {text.get_text() for text in figure.legends[0].get_texts()}


def test_numbers_span_orders_of_magnitude_or_not() -> None:
    assert logarithmic([1e-5, 1e-2])
    assert not logarithmic([1, 2, 3])
    assert not logarithmic([0, 1e-5, 1e-2])
