"""Runs side by side on the same questions: every measure, paired differences to the first, bootstrap intervals, p-values.

A run is a finished folder of `evaluate --tasks` (stock and own benchmarks) or of the pipeline's `evaluate` stage (its test
questions); its tuned model is meant, its base with `:base` after the name. Metrics are never mixed: each has rows of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from roma_ray.borders.text import printable
from roma_ray.config.loading import read_settings
from roma_ray.engine.question_table import read_table
from roma_ray.engine.setup import CONFIG
from roma_ray.errors import ArtifactError, ConfigError, GuardError
from roma_ray.evaluation.benchmark_results import METRICS, read_benchmarks
from roma_ray.evaluation.results_file import read_verdicts
from roma_ray.evaluation.statistics import accuracy, bootstrap_interval, macro, pair, standard_error
from roma_ray.store.artifacts import Stage, Store, read_manifest
from roma_ray.store.buckets import SCHEMES, as_path, is_object
from roma_ray.store.files import exists, is_folder, listed, local, written_at

MACRO = "macro average"
_STAGES = ("benchmarks", "evaluate")
_BASE = ":base"
_LEAST_PREFIX = 6
# Figures of a comparison are the same each time they are made.
_SEED = 0


@dataclass(frozen=True)
class ComparedModel:
    """One judged model: the value of each question by (task, metric)."""

    label: str
    values: Mapping[tuple[str, str], Mapping[Any, float]]
    pins: Mapping[str, str]
    """By task."""
    configured: str = ""
    """The metric by which the run chooses its answers, where it has one."""


@dataclass(frozen=True)
class Cell:
    """A model on one benchmark; the differences are to the first column, None in it and where the questions differ."""

    score: float
    stderr: float | None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    """McNemar's exact one of verdicts, a paired t-test's of other values."""
    other_pin: bool = False


@dataclass(frozen=True)
class Row:
    """A benchmark that any run has (or the macro average of a metric over the tasks that all have)."""

    task: str
    metric: str
    n: int
    """Questions; of a macro average the tasks."""
    cells: tuple[Cell | None, ...]
    """By column; None for a run without this benchmark."""
    configured: bool = False
    """Whether the first run that has it chooses its answers by this metric."""


@dataclass(frozen=True)
class Comparison:
    """A whole comparison."""

    labels: tuple[str, ...]
    rows: tuple[Row, ...]


def find_run(name: str, store: Store, look_up: Callable[[str], str | None] = lambda name: None) -> Path:
    """The folder that a run's name means: a path, a fingerprint (or its first digits), or what `look_up` says of a run id.

    Raises ArtifactError when there is none, or several.
    """
    place = name.partition("://")[0] in SCHEMES
    path = as_path(name) if place else Path(name).expanduser()
    if is_folder(path):
        return path
    found: list[Path] = []
    for prefix in filter(None, (name, look_up(name))):
        if len(prefix) >= _LEAST_PREFIX and prefix.isalnum():
            found += [p for stage in _STAGES for p in listed(store.root / stage, f"{prefix}*")]
        if found:
            break
    if len(found) != 1:
        what = f"{len(found)} evaluations are meant" if found else "no finished evaluation is meant"
        raise ArtifactError(
            f"{what} by {name!r}: give the folder that `roma-ray evaluate` printed, its fingerprint in {store.root}, or an MLflow run id"
        )
    return found[0]


def read_column(name: str, folder: Path, which: str) -> ComparedModel:
    """The base's or the tuned model's values of a finished evaluation. Raises ArtifactError, also where it is damaged."""
    manifest = read_manifest(folder)
    stage, configured = manifest["stage"], ""
    Stage(folder, stage, manifest["identity"]).verify()
    if stage == "benchmarks":
        table = read_table(folder / METRICS).to_pydict()
        found = read_benchmarks(folder)
        # A group that was asked for, MMLU say, is one benchmark.
        group_of = {task: name for name, group in found["groups"].items() for task in group["tasks"]}
        pins = {name: figures["pin"] for name, figures in {**found["tasks"], **found["groups"]}.items()}
        tasks = [group_of.get(task, task) for task in table["task"]]
        keys = [
            (task, metric if key == "none" else f"{metric},{key}")
            for task, metric, key in zip(tasks, table["metric"], table["filter"], strict=True)
        ]
        questions, measured = list(zip(table["task"], table["doc"], strict=True)), table[which]
    elif stage == "evaluate":
        keys, named, measured, pins = read_verdicts(folder, which)
        questions = [("", name) for name in named]
        configured = str(manifest["facts"]["metric"])
    else:
        raise ArtifactError(f"{folder} is a {stage} stage, not an evaluation")
    values: dict[tuple[str, str], dict[Any, float]] = {}
    for key, question, value in zip(keys, questions, measured, strict=True):
        if value is None:
            raise ArtifactError(f"{folder} has no tuned model: compare its base, {name}{_BASE}")
        values.setdefault(key, {})[question] = float(value)
    return ComparedModel(name, values, pins, configured)


def open_columns(names: Sequence[str], store: Store, look_up: Callable[[str], str | None]) -> list[ComparedModel]:
    """The columns of the named runs; a single run is compared with its own base. Raises ArtifactError."""
    wanted = [f"{names[0]}{_BASE}", *names] if len(names) == 1 and not names[0].endswith(_BASE) else list(names)
    if len(names) == 1 and (len(wanted) == 1 or not has_tuned(find_run(names[0], store, look_up))):
        raise ArtifactError(f"{names[0]} is one model alone: name another run to compare it with")
    twice = sorted({name for name in wanted if wanted.count(name) > 1})
    if twice:
        raise ArtifactError(
            f"{twice[0]} is named twice; a run is compared with another, or with its own base (RUN{_BASE})"
        )
    columns, folders = [], []
    for name in wanted:
        plain = name.removesuffix(_BASE)
        folder = find_run(plain, store, look_up)
        which = "base" if name != plain or not has_tuned(folder) else "tuned"
        columns.append(read_column(name, folder, which))
        folders.append(folder)
    return _named(columns, folders)


def _named(columns: Sequence[ComparedModel], folders: Sequence[Path]) -> list[ComparedModel]:
    """The columns headed by their runs' names where those are known; equal ones are told apart by the fingerprint."""
    labels = []
    for column, folder in zip(columns, folders, strict=True):
        name = run_name(folder)
        base = ", base" if column.label.endswith(_BASE) else ""
        labels.append(column.label if name is None else f"{name}{base}")
    marked = [
        f"{label} ({folder.name[:_LEAST_PREFIX]})" if labels.count(label) > 1 else label
        for label, folder in zip(labels, folders, strict=True)
    ]
    return [replace(column, label=label) for column, label in zip(columns, marked, strict=True)]


