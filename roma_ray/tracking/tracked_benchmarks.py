"""Evaluations and comparisons in MLflow: a run each, written once by the driver."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from roma_ray.borders.addresses import mask
from roma_ray.config.schema import Config
from roma_ray.engine.progress import Progress
from roma_ray.errors import TrackingError
from roma_ray.evaluation.benchmark_results import SUMMARY, read_benchmarks
from roma_ray.evaluation.run_comparison import Comparison, plain
from roma_ray.figures.comparison_page import FORMATS, render
from roma_ray.store.artifacts import Stage, Store, fingerprint
from roma_ray.store.files import listed, write_text
from roma_ray.store.scratch import scratch_folder
from roma_ray.tracking import run_records
from roma_ray.tracking.backend import MetricValue, Refused, RunState, Unavailable, one_at_a_time
from roma_ray.tracking.delivery import FINGERPRINT, Delivery

_STAGE, _RUN = "roma.stage", "roma.run"
_JUDGED = ("benchmarks", "evaluate")


class _Record(Delivery):
    """A run without children, told of when it is over."""

    identity_tag, name_tag, later = FINGERPRINT, _STAGE, "the same command"

    def __init__(
        self,
        config: Config,
        store: Store,
        progress: Progress,
        stage: str,
        title: str,
        identity: str,
        tags: Mapping[str, str],
        values: Mapping[str, Any],
        files: Sequence[Path],
    ) -> None:
        super().__init__(config, store, progress)
        self.parent, self.title, self._identity = stage, title, identity
        self.tags, self.values, self.files = tags, values, files
        self.status[stage] = "FINISHED"
        self._waiting[stage] = None

    def _title(self, name: str) -> str:
        return self.title

    def _tags(self, name: str) -> Mapping[str, str]:
        return self.tags

    def _start(self, name: str) -> int:
        return run_records.now()

    def _end(self, name: str, run: RunState) -> int:
        return run_records.now()

    def _receipt(self, name: str) -> str:
        return self._identity

    def _write(self, name: str, run: RunState) -> None:
        at = run_records.now()
        self._log_metrics(
            run, [MetricValue(run_records.metric_name(k), float(v), 0, at) for k, v in self.values.items()]
        )
        for file in self.files:
            self._upload(run, file)


def record(config: Config, store: Store, stage: Stage, progress: Progress) -> None:
    """Record a finished evaluation: its scores, adapter and pins as tags, lm-eval's results as files."""
    found = read_benchmarks(stage.path)
    tags = {"roma.adapter": str(found["model"]["adapter"]), "roma.model": found["model"]["identity"]}
    tags |= {f"roma.pin.{run_records.task_name(task)}": figures["pin"] for task, figures in found["tasks"].items()}
    values = {
        f"{run_records.task_name(task)}/{metric.replace(',', '.').removesuffix('.none')}/{name}": figure
        for task, figures in {**found["tasks"], **found["groups"]}.items()
        for metric, some in figures["metrics"].items()
        for name, figure in some.items()
        if isinstance(figure, int | float)
    }
    values |= {f"questions_per_second/{name}": figure for name, figure in found["cost"]["questions_per_second"].items()}
    files = [stage.path / SUMMARY, *listed(stage.path, "lm_eval_*.json")]
    title, identity = f"{config.name}: benchmarks", stage.fingerprint
    _Record(config, store, progress, "benchmarks", title, identity, tags, values, files).close()


def record_comparison(config: Config, store: Store, comparison: Comparison, progress: Progress) -> None:
    """Record a comparison: the table in MLflow's own form and as Markdown, HTML and CSV."""
    table = plain(comparison)
    content = {"columns": list(table), "data": [list(row) for row in zip(*table.values(), strict=True)]}
    identity = fingerprint(content)
    with scratch_folder() as folder:
        files = [folder / f"comparison.{suffix}" for suffix in ("json", *FORMATS.values())]
        write_text(files[0], json.dumps(content))
        for file, form in zip(files[1:], FORMATS, strict=True):
            write_text(file, render(comparison, form))
        tags = Delivery.backend.shown_as_table(files[0].name)
        title = "comparison: " + ", ".join(comparison.labels)
        _Record(config, store, progress, "comparison", title, identity, tags, {}, files).close()


def fingerprint_of(config: Config, store: Store, run_id: str) -> str | None:
    """The fingerprint of the evaluation that an MLflow run id means (a pipeline's, a stage's or a benchmark's run).

    None for what is no run id, or of no such run. Raises TrackingError.
    """
    if len(run_id) != 32 or not run_id.isalnum():
        return None
    backend = Delivery.backend
    try:
        with one_at_a_time(store):
            client = backend.connect(config, store)
        run = client.run(run_id)
        if run.tags.get(_STAGE) in _JUDGED:
            return run.tags.get(FINGERPRINT)
        siblings = client.runs(_RUN, run.tags[_RUN]) if _RUN in run.tags else []
    except Refused:
        return None
    except Unavailable as error:
        raise TrackingError(
            f"{backend.title} at {mask(backend.address(config, store))} cannot be used ({error}), so nobody knows what its run "
            f"{run_id} is: name the evaluation by its folder or fingerprint, or try again later"
        ) from None
    return next((r.tags.get(FINGERPRINT) for r in siblings if r.tags.get(_STAGE) in _JUDGED), None)
