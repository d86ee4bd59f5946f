"""The baselines on Ray: the answers of one process, and a method whose worker dies takes no other with it."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import pytest

from roma_ray.baselines.bench import Bench
from roma_ray.baselines.method_runs import MethodsWork, method_stage, read_failure
from roma_ray.cluster.ray_baselines import baselines_on_ray
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.engine.answers import ANSWERS
from roma_ray.engine.work import Report, serial
from roma_ray.runs.pipeline import Run
from roma_ray.store.artifacts import file_digest

METHODS = ("base", "c3po_mode", "icl")


@dataclass(frozen=True, eq=False)
class DeadlyWork(MethodsWork):
    """Work whose method `victim` kills the process that runs it."""

    victim: str = "icl"

    def run(self, bench: Bench, batch: int) -> Report:
        if self.methods[batch] == self.victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(bench, batch)


def test_methods_on_workers_and_one_that_dies(
    local_run: Run, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {name: local_run.stages[name] for name in ("questions", "extract", "embed", "neighbors")}
    work = MethodsWork(local_run.setup, stages, METHODS, 1)
    places = [method_stage(work.setup, stages, name, 0) for name in METHODS]
    assert [report.errors for report in serial(work, range(3))] == [0, 0, 0]
    expected = [file_digest(stage.path / ANSWERS) for stage in places]
    for stage in places:
        stage.discard()

    settings = cluster.config.ray.model_copy(update={"max_failures": 0, "baselines_workers": 2})
    monkeypatch.setattr(cluster, "config", cluster.config.model_copy(update={"ray": settings}))
    execute = baselines_on_ray(cluster, "cpu")
    deadly = DeadlyWork(work.setup, stages, METHODS, 1)
    reports = {report.batch: report.errors for report in execute(deadly, range(3))}
    assert reports == {0: 0, 1: 0, 2: 1}
    failure = read_failure(places[2])
    assert failure is not None
    assert "its worker died" in failure["text"]
    assert not places[2].complete

    assert [report.errors for report in execute(work, [2])] == [0]
    assert [file_digest(stage.path / ANSWERS) for stage in places] == expected
    assert read_failure(places[2]) is None
