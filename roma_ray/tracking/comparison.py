"""Keeps MLflow in step with a comparison: one parent run, one child a method.

As with pipelines, what MLflow lacks of what the artifacts hold is written, and nothing twice; so an outage only leaves work
for the next chance, or for the next run of the same command, which computes nothing anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from roma_ray.addresses import mask
from roma_ray.artifacts import Stage, fingerprint
from roma_ray.engine.answers import ANSWERS, read_answers
from roma_ray.engine.progress import Progress
from roma_ray.engine.setup import Setup
from roma_ray.evaluation.methods import (
    COST_LEGEND,
    COSTS,
    SPLIT,
    budget_line,
    cost_rows,
    describe_oracle,
    measure_differences,
    measure_header,
    result_header,
    result_legend,
    result_rows,
)
from roma_ray.tracking import records
from roma_ray.tracking.client import Client, RunState, Unavailable, Value, one_at_a_time

PARENT = "baselines"
_RETRY_SECONDS = 60.0


class ComparisonTracker:
    """An observer of one comparison. Its methods never raise for MLflow's sake."""

    def __init__(self, setup: Setup, progress: Progress) -> None:
        self.setup, self.progress = setup, progress
        self.uri = records.tracking_uri(setup)
        self.methods: dict[str, Sequence[Stage]] = {}
        self.summary: Mapping[str, Any] | None = None
        self._tried: set[str] = set()
        self._client: Client | None = None
        self._runs: dict[str, RunState] = {}
        self._down_since: float | None = None

    def planned(self, methods: Mapping[str, Sequence[Stage]]) -> None:
        """Before any method runs."""
        self.methods = dict(methods)
        self._deliver()

    def method_finished(self, name: str) -> None:
        """A method is complete or failed."""
        self._tried.add(name)
        self._deliver()

    def finished(self, summary: Mapping[str, Any]) -> None:
        """All methods were tried."""
        self.summary = summary
        self._down_since = None
        self._deliver()
        if self._client is not None:
            self.progress.say(f"MLflow: run {self._runs[PARENT].id} at {mask(self.uri)}")

    def _deliver(self) -> None:
        if self._down_since is not None and time.monotonic() - self._down_since < _RETRY_SECONDS:
            return
        try:
            self._connect()
            for name in self.methods:
                if name in self._tried:
                    self._method(name)
            self._parent()
        except Unavailable as error:
            self._client, self._runs = None, {}
            self._down_since = time.monotonic()
            self.progress.say(
                f"MLflow at {mask(self.uri)} cannot be used ({error}). Nothing is lost: the same command delivers it later."
            )

    def _connect(self) -> None:
        if self._client is not None:
            return
        store = self.setup.store.root
        identity = fingerprint({name: [s.fingerprint for s in stages] for name, stages in self.methods.items()})
        with one_at_a_time(store / ".tracking.lock"):
            self._client = Client(self.uri, self.setup.config.tracking.experiment, store / "mlflow-artifacts")
            for run in self._client.runs("roma.run", identity):
                self._runs.setdefault(run.tags.get("roma.stage", PARENT), run)
            self._identity = identity
            self._run(PARENT, f"{self.setup.config.name}: baselines", {})

    def _run(self, key: str, title: str, tags: dict[str, str]) -> RunState:
        """The run of a method or of the comparison, made where there is none."""
        assert self._client is not None
        if key not in self._runs:
            known = {"roma.run": self._identity, "roma.stage": key, "mlflow.source.name": "roma-ray"}
            self._runs[key] = self._client.create(title, {**known, **tags}, records.now())
        return self._runs[key]

    def _method(self, name: str) -> None:
        assert self._client is not None
        run = self._run(name, name, {"mlflow.parentRunId": self._runs[PARENT].id})
        stages = self.methods[name]
        self._client.log(run, params=_missing(records.stage_parameters(stages[0]), run.params))
        done = [stage for stage in stages if stage.complete]
        values = [value for number, stage in enumerate(done) for value in _seed_values(stage, number)]
        if self.summary is not None:
            values += _row_values(self.summary, name)
        # Keys, not steps, are compared: all seeds of a method come at once.
        self._client.log(run, metrics=[value for value in values if value.key not in run.metrics])
        status = "FINISHED" if len(done) == len(stages) else "FAILED"
        if run.status != status:
            self._client.set_status(run, status, records.now())

    def _parent(self) -> None:
        assert self._client is not None
        run = self._runs[PARENT]
        self._client.log(run, params=_missing(records.parameters(self.setup.config), run.params))
        if self.summary is None:
            return
        summary = self.summary
        values = [
            Value(f"{found['name']}/{key}", float(found[key]), 0, records.now())
            for found in summary["methods"]
            for key in ("accuracy", "difference")
            if "failure" not in found
        ]
        if summary["oracle"]:
            values += [Value(f"oracle_and_control/{k}", v, 0, records.now()) for k, v in summary["oracle"].items()]
        fresh = [value for value in values if value.key not in run.metrics]
        self._client.log(run, metrics=fresh, tags={"mlflow.note.content": table_text(summary), "pin": summary["pin"]})
        if fresh:
            with TemporaryDirectory() as folder:
                (Path(folder) / "comparison.json").write_text(json.dumps(summary, indent=1))
                (Path(folder) / "comparison.md").write_text(table_text(summary))
                self._client.upload(run, Path(folder))
        status = "FAILED" if any("failure" in found for found in summary["methods"]) else "FINISHED"
        if run.status != status:
            self._client.set_status(run, status, records.now())


def table_text(summary: Mapping[str, Any]) -> str:
    """The comparison as Markdown."""
    lines = [f"{summary['questions']} test questions; {budget_line(summary)}"]
    tables = (
        (result_header(summary), result_rows(summary)),
        (measure_header(summary), measure_differences(summary)),
        (COSTS, cost_rows(summary)),
    )
    for header, rows in tables:
        lines += ["", *(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))]
    lines += ["", result_legend(summary), COST_LEGEND]
    if summary["oracle"]:
        lines += ["", describe_oracle(summary["oracle"])]
    return "\n".join(lines)


def _seed_values(stage: Stage, number: int) -> list[Value]:
    """Accuracy and facts of one seed, at the seed's number."""
    facts = stage.manifest()["facts"]
    right = read_answers(stage.path / ANSWERS, SPLIT).column("correct").to_pylist()
    at = records.finish_time(stage)
    plain = [(key, value) for key, value in facts.items() if isinstance(value, int | float) and key != "seed"]
    plain += [(f"validation/{rate}", value) for rate, value in facts.get("trials", {}).items()]
    plain.append(("test/accuracy", sum(right) / len(right)))
    return [Value(key, float(value), number, at) for key, value in plain]


def _row_values(summary: Mapping[str, Any], name: str) -> list[Value]:
    """What the table says of a method beyond its own facts."""
    found = next(row for row in summary["methods"] if row["name"] == name)
    keys = ("stderr", "difference", "difference_stderr", "seed_deviation")
    named = {key: found[key] for key in keys if found.get(key) is not None}
    for name, one in found.get("measures", {}).items():
        named |= {f"{name}/{key}": one["micro"][key] for key in ("tuned", "difference", "difference_stderr")}
    named |= {f"first_seed/{key}": value for key, value in found.get("first_seed", {}).items()}
    at = records.now()
    return [Value(f"test/{key}", float(value), 0, at) for key, value in named.items()]


def _missing(wanted: Mapping[str, str], there: set[str]) -> dict[str, str]:
    return {key: value for key, value in wanted.items() if key not in there}
