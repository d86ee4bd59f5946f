"""What the regularizer adds: the same run without it beside it, shared with whoever runs that, and told in every report."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from roma_ray.config.loading import with_overrides
from roma_ray.config.schema import Config
from roma_ray.engine.progress import Silence
from roma_ray.engine.setup import resolve
from roma_ray.errors import TrainingError, UnmovedError
from roma_ray.evaluation.results_file import read_judged
from roma_ray.evaluation.statistics import pair
from roma_ray.runs import pipeline
from roma_ray.runs.pipeline import Run, locate, revisit, run
from roma_ray.stages.task_loss_alone import ALONE, added_rows, added_words, without_regularizer
from roma_ray.tracking import run_records
from tests.progress import Told
from tests.world import make_world

STRONG = {"epochs": 2, "learning_rate": 0.05}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    root = tmp_path_factory.mktemp("alone")
    return make_world(root, count=90, finetune=STRONG, evaluation={"task_loss_alone": True})


@pytest.fixture(scope="module")
def finished(config: Config) -> Run:
    return run(resolve(config), Silence(), until="report")


def test_it_is_the_run_without_regularizer(config: Config, finished: Run) -> None:
    plain = resolve(with_overrides(config, ["finetune.regularizer.kind=none"]))
    stages = locate(plain)
    assert stages["evaluate"].path == finished.stages[ALONE].path
    assert stages["finetune"].complete
    assert stages["neighbors"].path == finished.stages["neighbors"].path
    assert without_regularizer(plain) is None


def test_figures_are_paired_by_question(finished: Run) -> None:
    both, alone = (read_judged(finished.stages[name].path) for name in ("evaluate", ALONE))
    first, second = alone.values("tuned")["acc"], both.values("tuned")["acc"]
    found = finished.summary["task_loss_alone"]
    assert found["added"] == pair(first, second).plain()
    assert found["alone"] == pair(both.values("base")["acc"], first).plain()
    tasks = np.asarray(both.asked.tasks)
    assert set(found["tasks"]) == {"copy", "pick"}
    for task, figures in found["tasks"].items():
        assert figures["difference"] == (second - first)[tasks == task].mean()
    assert (first != second).any(), "else the test sees nothing"


def test_the_report_tells_it(finished: Run) -> None:
    folder, found = finished.stages["report"].path, finished.summary["task_loss_alone"]
    for name in ("report.html", "report.md", "model_card.md"):
        assert added_words(found).split(" (")[0] in (folder / name).read_text()
    assert "What the regularizer adds" in (folder / "report.html").read_text()
    rows = list(csv.DictReader((folder / "tables" / "task_loss_alone.csv").open()))
    assert [row["to"] for row in rows] == ["task loss alone", *["both terms"] * 3]
    assert float(rows[1]["difference"]) == found["added"]["difference"]
    told = {value.key: value.value for value in run_records.added(finished.stages["report"])}
    assert told["task_loss_alone/added/difference"] == found["added"]["difference"]


def test_a_second_run_computes_nothing(config: Config, finished: Run) -> None:
    before = {name: stage.manifest()["finished"] for name, stage in finished.stages.items()}
    again = run(resolve(config), Silence(), until="report")
    assert {name: stage.manifest()["finished"] for name, stage in again.stages.items()} == before
    assert revisit(again.setup, Silence()).stages["report"].path == finished.stages["report"].path


def test_it_changes_nothing_of_the_run_itself(config: Config, finished: Run) -> None:
    quiet = resolve(with_overrides(config, ["evaluation.task_loss_alone=false"]))
    stages = locate(quiet)
    assert stages["evaluate"].path == finished.stages["evaluate"].path
    assert stages["report"].path != finished.stages["report"].path
    summary = run(quiet, Silence()).summary
    assert summary["task_loss_alone"] is None
    assert summary["splits"] == finished.summary["splits"]


@pytest.mark.parametrize("error", [UnmovedError, TrainingError])
def test_where_the_task_loss_trains_nothing_the_run_goes_on(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[TrainingError]
) -> None:
    """As with one expert a token whose weight is scaled to 1, or where the guard stops it in its first epoch."""
    whole = pipeline.run

    def refused(setup, *arguments, **options):  # type: ignore[no-untyped-def]
        if setup.config.finetune.regularizer.kind == "none":
            raise error("nothing to follow")
        return whole(setup, *arguments, **options)

    monkeypatch.setattr(pipeline, "run", refused)
    found = refused(resolve(config.model_copy(update={"storage": str(tmp_path)})), Silence(), until="report")
    assert found.summary["task_loss_alone"] is None
    assert ALONE not in found.stages
    assert found.stages["report"].complete


def test_a_report_trains_nothing(config: Config, finished: Run, tmp_path: Path) -> None:
    """Of a run that was killed before it was trained by the task loss alone."""
    storage = tmp_path / "storage"
    shutil.copytree(finished.setup.store.root, storage)
    setup = resolve(config.model_copy(update={"storage": str(storage)}))
    other = without_regularizer(setup)
    assert other is not None
    alone = locate(other)
    for name in ("finetune", "evaluate", "report"):
        shutil.rmtree(alone[name].path, ignore_errors=True)
    said: list[str] = []

    class Heard(Silence):
        def say(self, text: str) -> None:
            said.append(text)

    found = revisit(setup, Heard())
    assert found.stages["report"].complete
    assert found.summary["task_loss_alone"] is None
    assert not alone["finetune"].complete
    assert any("no training by the task loss alone" in line for line in said)
    run(setup, Silence(), until="report")
    assert revisit(setup, Silence()).summary["task_loss_alone"] == finished.summary["task_loss_alone"]


def test_what_the_probe_has_told_is_not_tried(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("nothing can be trained")

    monkeypatch.setattr(pipeline, "is_unreached", lambda probe: True)
    monkeypatch.setattr(pipeline, "_run_alone", never)
    told = Told()
    run(resolve(with_overrides(config, ["finetune.epochs=1"])), told)
    assert any("by the task loss alone nothing can be trained" in line for line in told.lines)


def test_no_second_training_of_the_same(config: Config) -> None:
    for override in ("finetune.regularizer.kind=none", "finetune.regularizer.weight=0"):
        assert without_regularizer(resolve(with_overrides(config, [override]))) is None


WON, LOST = np.array([0, 1] * 40), np.zeros(80, int)


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        (LOST, WON, "The regularizer adds to what"),
        (WON, WON, "is not shown"),
        (WON, LOST, "The task loss alone does better"),
    ],
)
def test_words(first: np.ndarray, second: np.ndarray, wanted: str) -> None:
    found = {"alone": pair(LOST, first).plain(), "added": pair(first, second).plain()}
    assert wanted in added_words(found)
    assert [row[0] for row in added_rows(found)] == ["task loss", "+ regularizer"]
