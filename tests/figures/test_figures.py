"""Each figure shows the values that it was given, and equal data give equal bytes."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from roma_ray.engine.collapse import FIGURES
from roma_ray.figures import projection, result_figures, routing, training_figures
from roma_ray.figures.style import colours, render, shorten

EPOCHS = [
    {"epoch": n, "step": 4 * (n + 1), "task_loss": 2.0 - n, "manifold_loss": 0.1, "lambda": 0.8, "gradient_norm": 1.0}
    | {"validation_accuracy": 0.5 + 0.1 * n, "validation_stderr": 0.07}
    for n in range(2)
]
STEPS = {
    "step": list(range(8)),
    **{key: [float(n) for n in range(8)] for key in ("task_loss", "manifold_loss", "lambda", "gradient_norm")},
}
TASK = {"n": 50, "base_accuracy": 0.4, "base_stderr": 0.07, "tuned_accuracy": 0.6, "tuned_stderr": 0.06}
FOUND = {
    "layers": [3, 4],
    "routing_kl": [0.1, 0.2],
    "selection_overlap": [0.9, 0.8],
    "base": {"routing_entropy": [1.0, 1.1], "expert_load": [[0.5, 0.25, 0.25, 0.0], [0.25] * 4]},
    "tuned": {"routing_entropy": [1.2, 0.9], "expert_load": [[0.25] * 4, [0.25] * 4]},
}


def test_loss_curves_show_steps_and_epoch_means() -> None:
    axes = training_figures.loss_curves(STEPS, EPOCHS).axes
    by_step, by_epoch = axes[0].lines
    assert list(by_step.get_xdata()) == list(range(1, 9))
    assert list(by_step.get_ydata()) == STEPS["task_loss"]
    assert list(by_epoch.get_ydata()) == [2.0, 1.0]
    assert list(by_epoch.get_xdata()) == [2.5, 6.5]  # the middles of steps 1-4 and 5-8
    assert len(axes[2].lines) == 1  # lambda needs no mean


@pytest.mark.parametrize("count", [2, 9])
def test_routing_by_epoch_has_a_line_a_layer_from_the_base_model_on(count: int) -> None:
    def routing(value: float) -> dict[str, list[float]]:
        return {name: [value + n for n in range(count)] for name in FIGURES}

    base = {f"base_{name}": [0.5] * count for name in ("entropy", "load_max", "unused_experts")}
    epochs = [{"epoch": n, "routing": {"layers": list(range(count)), **routing(n), **base}} for n in range(2)]
    figure = training_figures.routing_by_epoch(epochs)
    entropy, load, *_, gradient = figure.axes
    assert len(entropy.lines) == count
    assert list(entropy.lines[1].get_xdata()) == [0, 1, 2]
    assert list(entropy.lines[1].get_ydata()) == [0.5, 1, 2]
    assert list(load.lines[1].get_ydata()) == [50, 100, 200]
    assert list(gradient.lines[1].get_xdata()) == [1, 2]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"layer {n}" for n in (0, count - 1)]


def test_validation_accuracy_marks_base_and_exported_epoch() -> None:
    (axis,) = training_figures.validation_accuracy(EPOCHS, TASK, selected=1).axes
    lines = {line.get_label(): line for line in axis.lines}
    assert lines["base"].get_ydata()[0] == 40
    assert list(lines["tuned"].get_ydata()) == [50, 60]
    (errors,) = [segments for segments in axis.collections if len(segments.get_segments()) == len(EPOCHS)]
    assert [[y for _, y in segment] for segment in errors.get_segments()] == [
        pytest.approx([43, 57]),
        pytest.approx([53, 67]),
    ]
    assert (lines["exported"].get_xdata()[0], lines["exported"].get_ydata()[0]) == (2, 60)


def test_accuracy_bars_carry_standard_errors_and_end_with_all() -> None:
    other = {**TASK, "tuned_accuracy": 0.1, "n": 7}
    (axis,) = result_figures.accuracy_bars({"all": TASK, "b": other}).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["b (n=7)", "all tasks (n=50)"]
    widths = [bar.get_width() for bar in axis.patches]
    assert widths == pytest.approx([40, 40, 10, 60])
    assert len(axis.containers) == 4  # two sets of bars, two of error bars


def test_many_tasks_are_cut_to_the_largest() -> None:
    tasks = {f"t{n:03d}": {**TASK, "n": n} for n in range(60)}
    (axis,) = result_figures.accuracy_bars(tasks).axes
    assert len(axis.get_yticklabels()) == result_figures.MOST_TASKS
    assert axis.get_yticklabels()[-1].get_text() == "t059 (n=59)"


def test_drift_shows_layers_and_changed_answers() -> None:
    divergence, kept, answers = result_figures.drift(FOUND, {"lost": 3, "won": 5}).axes
    assert [bar.get_height() for bar in divergence.patches] == [0.1, 0.2]
    assert [bar.get_height() for bar in kept.patches] == [90, 80]
    assert [bar.get_height() for bar in answers.patches] == [3, 5]


def test_entropy_is_drawn_against_the_uniform_limit() -> None:
    (axis,) = routing.routing_entropy(FOUND).axes
    assert list(axis.lines[0].get_ydata()) == [1.0, 1.1]
    assert axis.lines[2].get_ydata()[0] == math.log(4)


def test_expert_load_shares_one_scale_and_centres_the_change() -> None:
    images = [axis.images[0] for axis in routing.expert_load(FOUND).axes if axis.images]
    before, after, change = images[:3]
    assert before.get_clim() == after.get_clim() == (0, 50)
    assert change.get_clim() == (-25, 25)
    assert change.get_array()[0].tolist() == [-25, 0, 0, 25]


def test_neighborhood_sizes_are_binned_whole() -> None:
    facts = {"sizes": {"q50": 2}, "similarities": {"q50": 0.5}, "empty": 1}
    left, _ = routing.neighborhoods(facts, np.array([0, 2, 2, 3]), np.array([0.4, 0.6])).axes
    assert [bar.get_height() for bar in left.patches] == [25, 0, 50, 25]
    wide, _ = routing.neighborhoods(facts, np.array([0, 130]), np.array([])).axes
    assert len(wide.patches) <= 12
    assert sum(bar.get_height() for bar in wide.patches) == 100


def test_where_all_have_as_many_neighbors_no_single_bar_is_drawn() -> None:
    facts = {"sizes": {"q50": 3}, "similarities": {"q50": 0.5}, "empty": 0}
    (only,) = routing.neighborhoods(facts, np.array([3, 3, 3]), np.array([0.4, 0.6])).axes
    assert not only.patches
    assert only.get_title().startswith("3 neighbors each")


def test_twelve_tasks_differ_in_colour_and_shape() -> None:
    looks = list(colours([f"t{n}" for n in range(12)]).values())
    assert len(set(looks)) == 12
    same_colour = [(a, b) for n, a in enumerate(looks) for b in looks[:n] if a[0] == b[0]]
    assert all(a[1] != b[1] for a, b in same_colour)
    assert len({marker for _, marker in looks}) == 8
    assert len(set(colours([f"t{n}" for n in range(64)]).values())) == 64


def test_principal_components_separate_what_is_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(10, 8, generator=generator).numpy()
    points[:5, 0] += 100
    laid = projection.lay_out(points, seed=0)
    assert laid.method == "PCA"  # too few for t-SNE
    assert laid.points.shape == (10, 2)
    assert abs(laid.points[:5, 0].mean() - laid.points[5:, 0].mean()) > 90
    assert projection.lay_out(np.ones((3, 4)), seed=0).points.tolist() == [[0, 0]] * 3


def test_a_map_keeps_apart_what_is_apart() -> None:
    """Two clouds in 20 dimensions stay two."""
    points = torch.randn(60, 20, generator=torch.Generator().manual_seed(1)).numpy()
    points[:30] += 8
    laid = projection.lay_out(points, seed=0).points
    centre = laid[:30].mean(0) - laid[30:].mean(0)
    sides = (laid - laid.mean(0)) @ centre
    assert (sides[:30] > 0).all()
    assert (sides[30:] < 0).all()


def test_a_map_repeats_itself_and_takes_equal_rows() -> None:
    points = torch.randn(30, 6, generator=torch.Generator().manual_seed(1)).numpy()
    points[:10] = points[0]
    first, second = (projection.lay_out(points, seed=3) for _ in range(2))
    assert first.method == "t-SNE"
    assert np.isfinite(first.points).all()
    assert np.array_equal(first.points, second.points)


def test_maps_colour_the_largest_tasks_and_gather_the_rest() -> None:
    tasks = [f"task{n}" for n in range(14) for _ in range(15 - n)]
    layout = projection.PlaneLayout(np.zeros((len(tasks), 2)), "PCA")
    figure = projection.task_maps({"a": layout, "b": layout}, tasks, {"a": 0.25, "b": None})
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[0] == "2 other tasks"
    assert len(names) == 13
    assert "+0.250" in figure.axes[0].get_title()
    assert figure.axes[1].get_title() == "b"


def test_rows_are_drawn_by_the_generator() -> None:
    few = projection.draw_rows(50, torch.Generator().manual_seed(0), most=10)
    assert few == sorted(set(few))
    assert len(few) == 10
    assert few == projection.draw_rows(50, torch.Generator().manual_seed(0), most=10)
    assert projection.draw_rows(5, torch.Generator().manual_seed(0)) == [0, 1, 2, 3, 4]


def test_hostile_names_draw_and_equal_figures_are_equal_bytes() -> None:
    names = {"$x_{1": TASK, "a\x00\x1b<&>]]>--": TASK, "漢字" * 30: TASK, "_hidden": TASK}
    drawn = [render(result_figures.accuracy_bars(names), "svg") for _ in range(2)]
    assert drawn[0] == drawn[1]
    ElementTree.fromstring(drawn[0])
    assert render(result_figures.accuracy_bars(names), "png").startswith(b"\x89PNG")
    assert len(shorten("x" * 99)) == 22
