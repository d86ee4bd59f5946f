"""`roma-ray baselines`: one command, one table, one parent run in MLflow, a failed method named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
from click.testing import CliRunner, Result

from roma_ray.baselines.method_registry import METHODS
from roma_ray.cli.commands import main
from roma_ray.errors import TrainingError
from tests.baselines.conftest import BASELINES
from tests.world import make_world

CHOSEN = "c3po_mode,prompt_tuning,oracle"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compared")
    config = make_world(root, count=40, baselines={**BASELINES, "learning_rates": [0.01]}, finetune={"epochs": 1})
    (root / "config.yaml").write_text(config.to_yaml())
    return root


def baselines(root: Path, *options: str) -> Result:
    arguments = ["baselines", "--local", "--quiet", "--config", str(root / "config.yaml"), *options]
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def test_a_failure_is_named_then_the_same_command_completes_the_table(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise TrainingError("the loss is not finite")

    summary = str(world / "table.json")
    with monkeypatch.context() as patch:
        patch.setattr(type(METHODS["prompt_tuning"]), "fit", fails)
        broken = baselines(world, "--methods", CHOSEN, "--summary", summary)
    assert broken.exit_code == 1
    assert "prompt_tuning failed: TrainingError: the loss is not finite" in broken.output
    rows = {row["name"]: row for row in json.loads(Path(summary).read_text())["methods"]}
    assert set(rows) == {"base", "c3po_mode", "prompt_tuning", "oracle", "oracle_control"}
    assert [name for name, row in rows.items() if "failure" in row] == ["prompt_tuning"]

    whole = baselines(world, "--methods", CHOSEN, "--summary", summary, "--seeds", "2")
    assert whole.exit_code == 0, whole.output
    found = json.loads(Path(summary).read_text())
    again = {row["name"]: row for row in found["methods"]}
    assert again["base"]["fingerprints"] == rows["base"]["fingerprints"]
    assert again["prompt_tuning"]["seeds"] == 2
    assert again["oracle"]["n"] == found["questions"] == again["base"]["n"]
    assert "equal budgets: 1 epochs over the same" in whole.output
    assert "Difference:" in whole.output
    assert "(seed 0" in whole.output, "McNemar's p of one seed of two, and the table says so"
    assert list((world / "storage" / "comparison").glob("*/comparison.json"))
    _check_mlflow(world, again)


def _check_mlflow(world: Path, rows: dict[str, Any]) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{world / 'storage' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("roma-ray").experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    parents = {run.info.run_id: run for run in runs if "mlflow.parentRunId" not in run.data.tags}
    # The first command's table had one seed, so it is another comparison; its failure stays visible.
    assert sorted(run.info.status for run in parents.values()) == ["FAILED", "FINISHED"]
    parent = next(run for run in parents.values() if run.info.status == "FINISHED")
    mine = {r.info.run_name: r for r in children if r.data.tags["mlflow.parentRunId"] == parent.info.run_id}
    assert set(mine) == set(rows)
    assert mine["prompt_tuning"].data.metrics["test/difference"] == pytest.approx(rows["prompt_tuning"]["difference"])
    history = client.get_metric_history(mine["prompt_tuning"].info.run_id, "test/accuracy")
    assert sorted(m.step for m in history) == [0, 1]
    assert parent.data.metrics["oracle/accuracy"] == pytest.approx(rows["oracle"]["accuracy"])
    assert "oracle_and_control/difference" in parent.data.metrics
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} == {"comparison.json", "comparison.md"}
    # The same command again computes nothing and writes nothing twice.
    before = {run.info.run_id: (len(run.data.metrics), run.info.end_time) for run in runs}
    assert baselines(world, "--methods", CHOSEN, "--seeds", "2").exit_code == 0
    runs = client.search_runs([client.get_experiment_by_name("roma-ray").experiment_id])
    assert {run.info.run_id: (len(run.data.metrics), run.info.end_time) for run in runs} == before
    assert len(client.get_metric_history(mine["prompt_tuning"].info.run_id, "test/accuracy")) == 2


def test_an_interrupted_comparison_ends_in_mlflow_too(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(METHODS["prompt_tuning"]), "fit", interrupted)
    options = ("--methods", "prompt_tuning", "--set", "tracking.experiment=stopped", "--set", "seed=5")
    assert baselines(world, *options).exit_code == 130
    client = mlflow.MlflowClient(f"sqlite:///{world / 'storage' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("stopped").experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.status == "KILLED"
    assert "KeyboardInterrupt" in parent.data.tags["roma.error"]
    assert "RUNNING" not in {run.info.status for run in runs}


def test_an_unreachable_server_stops_no_comparison(world: Path) -> None:
    # Nothing listens on port 9.
    found = baselines(world, "--methods", "base", "--set", "tracking.uri=http://127.0.0.1:9")
    assert found.exit_code == 0, found.output


def test_unknown_methods_are_refused_before_any_work(tmp_path: Path) -> None:
    found = CliRunner().invoke(main, ["baselines", "--local", "--methods", "romo", "--storage", str(tmp_path / "x")])
    assert found.exit_code == 2
    assert "did you mean roma?" in found.output
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("command", "shown"),
    [("local", "print_result"), ("baselines", "print_comparison"), ("evaluate", "print_benchmarks")],
)
def test_results_are_written_before_they_are_shown(
    world: Path, monkeypatch: pytest.MonkeyPatch, command: str, shown: str
) -> None:
    """A terminal that cannot show the table (a full device, a closed pipe) loses no hour of work."""

    def breaks(*_: Any) -> None:
        raise OSError("no space left on device")

    module = "roma_ray.cli.judging" if command == "evaluate" else "roma_ray.cli.printing"
    monkeypatch.setattr(f"{module}.{shown}", breaks)
    questions = world / "asked.jsonl"
    questions.write_text('{"question": "One?", "choices": ["a", "b"], "answer": 0}\n')
    summary = world / f"{command}.json"
    options = {
        "local": [],
        "baselines": ["--local", "--methods", "base"],
        "evaluate": ["--address", "local", "--base-only", "--tasks", str(questions)],
    }[command]
    done = CliRunner().invoke(
        main, [command, "--quiet", "--config", str(world / "config.yaml"), "--summary", str(summary), *options]
    )
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, OSError), done.output
    assert json.loads(summary.read_text())
