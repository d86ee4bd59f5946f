"""Sweeps on Ray Tune: shared work once, the local bits, deaths, failures, resumes, schedulers, MLflow, the report."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.air.execution._internal import event_manager

from roma_ray.ablations.plan import make_plan
from roma_ray.ablations.space import Space, load_space
from roma_ray.ablations.sweep import DONE, FAILED, STOPPED, Sweep, open_sweep, run_sweep
from roma_ray.ablations.sweep_command import failures, result, revisit, summary
from roma_ray.ablations.sweep_observers import progress_of, table_of
from roma_ray.ablations.sweep_report import write_report
from roma_ray.ablations.sweep_results import read_findings
from roma_ray.ablations.sweep_tracker import SweepTracker
from roma_ray.ablations.tuning import make_room
from roma_ray.cli.printing import setup_of_finished
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.config.loading import load_config
from roma_ray.config.schema import Config
from roma_ray.engine.progress import Silence
from roma_ray.errors import ConfigError
from roma_ray.runs.pipeline import Run, locate
from roma_ray.store.artifacts import MANIFEST, file_digest
from roma_ray.tracking.mlflow import Mlflow
from tests.cluster.support import DEADLY_RATE, ForMemory, counts_epochs, dies

WEIGHTS = "adapter/adapter_model.safetensors"


def space_of(world: Config, folder: Path, storage: str | None = None, **content: Any) -> Space:
    base = world.model_copy(update={"storage": storage or str(folder / "storage")}).model_dump(mode="json")
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({"name": "grid", "base": base, **content}, sort_keys=False))
    return load_space(path)


def manifests(folder: Path) -> dict[str, int]:
    """When each complete stage was finished."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.glob(f"*/*/{MANIFEST}")}


def alone(cluster: Cluster, **settings: Any) -> Cluster:
    """The cluster for trials of one worker: two at a time."""
    changed = cluster.config.ray.model_copy(update={"finetune_workers": None, **settings})
    other = Cluster(cluster.config.model_copy(update={"ray": changed}))
    assert other.connected
    return other


def run(space: Space, cluster: Cluster, **options: Any) -> Sweep:
    plan = make_plan(space, "cpu")
    with SweepTracker(plan, Silence()) as follower:
        sweep = run_sweep(plan, cluster, Silence(), [follower], **options)
        write_report(sweep, Silence())
        follower.finished(sweep)
    return sweep


def test_a_sweep(
    local_run: Run, world: Config, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One extraction for two cuts and two token rules; each trial's bits are a single run's; failures stay alone."""
    space = space_of(
        world,
        tmp_path,
        paper="deepseek",
        one_at_a_time={
            "layers": {"setting": "routing.layers", "values": ["F2", "L2"]},
            "tokens": {"setting": "routing.tokens", "values": ["First1"]},
            "neighbors": {"levels": {
                "none near": {"neighbors.method": "epsilon", "neighbors.epsilon": 0.9999, "neighbors.similarity": "cosine"}
            }},
            "rate": {"setting": "finetune.learning_rate", "values": [1.0e37, DEADLY_RATE]},
        },
    )  # fmt: skip
    # As when Ray's memory monitor ends trials' processes: one of them once, one whenever it is tried.
    monkeypatch.setattr(event_manager, "ray", ForMemory())
    sweep = run(space, alone(cluster, max_failures=1), do=dies)
    states = {state.trial.name: state for state in sweep.states.values()}
    assert {name: state.state for name, state in states.items()} == {
        "centre": DONE,
        "layers=F2": DONE,
        "tokens=First1": DONE,
        "neighbors=none near": FAILED,
        "rate=1e+37": FAILED,
        "rate=0.5": FAILED,
    }
    assert (tmp_path / "storage" / ".tries").read_text() == "xx"
    told = "\n".join(failures(sweep))
    assert "neighbors=none near: neighbors: " in told
    assert "learning_rate" in told
    assert "rate=0.5: its process died 2 time(s); most likely memory ran out" in told
    storage = tmp_path / "storage"
    # The trunk ran once, for both cuts: one folder, one batch of states a cut and planned batch.
    (extraction,) = (storage / "extract").glob(f"*/{MANIFEST}")
    facts = json.loads(extraction.read_text())
    assert facts["identity"]["settings"]["cuts"] == [0, 4]
    assert set(facts["identity"]["settings"]["tokens"]) == {"First1", "Last1"}
    assert len(list((storage / "embed").glob(f"*/{MANIFEST}"))) == 1
    # The base model was scored once for each cut and token rule, though every trial compares itself to it.
    assert len(list((storage / "base").glob(f"*/{MANIFEST}"))) == 3
    # Its process died in training, and on an extraction that serves others too: not a bit differs from a single run.
    centre = states["centre"].planned.stages["finetune"].path
    assert (centre / ".died").exists()
    assert file_digest(centre / WEIGHTS) == file_digest(local_run.stages["finetune"].path / WEIGHTS)
    assert not sweep.stage.complete
    # Other commands find a trial by the configuration that its evaluation keeps, though it shares an extraction.
    judged = states["layers=F2"].planned.stages["evaluate"]
    kept = load_config(judged.path / "config.yaml")
    assert kept.name == "grid: layers=F2"
    assert locate(setup_of_finished(kept))["evaluate"].path == judged.path
    check_tracking(space, storage, sweep)
    check_report(sweep)

    before = manifests(storage)
    with SweepTracker(sweep.plan, Silence()) as follower:
        again = open_sweep(sweep.plan)
        follower.started(again)
        follower.finished(sweep)
    assert {state.trial.name for state in again.having(DONE)} == {"centre", "layers=F2", "tokens=First1"}
    check_tracking(space, storage, sweep)

    factors = {name: space.file.one_at_a_time[name] for name in ("layers", "tokens")}
    trials = tuple(trial for trial in space.trials if states[trial.name].state == DONE)
    less = dataclasses.replace(space, file=space.file.model_copy(update={"one_at_a_time": factors}), trials=trials)
    whole = run(less, alone(cluster))
    assert whole.stage.complete
    assert not failures(whole)
    assert len(manifests(storage)) == len(before) + 1
    client = Mlflow(f"sqlite:///{storage}/mlflow.db", less.centre.tracking.experiment, storage / "mlflow-artifacts")
    (parent,) = (run for run in client.runs("roma.sweep", less.identity) if run.tags["roma.trial"] == "sweep")
    assert {"best/test_accuracy", "centre/gain/difference", "centre/gain/stderr"} <= parent.metrics


