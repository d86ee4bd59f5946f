"""Which setting is which: one column a factor, with the centre's own level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from roma_ray.ablations.factors import centre_text, columns
from roma_ray.ablations.naming import short_names
from roma_ray.ablations.space import Space, load_space
from roma_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]


def space(tmp_path: Path, **content: Any) -> Space:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False))
    return load_space(path)


def rows(found: Space) -> list[tuple[str, ...]]:
    return [tuple(column.level(trial) for column in columns(found)) for trial in found.trials]


def test_a_grid_has_a_column_a_setting_and_names_without_a_tag() -> None:
    found = load_space(ROOT / "configs" / "lambda.yaml")
    assert [column.name for column in columns(found)] == ["weight", "learning_rate", "gradient_ratio"]
    assert rows(found)[0] == ("0.8", "7e-05", "0.3")
    assert ("auto", "7e-05", "3") in rows(found)
    names = {trial.name for trial in found.trials}
    assert {
        "centre",
        "weight=0.01, learning_rate=0.0007",
        "weight=auto, gradient_ratio=1, learning_rate=0.007",
    } <= names


def test_factors_show_their_levels_and_for_all_others_the_centre_s(tmp_path: Path) -> None:
    found = space(
        tmp_path,
        set={"neighbors.k": 3, "finetune.learning_rate": 0.001},
        one_at_a_time={
            "layers": {"setting": "routing.layers", "values": ["L1", "L2"]},
            "neighbors": {"levels": {"random": {"neighbors.method": "random"}, "k = 1": {"neighbors.k": 1}}},
        },
        grid={"finetune.learning_rate": [0.001, 0.01], "finetune.epochs": [4]},
    )
    assert [column.name for column in columns(found)] == ["layers", "neighbors", "learning_rate"]
    centre = found.trials[0].config.routing.layers
    # No level of `neighbors` is the centre's, so its settings are told.
    assert rows(found) == [
        (centre, "method=knn, k=3", "0.001"),
        ("L1", "method=knn, k=3", "0.001"),
        ("L2", "method=knn, k=3", "0.001"),
        (centre, "random", "0.001"),
        (centre, "k = 1", "0.001"),
        (centre, "method=knn, k=3", "0.01"),
    ]
    assert centre_text(found) == f"layers={centre}, neighbors: method=knn, k=3, learning_rate=0.001"
    assert [trial.name for trial in found.trials][-2:] == ["neighbors: k = 1", "learning_rate=0.01, epochs=4"]


def test_a_column_knows_its_numbers(tmp_path: Path) -> None:
    found = space(tmp_path, grid={"finetune.learning_rate": [1e-5, 1e-2], "routing.layers": ["L1", "L2"]})
    rate, layers = columns(found)
    assert [rate.number(trial.config) for trial in found.trials[1:]] == [1e-5, 1e-5, 1e-2, 1e-2]
    assert layers.number(found.trials[1].config) is None


def test_settings_of_one_name_are_told_apart() -> None:
    keys = ["finetune.warmup_fraction", "finetune.regularizer.warmup_fraction", "neighbors.k"]
    assert short_names(keys) == ["finetune.warmup_fraction", "regularizer.warmup_fraction", "k"]


def test_a_factor_is_not_called_as_grids_and_samples_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another name than `grid 2`"):
        space(tmp_path, one_at_a_time={"grid 2": {"setting": "routing.layers", "values": ["L1"]}})
