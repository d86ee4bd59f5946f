"""MLflow follows the artifacts: live, once, through re-runs, kills and outages, against a real database and a real server."""

from __future__ import annotations

import calendar
import contextlib
import dataclasses
import json
import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from roma_ray.cli.printing import setup_of_finished
from roma_ray.config.schema import TrackingConfig
from roma_ray.engine.collapse import FIGURES
from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import read_table
from roma_ray.engine.runners import LOCAL
from roma_ray.engine.setup import Setup, resolve
from roma_ray.errors import ConfigError, TrainingError
from roma_ray.runs.pipeline import STEPS, Run, locate, replay, run
from roma_ray.stages.preparation import QUESTIONS
from roma_ray.store.artifacts import MANIFEST, Stage, _content_digest, run_identity, write_json
from roma_ray.tracking import Tracker, delivery, run_records
from roma_ray.tracking.mlflow import Mlflow
from tests.making import made
from tests.tracking.support import Said, copied, free_port, ledger, served
from tests.world import make_world

CANARY = "kanari3nvogel"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture(scope="module")
def finished(root: Path) -> Run:
    """A whole run that nobody recorded; ten test questions, so that the report needs no t-SNE."""
    return run(resolve(make_world(root / "world", count=30)), Silence(), until="report")


def tracked_setup(finished: Run, uri: str | None, **changes: Any) -> Setup:
    """The finished run's set-up with another tracking address; `changes` of the configuration."""
    tracking = TrackingConfig(uri=uri, system_metrics=False)
    config = finished.setup.config.model_copy(update={"tracking": tracking, **changes})
    return dataclasses.replace(finished.setup, config=config)


def record(setup: Setup) -> Said:
    said = Said()
    with Tracker(setup, said) as observer:
        replay(setup, observer)
    return said


def artifacts(uri: str, run_id: str, folder: str | None = None) -> set[str]:
    from mlflow import MlflowClient

    return {a.path for a in MlflowClient(tracking_uri=uri, registry_uri=uri).list_artifacts(run_id, folder)}


def test_a_parent_and_a_child_for_each_stage(finished: Run, database: str, capfd: pytest.CaptureFixture[str]) -> None:
    said = record(tracked_setup(finished, database))
    runs = ledger(database)
    assert set(runs) == {"pipeline", *list(STEPS)}
    parent, figures = runs["pipeline"]
    for name in list(STEPS):
        child, _ = runs[name]
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.tags["roma.fingerprint"] == finished.stages[name].fingerprint
        assert (child.info.status, child.info.run_name) == ("FINISHED", name)
        assert child.info.end_time >= child.info.start_time
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == finished.setup.config.name
    assert parent.data.params["finetune.learning_rate"] == "0.01"
    assert parent.data.params["questions.sources.0.path"].endswith("questions.jsonl")
    assert not {"storage", "name", "tracking.uri"} & set(parent.data.params)
    summary = finished.summary["splits"]["test"]["all"]
    assert figures["test/all/tuned_accuracy"] == [(0, summary["tuned_accuracy"])]
    for name, found in finished.summary["measures"]["figures"].items():
        for over in ("micro", "macro"):
            assert figures[f"measures/{name}/{over}/difference"] == [(0, found[over]["difference"])]
    assert figures["test/all/mcnemar_p"] == [(0, summary["mcnemar_p"])]
    assert parent.data.tags["roma.evaluation_pin"] == finished.summary["evaluation_pin"]
    assert parent.data.tags["roma.model_identity"] == finished.setup.model_identity
    assert f"{100 * summary['difference']:+.2f}" in parent.data.tags["mlflow.note.content"]
    assert len(said.lines) == 1, said.lines
    assert capfd.readouterr() == ("", ""), "MLflow and its libraries must be silent"


