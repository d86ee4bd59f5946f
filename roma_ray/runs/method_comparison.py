"""The comparison of Table 1: the pipeline up to the neighborhoods, every method on it, one table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from roma_ray.baselines.contract import budget
from roma_ray.baselines.method_registry import METHODS
from roma_ray.baselines.method_runs import method_stage, other_versions, read_failure, run_methods, seeds_of
from roma_ray.engine.identity import refuse_chain, refuse_distilled, refuse_free_form
from roma_ray.engine.observers import UNOBSERVED, ComparisonObserver
from roma_ray.engine.progress import Progress
from roma_ray.engine.question_table import TABLE, read_prompts
from roma_ray.engine.runners import LOCAL, Runners
from roma_ray.engine.setup import Setup
from roma_ray.engine.steps import Facts, make
from roma_ray.evaluation.method_table import Entry, compare_methods
from roma_ray.runs.pipeline import locate, run
from roma_ray.store.artifacts import Stage, comparison_identity, write_json

VERSION = 3
SUMMARY = "comparison.json"


@dataclass(frozen=True)
class MethodComparison:
    """A comparison, with the rows of every method that did not fail."""

    stages: Mapping[str, Stage]
    methods: Mapping[str, Sequence[Stage]]
    summary: dict[str, Any]
    failures: Mapping[str, str]


def compare(
    setup: Setup,
    methods: Sequence[str],
    seeds: int,
    progress: Progress,
    runners: Runners = LOCAL,
    observer: ComparisonObserver = UNOBSERVED,
) -> MethodComparison:
    """Run the methods that are not complete and judge all of them. A method that fails leaves the others' rows.

    Raises what the stages before raise, and GuardError when the base model itself failed.
    """
    refuse_free_form(setup.config, "`roma-ray baselines`")
    refuse_distilled(setup.config, "`roma-ray baselines`")
    refuse_chain(setup.config, "`roma-ray baselines`")
    started = time.monotonic()
    located = locate(setup)
    planned = {name: [method_stage(setup, located, name, s) for s in seeds_of(setup, name, seeds)] for name in methods}
    missing = any(not stage.complete for found in planned.values() for stage in found)
    stages = dict(run(setup, progress, runners, until="neighbors", states=missing).stages)
    setup.store.begin(comparison_identity(planned))
    observer.planned(planned)
    run_methods(setup, stages, methods, seeds, runners.baselines, progress, observer.method_finished)
    entries = []
    for name in methods:
        failed = next((found for stage in planned[name] if (found := read_failure(stage))), None)
        failure = f"{failed['kind']}: {failed['text']}" if failed else ""
        entries.append(Entry(name, METHODS[name].title, METHODS[name].sees_labels, planned[name], failure))
    prompts = read_prompts(stages["questions"].path / TABLE, held_out=setup.config.questions.held_out_tasks)
    validation = len(prompts.rows_of("validation"))
    training = stages["neighbors"].manifest()["facts"]["training"]
    common = {**budget(setup.config), "training_questions": training, "validation_questions": validation}
    summary = {
        "name": setup.config.name,
        "seed": setup.config.seed,
        "seeds": seeds,
        "layers": list(setup.layers),
        **compare_methods(
            entries, common, prompts, setup.config.questions.prompt, setup.config.questions.held_out_tasks
        ),
        "other_versions": other_versions([*stages.values(), *(stage for found in planned.values() for stage in found)]),
        "seconds": round(time.monotonic() - started, 3),
    }
    observer.finished(summary)
    failures = {entry.name: entry.failure for entry in entries if entry.failure}
    if not failures:
        _keep(setup, planned, summary, started)
    return MethodComparison(stages, planned, summary, failures)


def comparison_stage(setup: Setup, methods: Mapping[str, Sequence[Stage]]) -> Stage:
    """Where the table of these methods lives."""
    inputs = {f"{name}/{n}": stage.fingerprint for name, stages in methods.items() for n, stage in enumerate(stages)}
    return setup.store.stage("comparison", {"name": setup.config.name}, inputs, VERSION)


def _keep(setup: Setup, methods: Mapping[str, Sequence[Stage]], summary: Mapping[str, Any], started: float) -> None:
    """Store a table in which nothing is missing."""
    stage = comparison_stage(setup, methods)

    def write() -> Facts:
        write_json(stage.path / SUMMARY, dict(summary))
        return {"pin": summary["pin"]}

    make(stage, write, since=started)