def run_name(folder: Path) -> str | None:
    """The name of the run that an evaluation is part of: the newest of the configurations kept with it or with its report."""
    kept = [folder / CONFIG]
    for report in listed((folder if is_object(folder) else folder.absolute()).parents[1] / "report", "*"):
        with suppress(ArtifactError):
            if read_manifest(report)["identity"]["inputs"].get("evaluate") == folder.name:
                kept.append(report / CONFIG)
    for path in sorted(filter(exists, kept), key=written_at, reverse=True):
        with suppress(ConfigError):
            name = read_settings(local(path)).get("name")
            if isinstance(name, str) and name.strip():
                return printable(name)
    return None


def has_tuned(folder: Path) -> bool:
    """Whether an evaluation judged a tuned model beside its base."""
    if read_manifest(folder)["stage"] != "benchmarks":
        return True
    return read_benchmarks(folder)["model"]["adapter"] is not None


def compare_columns(columns: Sequence[ComparedModel], *, allow_different_pins: bool = False) -> Comparison:
    """Compare all columns with the first: one row for every benchmark that any run has.

    Raises GuardError when the first run shares no benchmark with the others, or runs have one with different pins.
    """
    first = columns[0]
    every = sorted({key for column in columns for key in column.values})
    shared = [key for key in every if key in first.values and any(key in other.values for other in columns[1:])]
    if not shared:
        raise GuardError(f"{first.label} and the other runs have no benchmark in common")
    differing = sorted(
        {f"{key[0]} ({c.label})" for key in every for c in columns if key in c.values and _other_pin(key, c, columns)}
    )
    if differing and not allow_different_pins:
        raise GuardError(
            f"not the same questions, prompts or metric: {', '.join(differing)}. Their scores are not comparable; to see them side "
            "by side all the same, marked and without paired figures, use --allow-different-pins"
        )
    rows = [_row(key, columns) for key in every]
    metrics = sorted({metric for _, metric in shared})
    averages = [_macro(metric, [key for key in shared if key[1] == metric], columns) for metric in metrics]
    return Comparison(tuple(c.label for c in columns), (*rows, *(m for m in averages if m is not None)))