def check_tracking(space: Space, storage: Path, sweep: Sweep) -> None:
    """One parent, one child a trial however often the command runs; parameters differ only where trials do."""
    client = Mlflow(f"sqlite:///{storage}/mlflow.db", space.centre.tracking.experiment, storage / "mlflow-artifacts")
    runs = {found.tags["roma.trial"]: found for found in client.runs("roma.sweep", space.identity)}
    assert len(client.runs("roma.sweep", space.identity)) == len(runs)
    parent = runs.pop("sweep")
    assert parent.status == "FAILED"
    assert "3 trial(s) failed" in parent.tags["roma.error"]
    assert {run.tags["parent"] for run in runs.values()} == {parent.id}
    by_name = {run.tags["name"]: run for run in runs.values()}
    assert by_name["layers=F2"].tags["factor.layers"] == "F2"
    assert by_name["centre"].tags["roma.centre"] == "yes"
    assert by_name["rate=1e+37"].status == "FAILED"
    assert "learning_rate" in by_name["rate=1e+37"].tags["roma.error"]
    values = {name: client._client.get_run(by_name[name].id).data.params for name in ("centre", "layers=F2")}
    differing = {key for key in values["centre"] if values["centre"][key] != values["layers=F2"][key]}
    assert differing == {"routing.layers"}
    history = client._client.get_metric_history(by_name["layers=F2"].id, "epoch/validation_accuracy")
    assert [value.step for value in history] == [1, 2]
    assert {"test/all/difference", "step/task_loss"} <= by_name["layers=F2"].metrics
    assert "routing.layers" not in parent.params
    assert "finetune.epochs" in parent.params