def test_metrics_are_those_of_the_stages_files(finished: Run, database: str) -> None:
    record(tracked_setup(finished, database))
    runs = ledger(database)
    steps = read_table(finished.stages["finetune"].path / "steps.parquet").to_pydict()
    _, history = runs["finetune"]
    assert history["step/task_loss"] == [(n + 1, v) for n, v in zip(steps["step"], steps["task_loss"], strict=True)]
    epochs = finished.summary["epochs"]
    assert history["epoch/validation_accuracy"] == [(e["epoch"] + 1, e["validation_accuracy"]) for e in epochs]
    assert len(history["epoch/questions_per_second"]) == len(epochs)
    assert [value for _, value in history["epoch/collapse_findings"]] == [0.0] * len(epochs)
    for name in FIGURES:
        for n, number in enumerate(epochs[0]["routing"]["layers"]):
            expected = [(e["epoch"] + 1, e["routing"][name][n]) for e in epochs]
            assert history[f"epoch/layer_{number}/{name}"] == expected
    assert runs["neighbors"][1]["successful"] == [(0, finished.summary["neighborhoods"]["successful"])]
    layer = finished.summary["diagnostics"]["layers"][0]
    assert runs["evaluate"][1][f"layer_{layer}/routing_kl"] == [(0, finished.summary["diagnostics"]["routing_kl"][0])]


def test_files_and_inputs_are_recorded(finished: Run, database: str, tmp_path: Path) -> None:
    record(tracked_setup(finished, database))
    runs = {name: found for name, (found, _) in ledger(database).items()}
    parent = runs["pipeline"]
    assert {"report.html", "report.md", "model_card.md", "figures", "tables"} <= artifacts(database, parent.info.run_id)
    assert "figures/accuracy.svg" in artifacts(database, parent.info.run_id, "figures")
    adapter = artifacts(database, runs["finetune"].info.run_id, "adapter")
    assert {"adapter/adapter_model.safetensors", "adapter/roma.json"} <= adapter
    assert "model" not in artifacts(database, runs["finetune"].info.run_id)
    used = {i.dataset.name: (i.dataset.digest, i.tags[0].value) for i in parent.inputs.dataset_inputs}
    assert set(used) == {"questions.jsonl", "embeddings.safetensors"}
    whole = finished.stages["embed"].manifest()["files"]["embeddings.safetensors"]["sha256"]
    assert used["embeddings.safetensors"] == (whole[:16], "task embedding")
    place = parent.info.artifact_uri
    assert place.startswith(f"file://{finished.setup.store.root}"), "relative places depend on who looks"
    with contextlib.closing(sqlite3.connect(database.removeprefix("sqlite:///"))) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_the_adapter_is_a_model_of_the_run_and_registered_when_asked(finished: Run, database: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=database, registry_uri=database)
    setup = tracked_setup(finished, database)
    record(setup)
    parent, _ = ledger(database)["pipeline"]
    (model,) = client.search_logged_models([parent.info.experiment_id])
    assert [output.model_id for output in parent.outputs.model_outputs] == [model.model_id]
    assert (str(model.status), model.source_run_id) == ("READY", parent.info.run_id)
    assert model.params["finetune"] == finished.stages["finetune"].fingerprint
    kept = {file.path for file in client.list_logged_model_artifacts(model.model_id)}
    assert {"MLmodel", "adapter_model.safetensors", "roma.json"} <= kept
    assert client.search_registered_models() == []
    tracking = setup.config.tracking.model_copy(update={"register_model": "routers"})
    asked = dataclasses.replace(setup, config=setup.config.model_copy(update={"tracking": tracking}))
    for _ in range(2):
        assert len(record(asked).lines) == 1
    (version,) = client.search_model_versions("name='routers'")
    assert (str(version.version), version.run_id, version.source) == ("1", parent.info.run_id, model.artifact_location)
    assert len(client.search_logged_models([parent.info.experiment_id])) == 1


def test_the_whole_model_is_stored_when_asked(finished: Run, database: str) -> None:
    setup = tracked_setup(finished, database)
    tracking = setup.config.tracking.model_copy(update={"log_model": True})
    record(dataclasses.replace(setup, config=setup.config.model_copy(update={"tracking": tracking})))
    child, _ = ledger(database)["finetune"]
    assert any(name.endswith(".safetensors") for name in artifacts(database, child.info.run_id, "model"))
    assert not (setup.store.root / ".merged").exists() or not list((setup.store.root / ".merged").iterdir())


def test_a_repeated_run_writes_nothing_twice(finished: Run, database: str) -> None:
    record(tracked_setup(finished, database))
    first = ledger(database)
    # Settings outside the identity may differ, and MLflow refuses another value of a parameter.
    finetune = finished.setup.config.finetune.model_copy(update={"checkpoint_steps": 7})
    said = record(tracked_setup(finished, database, name="renamed", finetune=finetune))
    second = ledger(database)
    assert {name: found.info.run_id for name, (found, _) in second.items()} == {
        name: found.info.run_id for name, (found, _) in first.items()
    }
    for name in first:
        assert second[name][1] == first[name][1]
        assert second[name][0].data.params == first[name][0].data.params
        assert len(second[name][0].inputs.dataset_inputs) == len(first[name][0].inputs.dataset_inputs)
    assert second["pipeline"][0].info.run_name == "renamed"
    assert len(said.lines) == 1, said.lines


