"""An upgrade of a library serves old artifacts only aloud, and not at all where equality is demanded."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from roma_ray import versions
from roma_ray.ablations.plan import make_plan
from roma_ray.ablations.space import load_space
from roma_ray.ablations.sweep import FAILED, WAITING, open_sweep, other_versions, prepare_shared
from roma_ray.ablations.trial import TrialWork, do_trial
from roma_ray.baselines.method_runs import run_methods
from roma_ray.benchmarks.judge import Wanted, judge
from roma_ray.benchmarks.judged_model import resolve_subject
from roma_ray.config.loading import parse_config
from roma_ray.config.schema import Config
from roma_ray.engine.heads import FRESH
from roma_ray.engine.progress import Silence
from roma_ray.engine.setup import Setup, resolve
from roma_ray.engine.work import serial
from roma_ray.errors import ArtifactError
from roma_ray.evaluation.benchmark_results import read_benchmarks
from roma_ray.runs.pipeline import Run, run
from roma_ray.stages.finetuning import ADAPTER
from roma_ray.stages.run_summary import warnings_of
from roma_ray.store.artifacts import Stage, Store
from tests.world import make_world

Upgrade = Callable[..., None]


class Told(Silence):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def upgrade(monkeypatch: pytest.MonkeyPatch) -> Upgrade:
    """Installs other versions, as far as this project can see."""
    original = versions._installed

    def to(**changed: str) -> None:
        named = {name.replace("_", "-"): version for name, version in changed.items()}
        monkeypatch.setattr(
            versions, "_installed", lambda names: {**original(names), **{n: v for n, v in named.items() if n in names}}
        )

    return to


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("versions")
    config = make_world(root, count=36, questions={"sources": [{"path": str(root / "questions.jsonl")}], "seed": 0})
    return run(resolve(config), Silence())


def demanding(config: Config) -> Config:
    return parse_config({**config.model_dump(mode="json"), "reuse": "same_versions"})


def made(store: Store) -> Stage:
    stage = store.stage("extract", {"a": 1}, {}, 1)
    with stage.exclusive():
        stage.finish(facts={}, seconds=0)
    return stage


def interrupted(stage: Stage, *written: str) -> None:
    with stage.exclusive():
        for name in written:
            (stage.path / name).write_text("done")
        raise KeyboardInterrupt


def test_a_stage_tells_of_the_libraries_that_decide_its_bits_and_of_no_others(tmp_path: Path, upgrade: Upgrade) -> None:
    stage, torch = made(Store(tmp_path)), versions.library_versions()["torch"]
    upgrade(mlflow="99.0", sentence_transformers="99.0")
    assert stage.other_versions() is None
    upgrade(torch="99.0", mlflow="99.0")
    assert f"extract: made by torch {torch} (here: torch 99.0)" in str(stage.other_versions())
    strict = Store(tmp_path, "same_versions").stage("extract", {"a": 1}, {}, 1)
    assert strict.fingerprint == stage.fingerprint, "versions are no part of the identity"
    with pytest.raises(
        ArtifactError, match=rf"torch {re.escape(torch)} .*same_versions. refuses it.*remove {stage.path}"
    ):
        strict.verify()
    with pytest.raises(ArtifactError, match="same_versions"):
        assert strict.reusable
    stage.verify()


def test_work_that_goes_on_after_an_upgrade_is_of_both(tmp_path: Path, upgrade: Upgrade) -> None:
    stage, torch = Store(tmp_path).stage("extract", {"a": 1}, {}, 1), versions.library_versions()["torch"]
    with pytest.raises(KeyboardInterrupt):
        interrupted(stage, "half")
    upgrade(torch="99.0")
    strict = Store(tmp_path, "same_versions").stage("extract", {"a": 1}, {}, 1)
    with pytest.raises(ArtifactError, match=f"torch {re.escape(torch)}"), strict.exclusive():
        raise AssertionError("begun all the same")
    with stage.exclusive():
        stage.finish(facts={}, seconds=0)
    assert {maker["torch"] for maker in stage.makers()} == {torch, "99.0"}
    assert f"made by torch {torch} (here: torch 99.0)" in str(stage.other_versions())


def test_what_ends_before_it_writes_anything_leaves_no_folder(tmp_path: Path) -> None:
    stage = Store(tmp_path).stage("extract", {"a": 1}, {}, 1)
    with pytest.raises(KeyboardInterrupt):
        interrupted(stage)
    assert not stage.path.exists()


def test_a_run_says_it_on_screen_and_in_its_summary(finished: Run, upgrade: Upgrade) -> None:
    assert finished.summary["other_versions"] == []
    upgrade(transformers="99.0")
    told = Told()
    again = run(resolve(finished.setup.config), told)
    named = ["questions", "extract", "embed", "finetune", "evaluate"]
    assert [line.partition(":")[0] for line in again.summary["other_versions"]] == named
    assert [line for line in told.lines if line.startswith("note: ")] == [
        f"note: {line}" for line in again.summary["other_versions"]
    ]
    assert set(again.summary["other_versions"]) <= set(warnings_of(again.summary))
    with pytest.raises(ArtifactError, match="questions: made by transformers"):
        run(resolve(demanding(finished.setup.config)), Silence())


def test_base_scores_of_other_versions_are_told_by_the_evaluation(finished: Run, upgrade: Upgrade) -> None:
    """The base's side of the comparison is kept for later trainings."""
    config = finished.setup.config
    changed = config.finetune.model_copy(update={"learning_rate": 0.02})
    upgrade(torch="99.0")
    later = run(resolve(config.model_copy(update={"finetune": changed})), Silence())
    assert later.stages["finetune"].other_versions() is None
    assert "evaluate: made by torch" in str(later.stages["evaluate"].other_versions())


