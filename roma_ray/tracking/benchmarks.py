"""Evaluations and comparisons in MLflow: a run each, written once by the driver."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from roma_ray.addresses import mask
from roma_ray.artifacts import Stage, Store, fingerprint
from roma_ray.config import Config
from roma_ray.engine.progress import Progress
from roma_ray.evaluation.compare import Comparison, plain
from roma_ray.evaluation.judge import SUMMARY, read_benchmarks
from roma_ray.figures.comparison import FORMATS, render
from roma_ray.tracking import records
from roma_ray.tracking.client import Client, RunState, Unavailable, Value, one_at_a_time

_STAGE, _FINGERPRINT, _RUN = "roma.stage", "roma.fingerprint", "roma.run"
_JUDGED = ("benchmarks", "evaluate")


def record(config: Config, store: Store, stage: Stage, progress: Progress) -> None:
    """Record a finished evaluation: its scores, adapter and pins as tags, lm-eval's results as files."""
    found = read_benchmarks(stage.path)
    tags = {"roma.adapter": str(found["model"]["adapter"]), "roma.model": found["model"]["identity"]}
    tags |= {f"roma.pin.{records.task_name(task)}": figures["pin"] for task, figures in found["tasks"].items()}
    values = {
        f"{records.task_name(task)}/{metric.replace(',', '.').removesuffix('.none')}/{name}": figure
        for task, figures in {**found["tasks"], **found["groups"]}.items()
        for metric, some in figures["metrics"].items()
        for name, figure in some.items()
        if isinstance(figure, int | float)
    }
    values |= {f"questions_per_second/{name}": figure for name, figure in found["cost"]["questions_per_second"].items()}
    files = [stage.path / SUMMARY, *sorted(stage.path.glob("lm_eval_*.json"))]
    with _quietly(progress, config, store):
        _write(config, store, f"{config.name}: benchmarks", "benchmarks", stage.fingerprint, tags, values, files)


def record_comparison(config: Config, store: Store, comparison: Comparison, progress: Progress) -> None:
    """Record a comparison: the table in MLflow's own form and as Markdown, HTML and CSV."""
    table = plain(comparison)
    content = {"columns": list(table), "data": [list(row) for row in zip(*table.values(), strict=True)]}
    identity = fingerprint(content)
    with tempfile.TemporaryDirectory() as folder, _quietly(progress, config, store):
        files = [Path(folder) / f"comparison.{suffix}" for suffix in ("json", *FORMATS.values())]
        files[0].write_text(json.dumps(content), encoding="utf-8")
        for file, form in zip(files[1:], FORMATS, strict=True):
            file.write_text(render(comparison, form), encoding="utf-8")
        # By this tag MLflow's UI shows the file as a table that can be filtered and joined with other runs'.
        logged = json.dumps([{"path": files[0].name, "type": "table"}])
        tags = {"mlflow.loggedArtifacts": logged}
        _write(config, store, "comparison: " + ", ".join(comparison.labels), "comparison", identity, tags, {}, files)


def fingerprint_of(config: Config, store: Store, run_id: str) -> str | None:
    """The fingerprint of the evaluation that an MLflow run id means (a pipeline's, a stage's or a benchmark's run)."""
    if len(run_id) != 32 or not run_id.isalnum():
        return None
    try:
        client = _client(config, store)
        run = client.run(run_id)
        if run.tags.get(_STAGE) in _JUDGED:
            return run.tags.get(_FINGERPRINT)
        siblings = client.runs(_RUN, run.tags[_RUN]) if _RUN in run.tags else []
    except Unavailable:
        return None
    return next((r.tags.get(_FINGERPRINT) for r in siblings if r.tags.get(_STAGE) in _JUDGED), None)


def _client(config: Config, store: Store) -> Client:
    with one_at_a_time(store.root / ".tracking.lock"):
        return Client(
            records.tracking_address(config, store), config.tracking.experiment, store.root / "mlflow-artifacts"
        )


@contextmanager
def _quietly(progress: Progress, config: Config, store: Store) -> Iterator[None]:
    """MLflow's troubles stop nothing: they are told."""
    try:
        yield
    except Unavailable as error:
        where = mask(records.tracking_address(config, store))
        progress.say(f"MLflow at {where} cannot be used ({error}); the same command delivers it later")


def _write(
    config: Config,
    store: Store,
    name: str,
    stage: str,
    identity: str,
    tags: dict[str, str],
    values: dict[str, Any],
    files: list[Path],
) -> None:
    """Write a run, unless it is there already. Raises Unavailable."""
    client = _client(config, store)
    at = records.now()
    known = [r for r in client.runs(_FINGERPRINT, identity) if r.tags.get(_STAGE) == stage]
    if any(run.status == "FINISHED" for run in known):
        return
    given = {_STAGE: stage, _FINGERPRINT: identity, "mlflow.source.name": "roma-ray", **tags}
    run: RunState = known[0] if known else client.create(name, given, at)
    client.log(run, metrics=[Value(records.metric_name(key), float(v), 0, at) for key, v in values.items()])
    for file in files:
        client.upload(run, file)
    client.set_status(run, "FINISHED", records.now())