def check_report(sweep: Sweep) -> None:
    """Pages, figures and tables of the finished trials, and what became of the others."""
    page, text = ((sweep.stage.path / name).read_text() for name in ("report.html", "report.md"))
    for part in ("Tuned layers (as the paper&#39;s Table 3)", "data:image/svg+xml", "Trials without a result", "69.4"):
        assert part in page, part
    assert "not finished" in text
    assert (sweep.stage.path / "figures" / "factor_1.png").stat().st_size > 5000
    with open(sweep.stage.path / "tables" / "ranking.csv") as stream:
        rows = {row["setting"]: row for row in csv.DictReader(stream)}
    assert set(rows) == {"centre", "layers=F2", "tokens=First1"}
    assert rows["centre"]["to_centre"] == ""
    assert float(rows["layers=F2"]["to_centre_p_holm"]) >= float(rows["layers=F2"]["to_centre_p"])
    assert float(rows["centre"]["validation_stderr"]) > 0
    # One column a factor, with the centre's own level in it; every measure; which answers are given; what is by task.
    assert (rows["centre"]["layers"], rows["layers=F2"]["layers"], rows["tokens=First1"]["layers"]) == (
        "L2",
        "F2",
        "L2",
    )
    for part in (
        "Every measure on the same questions",
        "gold_logp",
        "mean of tasks",
        "right answers",
        "Centre: layers=L2",
    ):
        assert part in page, part
        assert part in text.replace("\\", ""), part
    found = result(sweep)
    assert found is not None
    assert len(found.ranking.rows) == 3
    assert found.ranking.header[:4] == ("layers", "tokens", "neighbors", "rate")
    title, header, rows_of_table = table_of(sweep)
    assert title.startswith("3 done, 3 failed of 6 trials")
    assert all(len(row) == len(header) for row in rows_of_table)
    told = summary(sweep)
    assert [trial["state"] for trial in told["trials"]] == [state.state for state in sweep.states.values()]
    findings = read_findings(sweep)
    assert findings is not None
    settings = [(r.name, list(r.seeds), r.gain.plain()) for r in findings.results]
    assert [(one["name"], one["seeds"], one["gain"]) for one in told["settings"]] == settings


def test_schedulers_and_searches(local_run: Run, world: Config, cluster: Cluster, tmp_path: Path) -> None:
    """ASHA stops the worse, and they are finished with; optuna then draws as many as were asked for, and they are kept."""
    space = space_of(
        world,
        tmp_path,
        world.storage,  # all that trials share is done there
        set={"finetune.epochs": 4, "finetune.learning_rate": 0.9},
        grid={"finetune.learning_rate": [0.8, 0.3, 0.2]},
        sample={"finetune.learning_rate": {"log_uniform": [1e-4, 0.1]}, "neighbors.k": {"choice": [1, 3]}},
        samples=3,
        search="optuna",
        scheduler={"kind": "asha", "reduction_factor": 2},
        max_concurrent=1,
    )
    plan = make_plan(space, "cpu")
    sweep = run_sweep(plan, alone(cluster), Silence(), do=counts_epochs)
    stopped = {state.trial.config.finetune.learning_rate for state in sweep.having(STOPPED)}
    assert stopped
    assert max(stopped) < 0.9
    drawn = [state for state in sweep.states.values() if state.values is not None]
    assert len(drawn) == 3
    assert len(sweep.states) == 7
    assert {state.state for state in sweep.states.values()} == {DONE, STOPPED}
    assert sweep.missing_samples == 0

    reopened = open_sweep(plan)
    assert {state.trial.id for state in reopened.having(STOPPED)} == {state.trial.id for state in sweep.having(STOPPED)}
    assert {state.trial.id for state in reopened.states.values()} == set(sweep.states)
    assert f"{len(sweep.having(STOPPED))} stopped of" in progress_of(reopened)


def test_trials_of_several_workers_never_wait_for_each_other(world: Config, cluster: Cluster) -> None:
    """As many at a time as have room for all their workers; none is a refusal."""
    room = make_room(cluster, "cpu", 10, None)  # three workers a trial
    cpus = cluster.resource("CPU")
    assert room.resources == {"CPU": 0.1}
    assert room.trials == int(cpus / (3 * 0.5 + 0.1)) >= 1
    assert make_room(cluster, "cpu", 10, 1).trials == 1
    settings = cluster.config.ray.model_copy(update={"finetune_workers": 100})
    crowded = Cluster(cluster.config.model_copy(update={"ray": settings}))
    with pytest.raises(ConfigError, match="no trial of 100 workers fits"):
        make_room(crowded, "cpu", 10, None)


def test_a_report_of_nothing(world: Config, tmp_path: Path) -> None:
    sweep, page = revisit(space_of(world, tmp_path), Silence())
    assert page is None
    assert result(sweep) is None