def _other_pin(key: tuple[str, str], column: ComparedModel, columns: Sequence[ComparedModel]) -> bool:
    """Whether a column's questions, prompts or metric are others than those of the first that has the benchmark."""
    return column.pins[key[0]] != next(c for c in columns if key in c.values).pins[key[0]]


def _row(key: tuple[str, str], columns: Sequence[ComparedModel]) -> Row:
    reference = columns[0].values.get(key)
    cells: list[Cell | None] = []
    for column in columns:
        values = column.values.get(key)
        if values is None:
            cells.append(None)
            continue
        own = np.array(list(values.values()))
        cell = Cell(accuracy(own), standard_error(own))
        if _other_pin(key, column, columns):
            cell = Cell(cell.score, cell.stderr, other_pin=True)
        elif column is not columns[0] and reference is not None:
            before, after = _paired(reference, values, column.label)
            low, high = bootstrap_interval([after - before], seed=_SEED)
            found = pair(before, after)
            cell = Cell(cell.score, cell.stderr, found.difference, low, high, found.p)
        cells.append(cell)
    first = next(c for c in columns if key in c.values)
    return Row(*key, len(first.values[key]), tuple(cells), first.configured == key[1])


def _paired(one: Mapping[Any, float], other: Mapping[Any, float], label: str) -> tuple[np.ndarray, np.ndarray]:
    if one.keys() != other.keys():
        raise ArtifactError(f"{label} does not hold the questions that its pin stands for; evaluate it again")
    return np.array([one[q] for q in one]), np.array([other[q] for q in one])


def _macro(metric: str, keys: Sequence[tuple[str, str]], columns: Sequence[ComparedModel]) -> Row | None:
    """Unweighted mean over the tasks that all columns have under one pin; None for fewer than two."""
    keys = [key for key in keys if all(key in c.values and c.pins[key[0]] == columns[0].pins[key[0]] for c in columns)]
    if len(keys) < 2:
        return None
    cells = []
    for column in columns:
        pairs = [_paired(columns[0].values[key], column.values[key], column.label) for key in keys]
        found = macro([pair(before, after) for before, after in pairs])
        assert found is not None
        cell = Cell(found.tuned, found.tuned_stderr)
        if column is not columns[0]:
            low, high = bootstrap_interval([after - before for before, after in pairs], seed=_SEED)
            cell = Cell(cell.score, cell.stderr, found.difference, low, high)
        cells.append(cell)
    return Row(MACRO, metric, len(keys), tuple(cells), columns[0].configured == metric)


def plain(comparison: Comparison) -> dict[str, list[Any]]:
    """The comparison as columns of plain values, a row a benchmark: for CSV and MLflow's tables."""
    table: dict[str, list[Any]] = {"task": [], "metric": [], "configured": [], "n": []}
    for row in comparison.rows:
        table["task"].append(row.task)
        table["metric"].append(row.metric)
        table["configured"].append(row.configured)
        table["n"].append(row.n)
        for label, cell in zip(comparison.labels, row.cells, strict=True):
            for name in ("score", "stderr", "difference", "low", "high", "p", "other_pin"):
                if label != comparison.labels[0] or name in ("score", "stderr"):
                    table.setdefault(f"{label} {name}", []).append(None if cell is None else getattr(cell, name))
    return table
