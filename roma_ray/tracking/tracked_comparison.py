"""Keeps MLflow in step with a comparison: one parent run, one child a method."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from roma_ray.engine.answers import ANSWERS, read_answers
from roma_ray.engine.observers import ComparisonObserver
from roma_ray.engine.progress import Progress
from roma_ray.engine.setup import Setup
from roma_ray.evaluation.method_table import (
    COST_LEGEND,
    COSTS,
    HELD_OUT_HEADER,
    SPLIT,
    budget_line,
    cost_rows,
    describe_oracle,
    held_out_rows,
    measure_differences,
    measure_header,
    result_header,
    result_legend,
    result_rows,
)
from roma_ray.figures.escaping import markdown
from roma_ray.store.artifacts import Stage, comparison_identity, fingerprint
from roma_ray.store.files import write_text
from roma_ray.store.scratch import scratch_folder
from roma_ray.tracking import run_records
from roma_ray.tracking.backend import NOTE, MetricValue, RunState
from roma_ray.tracking.delivery import Delivery

PARENT = "baselines"


class ComparisonTracker(Delivery, ComparisonObserver):
    """An observer of one comparison. Its methods never raise for MLflow's sake."""

    parent, identity_tag, name_tag = PARENT, "roma.run", "roma.stage"

    def __init__(self, setup: Setup, progress: Progress) -> None:
        super().__init__(setup.config, setup.store, progress)
        self.methods: dict[str, Sequence[Stage]] = {}
        self.summary: Mapping[str, Any] | None = None

    def planned(self, methods: Mapping[str, Sequence[Stage]]) -> None:
        """Before any method runs."""
        self.methods = dict(methods)
        self._identity = comparison_identity(methods)
        if not all(self._whole(name) for name in methods):
            self.status[PARENT] = "RUNNING"
        self._deliver(PARENT)

    def method_finished(self, name: str) -> None:
        """A method is complete or failed."""
        self.status[name] = "FINISHED" if self._whole(name) else "FAILED"
        self._deliver(name)

    def finished(self, summary: Mapping[str, Any]) -> None:
        """All methods were tried."""
        self.summary = summary
        failed = [found["name"] for found in summary["methods"] if "failure" in found]
        self.failure = f"failed: {', '.join(failed)}" if failed else ""
        self.status[PARENT] = "FAILED" if failed else "FINISHED"
        self._waiting |= dict.fromkeys((PARENT, *self.methods))

    def _whole(self, name: str) -> bool:
        return all(stage.complete for stage in self.methods[name])

    def _title(self, name: str) -> str:
        return f"{self.config.name}: baselines" if name == PARENT else name

    def _start(self, name: str) -> int:
        if name == PARENT:
            return self._begun() or run_records.now()
        return min(map(run_records.start_time, self.methods[name]))

    def _end(self, name: str, run: RunState) -> int:
        if name == PARENT or not self._whole(name):
            return run_records.now()
        return max(run.start, *map(run_records.finish_time, self.methods[name]))

    def _receipt(self, name: str) -> str:
        """A method is delivered with its row of the table, which exists only when all methods have run."""
        names = self.methods if name == PARENT else [name]
        if self.summary is None or not all(self._whole(n) for n in names):
            return ""
        return fingerprint({n: [stage.manifest()["finished"] for stage in self.methods[n]] for n in names})

    def _error(self, name: str) -> str:
        if name == PARENT or self.summary is None:
            return self.failure
        return str(next((row.get("failure", "") for row in self.summary["methods"] if row["name"] == name), ""))[:500]

    def _write(self, name: str, run: RunState) -> None:
        if name == PARENT:
            self._write_table(run)
            return
        stages = self.methods[name]
        if self._whole(name):
            # The last seed's stage is the youngest.
            self._mark_reused(run, stages[-1])
        self._log_params(run, run_records.stage_parameters(stages[0]))
        done = [stage for stage in stages if stage.complete]
        values = [value for number, stage in enumerate(done) for value in _seed_values(stage, number)]
        if self.summary is not None:
            values += _row_values(self.summary, name)
        # Keys, not steps, are compared: all seeds of a method come at once.
        self.client.log(run, metrics=[value for value in values if value.key not in run.metrics])

    def _write_table(self, run: RunState) -> None:
        self._log_params(run, run_records.parameters(self.config))
        if self.summary is None:
            return
        summary = self.summary
        values = [
            MetricValue(f"{found['name']}/{key}", float(found[key]), 0, run_records.now())
            for found in summary["methods"]
            for key in ("accuracy", "difference")
            if "failure" not in found
        ]
        if summary["oracle"]:
            values += [
                MetricValue(f"oracle_and_control/{k}", v, 0, run_records.now()) for k, v in summary["oracle"].items()
            ]
        self._log_metrics(run, values)
        self._log_tags(run, {NOTE: table_text(summary), "pin": summary["pin"]})
        with scratch_folder() as folder:
            write_text(folder / "comparison.json", json.dumps(summary, indent=1))
            write_text(folder / "comparison.md", table_text(summary))
            self._upload(run, folder)


def table_text(summary: Mapping[str, Any]) -> str:
    """The comparison as Markdown."""
    lines = [f"{summary['questions']} test questions; {budget_line(summary)}"]
    tables = [
        (result_header(summary), result_rows(summary)),
        (measure_header(summary), measure_differences(summary)),
        (COSTS, cost_rows(summary)),
    ]
    if rows := held_out_rows(summary):
        tables.append((HELD_OUT_HEADER, rows))
    for header, rows in tables:
        lines += ["", *(f"| {' | '.join(map(markdown, cells))} |" for cells in (header, ["---"] * len(header), *rows))]
    lines += ["", result_legend(summary), COST_LEGEND]
    if summary["oracle"]:
        lines += ["", describe_oracle(summary["oracle"])]
    return "\n".join(lines)


def _seed_values(stage: Stage, number: int) -> list[MetricValue]:
    """Accuracy and facts of one seed, at the seed's number."""
    facts = stage.manifest()["facts"]
    right = read_answers(stage.path / ANSWERS, SPLIT).column("correct").to_pylist()
    at = run_records.finish_time(stage)
    plain = [(key, value) for key, value in facts.items() if isinstance(value, int | float) and key != "seed"]
    plain += [(f"validation/{rate}", value) for rate, value in facts.get("trials", {}).items()]
    plain.append(("test/accuracy", sum(right) / len(right)))
    return [MetricValue(key, float(value), number, at) for key, value in plain]


def _row_values(summary: Mapping[str, Any], name: str) -> list[MetricValue]:
    """What the table says of a method beyond its own facts."""
    found = next(row for row in summary["methods"] if row["name"] == name)
    keys = ("stderr", "difference", "difference_stderr", "seed_deviation")
    named = {key: found[key] for key in keys if found.get(key) is not None}
    for name, one in found.get("measures", {}).items():
        named |= {f"{name}/{key}": one["micro"][key] for key in ("tuned", "difference", "difference_stderr")}
    for measure, one in (found.get("held_out") or {"ctgi": {}})["ctgi"].items():
        named |= {f"transfer/ctgi/{measure}/{key}": value for key, value in one.items() if value is not None}
    named |= {f"first_seed/{key}": value for key, value in found.get("first_seed", {}).items()}
    at = run_records.now()
    return [MetricValue(f"test/{key}", float(value), 0, at) for key, value in named.items()]
