"""A sweep's page, figures, tables and terminal from real trials, done one after another in this process."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import pytest
import yaml

from roma_ray.ablations.plan import make_plan
from roma_ray.ablations.space import Space, load_space, seeds_space
from roma_ray.ablations.sweep import Sweep, keep_config, open_sweep, prepare_shared
from roma_ray.ablations.sweep_command import SweepFindings, result
from roma_ray.ablations.sweep_report import write_report
from roma_ray.ablations.trial import TrialWork, here
from roma_ray.cli.printing import setup_of_finished
from roma_ray.cli.sweeping import print_sweep
from roma_ray.config.loading import load_config
from roma_ray.engine.progress import Silence
from roma_ray.runs.pipeline import locate
from tests.world import make_world


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A factor around a centre, a grid of two settings over two seeds: ten trials with one cut and one of another."""
    root = tmp_path_factory.mktemp("sweep")
    config = make_world(root, count=36, finetune={"epochs": 1})
    content = {
        "name": "small",
        "base": config.model_dump(mode="json"),
        "one_at_a_time": {"layers": {"setting": "routing.layers", "values": ["L1", "L2"]}},
        "grid": {"finetune.learning_rate": [0.001, 0.1], "finetune.regularizer.weight": [0.0, 10.0]},
        "seeds": [0, 1],
    }
    (root / "space.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return reported(load_space(root / "space.yaml"))


def reported(space: Space) -> Sweep:
    """A space's sweep, every trial finished, with its report."""
    planned = make_plan(space, "cpu")
    prepare_shared(open_sweep(planned))
    for each in planned.trials:
        here(TrialWork(each.trial.id, each.setup, each.stages), lambda record: None)
    done = open_sweep(planned)
    for state in done.states.values():
        keep_config(state)
    assert write_report(done, Silence()) == done.stage.path / "report.html"
    return done


def test_seeds_alone_make_a_report(tmp_path: Path) -> None:
    """One setting, which varies nothing."""
    config = make_world(tmp_path, count=36, finetune={"epochs": 1, "learning_rate": 0.05})
    done = reported(seeds_space(config, 2))
    page = (done.stage.path / "report.md").read_text()
    assert "centre" in page
    found = result(done)
    assert found is not None
    assert len(found.ranking.rows) == 1


def test_the_page_shows_every_setting_measure_task_and_answer(sweep: Sweep) -> None:
    assert sweep.stage.complete
    page, text = ((sweep.stage.path / name).read_text() for name in ("report.html", "report.md"))
    parts = (
        "Centre: layers=L2, learning_rate=0.01, weight=0.8",
        "Grid: learning_rate and weight",
        "Every measure on the same questions",
        "By task",
        "mean of tasks",
        "Which answers are given",
        "right answers",
        "± seeds",
    )
    for part in parts:
        assert part in page, part
        assert part in text.replace("\\", ""), part
    assert {picture.stem for picture in (sweep.stage.path / "figures").glob("*.svg")} == {"factor_1", "grid"}
    with open(sweep.stage.path / "tables" / "ranking.csv") as stream:
        rows = {(row["layers"], row["learning_rate"], row["weight"]) for row in csv.DictReader(stream)}
    assert len(rows) == 6
    assert ("L2", "0.1", "10") in rows
    # Questions by letter have one accuracy, and it is said why.
    assert any("acc and acc_norm are the same" in line for line in told(sweep).notes)
    # A weight of 0 asks for no regularizer, so it is not called idle.
    assert not any("idle" in line and "weight=0" in line for line in told(sweep).notes)


def told(sweep: Sweep) -> SweepFindings:
    found = result(sweep)
    assert found is not None
    return found


def test_the_terminal_cuts_and_breaks_nothing_at_80_columns(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_sweep(sweep)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    drawn = [line for line in shown.splitlines() if line[:1] in "│┃┏└"]
    assert max(map(len, drawn)) <= 80
    found = told(sweep)
    for table in (found.ranking, found.measures[0][1]):
        for cell in (*table.header, *(cell for row in table.rows for cell in row)):
            assert cell in shown, cell
    assert "…" not in shown


def test_other_commands_find_a_trial_by_the_configuration_that_its_evaluation_keeps(sweep: Sweep) -> None:
    """Though it stands on an extraction that it shares with trials of another cut."""
    for state in sweep.states.values():
        judged = state.planned.stages["evaluate"]
        kept = load_config(judged.path / "config.yaml")
        assert kept.name == f"small: {state.trial.name}"
        assert locate(setup_of_finished(kept))["evaluate"].path == judged.path
