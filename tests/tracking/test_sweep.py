"""A sweep in MLflow as its user sees it: the interface's comparison of two trials, in a real browser."""

from __future__ import annotations

import html
import json
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from roma_ray.ablations.plan import Plan, make_plan
from roma_ray.ablations.space import load_space
from roma_ray.ablations.sweep import DONE, RUNNING, open_sweep
from roma_ray.ablations.sweep_report import PAGE
from roma_ray.ablations.sweep_tracker import SweepTracker
from roma_ray.engine.progress import Silence
from roma_ray.stages.finetuning import LIVE
from roma_ray.tracking.mlflow import Mlflow
from tests.tiny import save_tiny, tiny_moe
from tests.tracking.support import BROWSERS, browser, free_port, page, starting
from tests.world import make_questions

# No two curves have the same shape, and no three points lie on a line: the interface would leave out the middle one.
CURVES = {"centre": [0.40, 0.52, 0.45, 0.61], "layers=F2": [0.40, 0.33, 0.58, 0.47]}
METRIC = "epoch/validation_accuracy"


def plan_of(root: Path, database: str, varied: dict[str, Any]) -> Plan:
    """The plan of a space around a tiny model."""
    save_tiny(tiny_moe("olmoe"), root / "model")
    make_questions(root / "questions.jsonl", 12)
    base = {
        "storage": str(root / "storage"),
        "device": "cpu",
        "model": {"path": str(root / "model")},
        "questions": {"sources": [{"path": str(root / "questions.jsonl")}]},
        "routing": {"layers": "L2"},
        "tracking": {"uri": database, "system_metrics": False},
    }
    (root / "space.yaml").write_text(yaml.safe_dump({"name": "grid", "base": base, **varied}))
    return make_plan(load_space(root / "space.yaml"), "cpu")


def record_sweep(root: Path, database: str) -> None:
    """Put a sweep of two trials into MLflow as its driver does, epoch for epoch; the epochs are written and not trained."""
    factors = {"layers": {"setting": "routing.layers", "values": ["F2"]}}
    plan = plan_of(root, database, {"one_at_a_time": factors})
    with SweepTracker(plan, Silence()) as follower:
        sweep = open_sweep(plan)
        follower.started(sweep)
        for state in sweep.states.values():
            folder = state.planned.stages["finetune"].path
            folder.mkdir(parents=True)
            for epoch, accuracy in enumerate(CURVES[state.trial.name]):
                record = {"epoch": epoch, "validation_accuracy": accuracy, "task_loss": 1.0, "time": time.time()}
                with open(folder / LIVE, "a") as stream:
                    stream.write(json.dumps(record) + "\n")
                state.state = RUNNING
                follower.changed(sweep, state)
            state.state = DONE
            follower.changed(sweep, state)
        follower.finished(sweep)


def test_a_grid_without_figures_ends(database: str, tmp_path: Path) -> None:
    """configs/lambda.yaml is of this form: products alone, which the report has no figure of."""
    root = tmp_path
    plan = plan_of(root, database, {"grid": [{"finetune.learning_rate": [0.01, 0.02]}]})
    with SweepTracker(plan, Silence()) as follower:
        sweep = open_sweep(plan)
        follower.started(sweep)
        (sweep.stage.path / "tables").mkdir(parents=True)
        for part in (PAGE, "report.md", "tables/trials.csv"):
            (sweep.stage.path / part).write_text("as it is")
        follower.finished(sweep)
    client = Mlflow(database, "roma-ray", tmp_path / "artifacts")
    (parent,) = client.runs("roma.trial", "sweep")
    assert parent.status == "FINISHED"
    kept = {file.path for file in MlflowClient(tracking_uri=database).list_artifacts(parent.id)}
    assert kept == {PAGE, "report.md", "tables"}


@pytest.mark.skipif(browser() is None, reason=f"no browser: none of {', '.join(BROWSERS)} is installed")
def test_the_comparison_of_two_trials_shows_their_curves(database: str, tmp_path: Path) -> None:
    port = free_port()
    root = f"http://127.0.0.1:{port}/"
    with starting(port, tmp_path, Path(database.removeprefix("sqlite:///"))) as wait:
        record_sweep(tmp_path, database)
        client = Mlflow(database, "roma-ray", tmp_path / "artifacts")
        runs = [run for centre in ("yes", "no") for run in client.runs("roma.centre", centre)]
        assert [run.tags["name"] for run in runs] == list(CURVES)
        chosen = f"runs={listed([run.id for run in runs])}&experiments={listed([client.experiment_id])}"
        wait()
        # The link that README gives and a run prints; MLflow itself opens on another page.
        place = f"{root}{client.page()}"
        page(place, tmp_path / "runs", lambda seen: "3 matching runs" in text(seen))
        parts = ("Comparing 2 Runs from 1 Experiment", *CURVES, "routing.layers", "F2", "L2", METRIC)
        comparison = page(
            f"{root}#/compare-runs?{chosen}",
            tmp_path / "comparison",
            lambda seen: all(part in text(seen) for part in parts),
        )
        links = [html.unescape(link) for link in re.findall(r'href="(#/metric\?[^"]*)"', comparison)]
        (link,) = [link for link in links if quote(f'"{METRIC}"', safe="") in link]
        drawn = curves(page(root + link, tmp_path / "curves", lambda seen: len(curves(seen)) == 2))
    assert set(drawn) == {f"{name} ({METRIC})" for name in CURVES}
    # One scale for both: what is drawn, in pixels downwards, is a linear function of what was recorded.
    pixels, values = zip(*[(drawn[f"{name} ({METRIC})"], CURVES[name]) for name in CURVES], strict=True)
    slope, offset = np.polyfit(np.concatenate(values), np.concatenate(pixels), 1)
    assert slope < 0
    assert np.allclose(np.multiply(slope, values) + offset, pixels, atol=0.5)


def listed(values: list[str]) -> str:
    """A list as the interface's addresses have it."""
    return quote(json.dumps(values))


def text(document: str) -> str:
    """The words of an HTML document."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", document)).split())


def curves(document: str) -> dict[str, list[float]]:
    """The heights of each line of a plot's points, in pixels from above, by the name that its colour has in the legend."""
    colour = r"stroke: (rgb\([^)]*\))"
    names = re.findall(rf'{colour};"></path></svg><span[^>]*>([^<]*)</span>', document)
    lines = {paint: line for line, paint in re.findall(rf'class="js-line" d="M([^"]*)" style="[^"]*{colour}', document)}
    return {
        html.unescape(name): [float(point.split(",")[1]) for point in lines[paint].split("L")]
        for paint, name in names
        if paint in lines
    }