def test_an_unchanged_repeat_uploads_nothing(finished: Run, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tracked_setup(finished, database))
    uploads: list[Path] = []
    monkeypatch.setattr(Mlflow, "upload", lambda self, run, path, folder=None: uploads.append(path))
    record(tracked_setup(finished, database))
    assert uploads == []


class Watch(Tracker):
    """Looks at what MLflow holds right after each event."""

    def __init__(self, setup: Setup, said: Said, look: Callable[[str], None]) -> None:
        super().__init__(setup, said)
        self.look = look

    def epoch(self, stage: Stage) -> None:
        super().epoch(stage)
        self.look("epoch")

    def stage_finished(self, stage: Stage) -> None:
        super().stage_finished(stage)
        self.look(stage.name)


def again(finished: Run, uri: str | None, seed: int) -> Setup:
    """A set-up that shares nothing but the model with the finished run: all stages have work to do."""
    tracking = TrackingConfig(uri=uri, system_metrics=False)
    return resolve(finished.setup.config.model_copy(update={"tracking": tracking, "seed": seed}))


def test_epochs_and_states_are_there_while_it_runs(finished: Run, database: str) -> None:
    seen: list[tuple[str, list[int], str, str]] = []

    def look(event: str) -> None:
        runs = ledger(database)
        if "finetune" in runs:
            child, history = runs["finetune"]
            epochs = [step for step, _ in history.get("epoch/task_loss", [])]
            seen.append((event, epochs, child.info.status, runs["pipeline"][0].info.status))

    setup, said = again(finished, database, seed=1), Said()
    watch = Watch(setup, said, look)
    run(setup, Silence(), observer=watch)
    assert seen[:3] == [
        ("epoch", [1], "RUNNING", "RUNNING"),
        ("epoch", [1, 2], "RUNNING", "RUNNING"),
        ("finetune", [1, 2], "FINISHED", "RUNNING"),
    ]
    watch.close()
    assert {found.info.status for found, _ in ledger(database).values()} == {"FINISHED"}