def sweep_of(config: Config, folder: Path, **content: Any) -> Any:
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({"base": config.model_dump(mode="json"), **content}, sort_keys=False))
    return open_sweep(make_plan(load_space(path)))


def test_a_sweep_says_it_of_finished_trials_and_of_what_trials_share(
    finished: Run, tmp_path: Path, upgrade: Upgrade
) -> None:
    config, another = finished.setup.config, {"grid": {"finetune.epochs": [1]}}
    upgrade(torch="99.0")
    sweep = sweep_of(config, tmp_path, **another)
    assert any("1 finished trial(s): finetune: made by torch" in line for line in other_versions(sweep))
    told = Told()
    prepare_shared(sweep, progress=told)
    assert any(line.startswith("note: extract: made by torch") for line in told.lines)
    assert [state.state for state in sweep.having(WAITING)] == [WAITING]

    strict = sweep_of(demanding(config), tmp_path, **another)
    (done,) = strict.having(FAILED)
    assert "same_versions" in done.error
    (waiting,) = strict.having(WAITING)
    prepare_shared(strict)
    assert waiting.state == FAILED
    assert "extract: made by torch" in waiting.error
    planned = waiting.planned
    with pytest.raises(ArtifactError, match="same_versions"):
        do_trial(TrialWork(planned.trial.id, planned.setup, planned.stages), lambda record: None, FRESH)


def methods(setup: Setup, finished: Run, told: Told) -> None:
    run_methods(setup, finished.stages, ["base"], 1, serial, told)


def test_baselines_say_it_and_refuse(finished: Run, upgrade: Upgrade) -> None:
    methods(finished.setup, finished, Told())
    upgrade(torch="99.0")
    told = Told()
    methods(finished.setup, finished, told)
    assert any("note: base, baselines: made by torch" in line for line in told.lines)
    with pytest.raises(ArtifactError, match="same_versions"):
        methods(resolve(demanding(finished.setup.config)), finished, Told())


def test_benchmarks_say_it_and_refuse(finished: Run, tmp_path: Path, upgrade: Upgrade) -> None:
    config, adapter = finished.setup.config, str(finished.stages["finetune"].path / ADAPTER)
    subject = replace(resolve_subject(config, adapter=adapter), keep_states=True)
    wanted = Wanted((str(config.questions.sources[0].path),), limit=2)

    def judged(store: Store, told: Told) -> Stage:
        return judge(config, subject, wanted, store, serial, told)

    first = judged(Store(tmp_path), Told())
    assert read_benchmarks(first.path)["other_versions"] == []
    upgrade(torch="99.0")
    told = Told()
    assert judged(Store(tmp_path), told).path == first.path
    assert any(line.startswith("note: requests: made by torch") for line in told.lines)
    assert ["requests" in line for line in read_benchmarks(first.path)["other_versions"]] == [True]
    with pytest.raises(ArtifactError, match="same_versions"):
        judged(Store(tmp_path, "same_versions"), Told())
    # The trunk's states, kept for the next adapter, are told of too.
    subject = replace(subject, adapter_identity="another")
    told = Told()
    judged(Store(tmp_path), told)
    assert any(line.startswith("note: states: made by torch") for line in told.lines)
