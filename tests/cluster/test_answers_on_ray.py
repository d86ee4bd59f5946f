"""A run's own evaluation on Ray: a worker that is killed costs its part, a question that kills is named, and no bit changes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from roma_ray.cluster.batch_actors import ATTEMPTS, ray_executor
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.engine.question_table import TABLE, read_some_prompts
from roma_ray.engine.runners import Runners
from roma_ray.engine.work import Report, Work
from roma_ray.errors import WorkerError
from roma_ray.runs.pipeline import Run
from roma_ray.stages.answer_work import Answerer, AnswerWork, section_of
from roma_ray.stages.paired_evaluation import EVALUATE
from tests.cluster.support import die
from tests.making import made
from tests.stages.test_answering import again, same


def workers() -> list[int]:
    """The processes of the pool."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "BatchWorker" in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_worker_is_killed_in_the_middle(local_run: Run, cluster: Cluster, tmp_path: Path) -> None:
    setup = again(local_run, tmp_path / "storage")
    reported: list[int] = []

    def killing(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        for report in ray_executor(cluster, "evaluate", "cpu")(work, batches):
            reported.append(report.batch)
            if len(reported) == 1:
                os.kill(workers()[0], signal.SIGKILL)
            yield report
        assert sorted(reported) == sorted(batches)

    stage = made(EVALUATE, setup, Runners(evaluate=killing))
    assert {section_of(batch)[0] for batch in reported} == {"base", "tuned", "trained"}
    assert len(reported) > 5
    assert not (stage.path / ATTEMPTS).exists()
    same(stage, setup, local_run)


class DeadlyAnswerer(Answerer):
    """It dies whenever it answers one question."""

    work: DeadlyAnswers

    def __call__(self, batch: int, excluded: frozenset[int] = frozenset()) -> Report:
        if self.work.poison in set(self.rows(batch)) - excluded:
            die()
        return super().__call__(batch, excluded)

    def probe(self, row: int) -> None:
        if row == self.work.poison:
            die()
        super().probe(row)


@dataclass(frozen=True)
class DeadlyAnswers(AnswerWork):
    """An evaluation in which one question kills."""

    poison: int

    def open(self) -> Callable[[int], Report]:
        return DeadlyAnswerer(self, self.model.load(self.setup.cut, None, with_lm_head=True))


def test_a_question_that_kills_its_workers_ends_the_evaluation_by_name(
    local_run: Run, cluster: Cluster, tmp_path: Path
) -> None:
    setup = again(local_run, tmp_path / "storage")
    poison: list[int] = []

    def poisoned(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        assert isinstance(work, AnswerWork)
        poison.append(work.planned("tuned", [])[-1].rows[0])
        deadly = DeadlyAnswers(work.setup, work.stages, work.stage, work.base, poison[0])
        yield from ray_executor(cluster, "evaluate", "cpu")(deadly, batches)

    with pytest.raises(WorkerError, match=r"kills the worker.*ray.evaluate_workers") as caught:
        made(EVALUATE, setup, Runners(evaluate=poisoned))
    (prompt,) = read_some_prompts(local_run.stages["questions"].path / TABLE, poison)
    assert repr(prompt.id) in str(caught.value)
    assert not EVALUATE.at(setup, local_run.stages).complete