def test_a_run_starts_when_it_was_started_and_names_where_its_stages_were_made(
    finished: Run, database: str, tmp_path: Path
) -> None:
    shutil.copytree(finished.setup.store.root, tmp_path / "storage")
    tracking = TrackingConfig(uri=database, system_metrics=False)
    changes = {"storage": str(tmp_path / "storage"), "tracking": tracking}
    old = resolve(finished.setup.config.model_copy(update=changes))
    week_ms = 7 * 24 * 3600 * 1000
    for stage in locate(old).values():
        aged(stage, week_ms // 1000)
    (old.store.root / ".begun" / run_identity(locate(old))).write_text(str(time.time() - week_ms / 1000 - 1800))
    record(old)
    before = time.time() * 1000
    finetune = finished.setup.config.finetune.model_copy(update={"learning_rate": 0.02})
    new = resolve(finished.setup.config.model_copy(update={**changes, "finetune": finetune}))
    with Tracker(new, Said()) as tracker:
        run(new, Silence(), until="finetune", observer=tracker)
    past, present = (runs_of(database, run_identity(locate(setup))) for setup in (old, new))
    assert past["pipeline"].info.end_time - past["pipeline"].info.start_time < 3600 * 1000
    assert past["pipeline"].info.end_time < before - week_ms + 3600 * 1000
    assert all(name == "pipeline" or "roma.reused" not in found.data.tags for name, found in past.items())
    assert before <= present["pipeline"].info.start_time <= present["pipeline"].info.end_time
    assert present["pipeline"].data.tags["roma.reused_stages"] == "questions, extract, embed, neighbors"
    for name in ("questions", "extract", "embed", "neighbors"):
        assert present[name].data.tags["roma.reused"] == "true"
        assert present[name].data.tags["roma.made_in"] == past[name].info.run_id
        assert present[name].info.start_time == past[name].info.start_time
    assert "roma.reused" not in present["finetune"].data.tags
    # Delivered later, it is the same.
    other = tracking.model_copy(update={"experiment": "later"})
    later = dataclasses.replace(new, config=new.config.model_copy(update={"tracking": other}))
    record(later)
    again = runs_of(database, run_identity(locate(new)), "later")
    assert again["pipeline"].info.start_time == present["pipeline"].info.start_time
    assert again["extract"].data.tags["roma.reused"] == "true"
    assert "roma.reused" not in again["finetune"].data.tags


def aged(stage: Stage, seconds: int) -> None:
    """Make a complete stage older."""
    content = json.loads((stage.path / MANIFEST).read_text())
    del content["digest"]
    finished = calendar.timegm(time.strptime(content["finished"], "%Y-%m-%dT%H:%M:%SZ")) - seconds
    content["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(finished))
    write_json(stage.path / MANIFEST, {**content, "digest": _content_digest(content)})


def runs_of(uri: str, identity: str, experiment: str = "roma-ray") -> dict[str, Any]:
    """The MLflow runs of one pipeline run, by stage."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    place = client.get_experiment_by_name(experiment)
    assert place is not None
    found = client.search_runs([place.experiment_id], f"tags.`roma.run` = '{identity}'")
    return {run.data.tags["roma.stage"]: run for run in found}


def test_a_failed_run_says_so_until_it_succeeds(finished: Run, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = again(finished, database, seed=2)

    def broken(*arguments: Any, **named: Any) -> None:
        raise TrainingError("a gate's gradient is not finite")

    runners = dataclasses.replace(LOCAL, finetune=broken)
    with pytest.raises(TrainingError), Tracker(setup, Said()) as observer:
        run(setup, Silence(), runners, observer=observer)
    states = {name: found for name, (found, _) in ledger(database).items()}
    assert states["extract"].info.status == "FINISHED"
    assert states["finetune"].info.status == states["pipeline"].info.status == "FAILED"
    assert "not finite" in states["pipeline"].data.tags["roma.error"]
    with Tracker(setup, Said()) as observer:
        run(setup, Silence(), observer=observer)
    states = {name: found for name, (found, _) in ledger(database).items()}
    assert {found.info.status for found in states.values()} == {"FINISHED"}
    assert "roma.error" not in states["pipeline"].data.tags


def test_a_killed_run_goes_on_as_the_same_one(finished: Run, database: str) -> None:
    setup = tracked_setup(finished, database)
    planned = locate(setup)
    killed = Tracker(setup, Said())
    killed.started(planned)
    killed.stage_started(planned["questions"])  # and nothing more: the process is gone
    before = {name: found.info.run_id for name, (found, _) in ledger(database).items()}
    assert set(before) == {"pipeline", "questions"}
    record(setup)
    after = ledger(database)
    assert {found.info.status for found, _ in after.values()} == {"FINISHED"}
    assert all(after[name][0].info.run_id == run_id for name, run_id in before.items())


def test_a_run_up_to_a_stage_ends_there_also_when_it_is_delivered_later(finished: Run, database: str) -> None:
    setup = again(finished, database, seed=4)
    part = run(setup, Silence(), until="extract")
    record(setup)
    states = {name: found.info.status for name, (found, _) in ledger(database).items()}
    assert states == dict.fromkeys(("pipeline", *part.stages), "FINISHED")


def test_what_is_refused_holds_up_nothing_else(finished: Run, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = run_records.stage_parameters

    def spoiled(stage: Stage) -> Mapping[str, str]:
        return {"..": "no such name"} if stage.name == "embed" else genuine(stage)

    monkeypatch.setattr(run_records, "stage_parameters", spoiled)
    said = record(tracked_setup(finished, database))
    runs = ledger(database)
    assert {name for name, (found, _) in runs.items() if found.info.status != "FINISHED"} == {"embed"}
    assert len(said.about("does not take all of `embed`")) == 1
    assert len(said.about("still lacks: embed.")) == 1


def test_a_server_that_is_down_then_up_then_gone_and_back(
    finished: Run, empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(empty_database, tmp_path / "mlflow.db")
    port = free_port()
    # No configuration may hold such an address.
    uri = f"http://user:{CANARY}@127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    # Down from start to end: told once, the gap is told, nothing fails.
    said = record(tracked_setup(finished, None))
    assert len(said.about("cannot be used (connection refused)")) == 1
    assert len(said.about("roma-ray track")) == 1
    # Gone in the middle of a run, back before its end.
    monkeypatch.setattr(delivery, "RETRY_SECONDS", 0.0)
    setup, said = again(finished, None, seed=3), Said()
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:

        def look(event: str) -> None:
            if event == "epoch" and not said.about("cannot be used"):
                first.close()
            if event == "finetune":
                assert said.about("cannot be used")
                second.enter_context(served(port, tmp_path, tmp_path / "mlflow.db"))

        first.enter_context(served(port, tmp_path, tmp_path / "mlflow.db"))
        watch = Watch(setup, said, look)
        run(setup, Silence(), observer=watch)
        watch.close()
        assert len(said.about("cannot be used")) == 1
        assert len(said.about("MLflow is back")) == 1
        assert not said.about("still lacks")
        runs = ledger(uri)
        assert {found.info.status for found, _ in runs.values()} == {"FINISHED"}
        assert [step for step, _ in runs["finetune"][1]["epoch/task_loss"]] == [1, 2]
        expected = read_table(locate(setup)["finetune"].path / "steps.parquet").column("task_loss").to_pylist()
        assert [value for _, value in runs["finetune"][1]["step/task_loss"]] == expected
        assert "adapter" in artifacts(uri, runs["finetune"][0].info.run_id)
        page = f"http://127.0.0.1:{port}/#/experiments/{runs['pipeline'][0].info.experiment_id}/runs/"
        assert said.lines[-1] == f"MLflow: {page}{runs['pipeline'][0].info.run_id}"
    for folder in (tmp_path, setup.store.root):
        for path in folder.rglob("*"):
            assert not path.is_file() or CANARY.encode() not in path.read_bytes().lower(), path
    assert CANARY not in " ".join(said.lines)


def test_system_metrics_are_those_of_the_machine(finished: Run, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    setup = tracked_setup(finished, database)
    config = setup.config.model_copy(update={"tracking": TrackingConfig(uri=database, system_metrics=True)})
    setup = dataclasses.replace(setup, config=config)
    planned = locate(setup)
    with Tracker(setup, Said()) as observer:
        observer.started(planned)
        observer.stage_started(planned["questions"])
        time.sleep(1.5)
    _, history = ledger(database)["pipeline"]
    assert history["system/system_memory_usage_megabytes"][0][1] > 0
    assert any(key.startswith("system/cpu") for key in history)


def test_addresses(finished: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    inside = tracked_setup(finished, "sqlite:///runs.db")
    assert Mlflow.address(inside.config, inside.store) == f"sqlite:///{tmp_path}/runs.db"
    default = tracked_setup(finished, "x:")
    default = dataclasses.replace(default, config=default.config.model_copy(update={"tracking": TrackingConfig()}))
    assert Mlflow.address(default.config, default.store) == f"sqlite:///{default.store.root}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert Mlflow.address(default.config, default.store) == "http://tracker:5000"
    assert Mlflow.address(inside.config, inside.store).startswith("sqlite")
    from roma_ray.config.loading import load_config

    for folder in ("./mlruns", "file:///tmp/mlruns"):
        with pytest.raises(ConfigError, match="plain folders"):
            load_config(None, [f"tracking.uri={folder}"])


def test_names_of_tasks_stay_apart_and_are_taken() -> None:
    names = ["a/b", "a_b", "a.b", "..", "/", "x" * 200, "x" * 201, "漢", "字", "all"]
    keys = [run_records.task_name(name) for name in names]
    assert len(set(keys)) == len(names)
    assert keys[1] == "a_b"
    assert keys[-1] == "all"
    assert all(set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") and len(key) < 120 for key in keys)


def test_tracking_is_no_part_of_any_identity(finished: Run) -> None:
    other = tracked_setup(finished, "http://elsewhere:1")
    assert {n: s.fingerprint for n, s in locate(other).items()} == {
        n: s.fingerprint for n, s in finished.stages.items()
    }


def test_no_commit_where_git_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert run_records.git_tags() == {}


def test_a_part_run_on_gpus_is_found_from_a_machine_without(tmp_path: Path) -> None:
    config = make_world(tmp_path, count=24).model_copy(update={"device": "auto"})
    config = config.model_copy(update={"model": config.model.model_copy(update={"experts_backend": "eager"})})
    there = resolve(config, device="cuda")
    made(QUESTIONS, there)
    stage = locate(there)["extract"]
    with stage.exclusive():
        stage.finish(facts={}, seconds=1.0)
    assert setup_of_finished(config).model.device == "cuda"
