"""The baselines on Ray: the answers of one process, work at single questions shared, and a method whose worker dies alone."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from roma_ray.baselines.bench import Bench
from roma_ray.baselines.method_parts import PARTS
from roma_ray.baselines.method_runs import MethodsWork, method_stage, read_failure
from roma_ray.cluster.ray_baselines import Queue, Task, baselines_on_ray
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.engine.answers import ANSWERS
from roma_ray.engine.setup import Setup
from roma_ray.engine.work import Executor, Report, serial
from roma_ray.runs.pipeline import Run
from roma_ray.store.artifacts import Stage, file_digest

METHODS = ("base", "c3po", "icl", "oracle", "oracle_tuning")


@dataclass(frozen=True, eq=False)
class DeadlyWork(MethodsWork):
    """Work whose method `victim` kills the process that runs it, and one whose every part does."""

    victim: str = "icl"
    by_part: str = "oracle"

    def run(self, bench: Bench, batch: int) -> Report:
        if self.methods[batch] == self.victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(bench, batch)

    def part(self, bench: Bench, batch: int, number: int, part: int) -> Report:
        if self.methods[batch] == self.by_part:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().part(bench, batch, number, part)


@dataclass(frozen=True, eq=False)
class MortalWork(MethodsWork):
    """Work of which each second part kills its worker once, and which notes who does what."""

    notes: str = ""

    def part(self, bench: Bench, batch: int, number: int, part: int) -> Report:
        place = Path(self.notes) / f"{batch}-{part}"
        if part % 2 and not place.exists():
            place.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        report = super().part(bench, batch, number, part)
        place.write_text(str(os.getpid()))
        return report


def run_of(local_run: Run) -> tuple[Setup, dict[str, Stage]]:
    """A finished run with few rates and steps; so small batches that there are several parts."""
    small = {"learning_rates": [0.003], "shots": 2}
    config = local_run.setup.config
    baselines = type(config.baselines).model_validate(
        {**config.baselines.model_dump(), **small, "oracle": {"steps": 2}, "c3po": {"steps": 1, "neighbors": 2}}
    )
    setup = replace(local_run.setup, config=config.model_copy(update={"baselines": baselines}))
    return setup, {name: local_run.stages[name] for name in ("questions", "extract", "embed", "neighbors")}


def on_two(cluster: Cluster, failures: int, monkeypatch: pytest.MonkeyPatch) -> Executor:
    settings = cluster.config.ray.model_copy(update={"max_failures": failures, "baselines_workers": 2})
    monkeypatch.setattr(cluster, "config", cluster.config.model_copy(update={"ray": settings}))
    return baselines_on_ray(cluster, "cpu")


def test_methods_on_workers_and_two_that_die(
    local_run: Run, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, stages = run_of(local_run)
    work = MethodsWork(setup, stages, METHODS, 1)
    every = range(len(METHODS))
    places = [method_stage(setup, stages, name, 0) for name in METHODS]
    assert [report.errors for report in serial(work, every)] == [0] * len(METHODS)
    expected = [file_digest(stage.path / ANSWERS) for stage in places]
    for stage in places:
        stage.discard()

    deadly = DeadlyWork(setup, stages, METHODS, 1)
    reports = {report.batch: report.errors for report in on_two(cluster, 0, monkeypatch)(deadly, every)}
    assert reports == {0: 0, 1: 0, 2: 1, 3: 1, 4: 0}
    for number in (2, 3):
        failure = read_failure(places[number])
        assert failure is not None
        assert "its worker died" in failure["text"]
        assert not places[number].complete
    for number in (0, 1, 4):
        places[number].discard()

    # Again, where every second part kills its worker once: each is done after all, by both workers.
    mortal = MortalWork(setup, stages, METHODS, 1, notes=str(tmp_path))
    reports = {report.batch: report.errors for report in on_two(cluster, 3, monkeypatch)(mortal, every)}
    assert reports == dict.fromkeys(every, 0)
    assert [file_digest(stage.path / ANSWERS) for stage in places] == expected
    assert [read_failure(stage) for stage in places] == [None] * len(places)
    assert [stage.path for stage in places if (stage.path / PARTS).exists()] == []
    parts = {note.name: note.read_text() for note in tmp_path.iterdir()}
    # The parts of the method that died after them were there.
    assert {name.split("-")[0] for name in parts} == {"1", "3", "4"}
    assert len(parts) > 6
    assert len(set(parts.values())) > 1


def test_what_can_be_begun_is_begun_and_a_failed_part_ends_its_method(local_run: Run) -> None:
    setup, stages = run_of(local_run)
    work = MethodsWork(setup, stages, METHODS, 1)
    queue = Queue(work, range(len(METHODS)))
    assert queue.at_most > 1000
    begun = [queue.take() for _ in range(4)]
    assert [task.batch for task in begun] == [1, 2, 3, 4]
    # A plan with nothing left opens the way for the method; one that fails ends it.
    nothing = Report(1, 0, 0, 0, 0.0)
    assert list(queue.done(begun[0], nothing)) == []
    failed = Report(2, 0, 0, 1, 0.0)
    assert list(queue.done(begun[1], failed)) == [failed]
    assert [queue.take().batch for _ in range(2)] == [0, 1]
    assert not queue.waiting
    assert list(queue.done(Task(2, 0), replace(nothing, batch=0))) == [replace(nothing, batch=0)]
    assert Queue(work, [0]).at_most == 1
