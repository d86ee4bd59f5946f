"""Benchmarks on Ray: two actors, one of which dies in the middle, give the answers of one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from roma_ray.benchmarks.judge import Wanted, judge
from roma_ray.benchmarks.judged_model import resolve_subject
from roma_ray.benchmarks.requests import RequestWork
from roma_ray.cluster.batch_actors import ray_executor
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import read_table
from roma_ray.engine.work import Executor, Report, Work, serial
from roma_ray.evaluation.benchmark_results import METRICS, RESPONSES
from roma_ray.runs.pipeline import Run
from roma_ray.stages.finetuning import ADAPTER
from roma_ray.store.artifacts import Store
from tests.cluster.support import die


@dataclass(frozen=True)
class DeadlyRequests(RequestWork):
    """Answers whose worker dies once, at the third batch."""

    def open(self) -> Callable[[int], Report]:
        do = super().open()
        marker = Path(self.folder) / ".died"

        def dying(batch: int) -> Report:
            if batch == 2 and not marker.exists():
                marker.touch()
                die()
            return do(batch)

        return dying


def deadly(execute: Executor) -> Executor:
    """The executor with works that die once."""

    def run(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        assert isinstance(work, RequestWork)
        return execute(DeadlyRequests(work.folder, work.kind, work.subject, work.states), batches)

    return run


def test_two_actors_and_a_death_change_nothing(local_run: Run, cluster: Cluster, tmp_path: Path) -> None:
    config = local_run.setup.config
    rows = [json.loads(line) for line in Path(config.questions.sources[0].path or "").read_text().splitlines()]
    source = tmp_path / "benchmark.jsonl"
    source.write_text("".join(json.dumps({**row, "split": "test"}) + "\n" for row in rows[:24]))
    adapter = str(local_run.stages["finetune"].path / ADAPTER)
    subject = replace(resolve_subject(config, adapter=adapter, device="cpu"), batch_tokens=120)
    wanted = Wanted((str(source),))
    here = judge(config, subject, wanted, Store(tmp_path / "here"), serial, Silence())
    execute = deadly(ray_executor(cluster, "evaluate", "cpu"))
    there = judge(config, subject, wanted, Store(tmp_path / "there"), execute, Silence())
    assert list((tmp_path / "there" / "requests").glob("*/.died"))
    assert there.fingerprint == here.fingerprint
    for name in (METRICS, RESPONSES):
        assert read_table(there.path / name).to_pylist() == read_table(here.path / name).to_pylist()
