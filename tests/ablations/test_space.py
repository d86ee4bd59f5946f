"""Space files: what they expand to, what makes trials one, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from roma_ray.ablations import paper
from roma_ray.ablations.factors import columns
from roma_ray.ablations.space import Space, load_space, seeds_space
from roma_ray.ablations.sweep_report import title
from roma_ray.ablations.sweep_results import find
from roma_ray.ablations.sweep_tables import factor_table
from roma_ray.config.loading import load_config
from roma_ray.errors import ConfigError
from tests.ablations.made import finished, scores_of, sweep_of

ROOT = Path(__file__).parents[2]


def space(tmp_path: Path, overrides: tuple[str, ...] = (), **content: Any) -> Space:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    return load_space(path, overrides)


def levels(found: Space, factor: str) -> list[str]:
    return [level for trial in found.trials for name, level in trial.factors if name == factor]


def test_the_paper_s_ablations_are_35_trials() -> None:
    found = load_space(ROOT / "configs" / "ablations.yaml")
    assert len(found.trials) == 35
    centre, *others = found.trials
    assert centre.centre
    assert not any(trial.centre for trial in others)
    assert dict(centre.factors) == {
        "layers": "L5",
        "tokens": "Last1",
        "neighbors": "k = 3",
        "training set": "100 %",
        "regularizer": "manifold",
    }
    counts = {factor: len(levels(found, factor)) for factor in dict(centre.factors)}
    assert counts == {"layers": 16, "tokens": 6, "neighbors": 7, "training set": 5, "regularizer": 5}
    # One factor at a time: every other trial differs in one factor alone, from the base configuration's own settings.
    assert all(len(trial.factors) == 1 and trial.settings for trial in others)
    base = load_config(ROOT / "configs" / "olmoe.yaml")
    assert centre.config.finetune == base.finetune
    assert centre.config.model == base.model


def test_every_result_of_the_paper_has_a_trial() -> None:
    found = load_space(ROOT / "configs" / "ablations.yaml")
    for results in paper.RESULTS.values():
        for factor, given in results.items():
            assert set(given) <= set(levels(found, factor)), factor


@pytest.mark.parametrize(
    ("model", "figure", "header", "base", "last5"),
    [
        (None, "Figure 6", "paper, OLMoE-7B-A1B", "67.6", ("76.2", "+8.6")),
        ("deepseek-ai/deepseek-moe-16b-chat", "Table 3", "paper, DeepSeekMoE-16B-A3B", "66.6", ("74.7", "+8.1")),
        ("deepseek-ai/deepseek-moe-16b-base", "Table 3", "paper, DeepSeekMoE-16B-A3B", "66.6", ("74.7", "+8.1")),
        ("/models/DeepSeekMoE_16B/", "Table 3", "paper, DeepSeekMoE-16B-A3B", "66.6", ("74.7", "+8.1")),
        ("deepseek-ai/DeepSeek-V2-Lite-Chat", None, None, None, None),
        ("Qwen/Qwen3-30B-A3B", None, None, None, None),
    ],
)
def test_the_paper_s_results_are_those_of_the_model_in_use(
    model: str | None, figure: str | None, header: str | None, base: str | None, last5: tuple[str, str] | None
) -> None:
    overrides = () if model is None else (f"model.path={model}",)
    found = load_space(ROOT / "configs" / "ablations.yaml", overrides)
    sweep = sweep_of(found)
    count = 40
    right, gold = np.arange(count) % 2 == 0, np.zeros(count, int)
    centre = finished(found.trials[0], scores_of(right, gold), base=scores_of(~right, gold), gold=gold)
    table = factor_table(sweep, find([[centre]]), "layers", levels(found, "layers"))
    named = [name for name in table.header if name.startswith("paper")]
    if header is None:
        assert named == []
        return
    assert named == [header]
    assert title(sweep, "layers").endswith(f"(as the paper's {figure})")
    assert table.rows[0][-2:] == (base, "")
    rows = {row[0]: row[-2:] for row in table.rows}
    assert rows["L5"] == last5
    assert rows["F5"] == (("72.4", "+5.8") if base == "66.6" else ("", ""))


def test_the_shipped_files_expand(tmp_path: Path) -> None:
    assert len(load_space().trials) == 10
    weights = {
        (trial.config.finetune.regularizer.weight, trial.config.finetune.regularizer.gradient_ratio)
        for trial in load_space(ROOT / "configs" / "lambda.yaml").trials
    }
    numbers = sorted(weight for weight, _ in weights if isinstance(weight, float))
    assert numbers[-1] / numbers[0] >= 1e5
    assert sum(weight == "auto" for weight, _ in weights) == 5


def test_grids_multiply_and_seeds_keep_the_questions_split(tmp_path: Path) -> None:
    found = space(
        tmp_path,
        set={"finetune.epochs": 1},
        grid={"finetune.learning_rate": [1e-4, 1e-3], "neighbors.k": [1, 3]},
        seeds=[0, 7],
    )
    assert len(found.trials) == 2 * (1 + 4)  # the centre's rate is another one
    assert {trial.config.questions.seed for trial in found.trials} == {0}
    assert {trial.seed for trial in found.trials} == {0, 7}
    assert sum(trial.centre for trial in found.trials) == 2
    assert len({trial.group for trial in found.trials}) == 5
    assert len({trial.name for trial in found.trials}) == 10
    assert {trial.config.finetune.epochs for trial in found.trials} == {1}


def test_equal_configurations_are_one_trial_with_both_names(tmp_path: Path) -> None:
    one = {"levels": {"k = 3": {"neighbors.k": 3}, "three": {"neighbors.k": 3}, "k = 4": {"neighbors.k": 4}}}
    found = space(tmp_path, one_at_a_time={"neighbors": one, "rate": {"setting": "finetune.epochs", "values": [5]}})
    assert [trial.name for trial in found.trials] == ["centre", "neighbors: k = 4", "rate=5"]
    assert found.trials[0].factors == (("neighbors", "k = 3"), ("neighbors", "three"), ("rate", "centre"))


def test_a_young_setting_has_trials_of_its_own_and_its_default_leaves_old_ones_where_they_are(tmp_path: Path) -> None:
    setting = "finetune.regularizer.distance"
    (usual,) = space(tmp_path, seeds=[0]).trials
    for centre in ("squared", "kl"):
        found = space(tmp_path, set={setting: centre}, grid={setting: ["squared", "kl"]}, seeds=[0])
        centres = {trial.config.finetune.regularizer.distance: trial.centre for trial in found.trials}
        assert centres == {distance: distance == centre for distance in ("squared", "kl")}
        assert found.trials[0].id != found.trials[1].id
    other = space(tmp_path, set={setting: "squared"}, seeds=[0]).trials[0]
    assert (other.id, other.group) == (usual.id, usual.group)


def test_samples_repeat_and_follow_the_seed(tmp_path: Path) -> None:
    ranges = {"finetune.learning_rate": {"log_uniform": [1e-5, 1e-2]}, "neighbors.k": {"integer": [1, 9]}}
    first, again = (space(tmp_path, sample=ranges, samples=6) for _ in range(2))
    other = space(tmp_path, ("seed=1",), sample=ranges, samples=6)
    assert len(first.trials) == 7
    assert [trial.id for trial in first.trials] == [trial.id for trial in again.trials]
    assert first.identity == again.identity != other.identity
    assert {t.config.neighbors.k for t in first.trials} != {t.config.neighbors.k for t in other.trials}
    assert all(1e-5 <= trial.config.finetune.learning_rate <= 1e-2 for trial in first.trials)


def test_where_it_runs_is_no_part_of_a_trial(tmp_path: Path) -> None:
    one = {"k": {"setting": "neighbors.k", "values": [1]}}
    here = space(tmp_path, one_at_a_time=one)
    there = space(tmp_path, ("ray.cpus_per_worker=2", "tracking.enabled=false"), one_at_a_time=one)
    assert here.identity == there.identity
    assert [trial.id for trial in here.trials] == [trial.id for trial in there.trials]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"grid": {"finetune.learning_rat": [1]}}, "did you mean `learning_rate`"),
        ({"grid": {"finetun.epochs": [1]}}, "no section `finetun`"),
        ({"grid": {"finetune.epochs": [0]}}, "finetune.epochs"),
        ({"grid": {"tracking.uri": ["http://x"]}}, "changes no result"),
        ({"grid": {"finetune.epochs": []}}, "no values"),
        ({"one_at_a_time": {"a": {"setting": "seed"}}}, "either `setting` and `values`, or `levels`"),
        ({"one_at_time": {}}, "did you mean `one_at_a_time`"),
        ({"sample": {"seed": {"integer": [1, 2]}}}, "belong together"),
        ({"sample": {"seed": {"integer": [2, 1]}}, "samples": 1}, "below"),
        ({"sample": {"finetune.learning_rate": {"uniform": [-1, 1]}}, "samples": 1}, "greater than 0"),
        ({"sample": {"seed": {}}, "samples": 1}, "exactly one"),
        ({"search": "optuna"}, "chooses within `sample`"),
        ({"seeds": [1, 1]}, "twice"),
        ({"base": "nowhere.yaml"}, "cannot read"),
        ({"scheduler": {"kind": "asha", "reduction_factor": 1}}, "greater than 1"),
        ({"grid": {"finetune.epochs": list(range(1, 101)), "neighbors.k": list(range(1, 101))}}, "more than 2000"),
    ],
)
def test_faults_are_told_before_anything_starts(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space(tmp_path, **content)


def test_a_space_without_a_name_has_its_files(tmp_path: Path) -> None:
    (tmp_path / "rates.yaml").write_text("grid: {finetune.epochs: [1, 2]}\n")
    assert load_space(tmp_path / "rates.yaml").file.name == "rates"


def test_another_base_takes_the_place_of_the_file_s(tmp_path: Path) -> None:
    """As a command names it: from the folder where the command is given, not from the file's."""
    (tmp_path / "grids").mkdir()
    grid = tmp_path / "grids" / "grid.yaml"
    grid.write_text("base: assets:demo.yaml\ngrid: {finetune.epochs: [1, 2]}\n")
    found = load_space(grid, base=str(ROOT / "configs" / "olmoe.yaml"))
    assert found.centre.model.path == "allenai/OLMoE-1B-7B-0125-Instruct"
    assert len(found.trials) == 3
    assert load_space(grid, base="assets:control.yaml").centre.model.path == "assets:control/model"
    with pytest.raises(ConfigError, match="nowhere"):
        load_space(grid, base=str(tmp_path / "nowhere.yaml"))


def test_several_seeds_of_one_configuration() -> None:
    """All that is drawn from the data stays: the first seed's; the task loss alone stands beside it where that is asked for."""
    config = load_config(None, ["seed=4"])
    found = seeds_space(config, 3)
    assert {(t.name.partition(", seed")[0], t.seed) for t in found.trials} == {
        (name, seed) for name in ("centre", "trained by=task loss alone") for seed in (4, 5, 6)
    }
    assert {t.config.questions.seed for t in found.trials} == {4}
    for override in ("finetune.regularizer.kind=none", "finetune.regularizer.weight=0"):
        assert len(seeds_space(load_config(None, [override]), 2).trials) == 2, "it is the task loss alone already"
    alone = seeds_space(load_config(None, ["evaluation.task_loss_alone=false"]), 2)
    assert [t.name for t in alone.trials] == ["centre", "centre, seed 1"]
    assert [column.level(alone.trials[0]) for column in columns(alone)] == ["centre"]
