"""Planned batches on Ray Data: the same files as in one process, whatever happens to the workers."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from roma_ray.cluster.batch_actors import ATTEMPTS, BatchWorker, Marks, ray_executor
from roma_ray.cluster.failures import packed
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.engine.batches import read_plan
from roma_ray.engine.extractor import PLAN, Extractor, ExtractWork, batch_table
from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import read_table
from roma_ray.engine.runners import LOCAL, Runners
from roma_ray.engine.setup import resolve
from roma_ray.engine.steps import locate
from roma_ray.engine.work import Report, Work
from roma_ray.errors import ModelError, StorageError, WorkerError
from roma_ray.runs.pipeline import Run
from roma_ray.stages import neighborhoods
from roma_ray.stages.extraction import EXTRACT
from roma_ray.stages.neighbor_lists import spread
from roma_ray.stages.neighborhoods import NEIGHBORS, PAIRS
from roma_ray.stages.preparation import QUESTIONS
from roma_ray.store.artifacts import Stage, file_digest
from tests.cluster.support import DeadlyWork, FailingWork
from tests.making import made, with_settings
from tests.world import make_world


def fields(run: Run, folder: Path) -> dict[str, Any]:
    """The extraction of a finished run, with an empty folder to do it again in."""
    folder.mkdir()
    shutil.copy(run.stages["extract"].path / PLAN, folder / PLAN)
    return {"setup": run.setup, "stages": run.stages, "stage": Stage(folder, "extract", {})}


def same_files(folder: Path, other: Path) -> None:
    names = sorted(p.name for p in (other / "batches").iterdir())
    assert names == sorted(p.name for p in (folder / "batches").iterdir())
    for name in names:
        assert file_digest(folder / "batches" / name) == file_digest(other / "batches" / name), name


def test_a_killed_worker_and_a_poison_row(local_run: Run, cluster: Cluster, tmp_path: Path) -> None:
    """A worker that dies once costs nothing; a row that always kills is set aside as if it had been excluded."""
    _, plan = read_plan(local_run.stages["extract"].path / PLAN)
    poison = plan[1][len(plan[1]) // 2]
    given = fields(local_run, tmp_path / "ray")
    work = DeadlyWork(**given, poison=(poison,), dies_once_at=len(plan) - 2)
    reports = list(ray_executor(cluster, "extract", "cpu")(work, range(len(plan))))

    assert sorted(r.batch for r in reports) == list(range(len(plan)))
    assert (tmp_path / "ray" / ".died").exists()
    assert not (tmp_path / "ray" / ATTEMPTS).exists()
    errors = {row: e for n in range(len(plan)) for row, e in _errors(tmp_path / "ray", n) if e}
    assert errors == {poison: "killed its worker"}

    expected = Extractor(ExtractWork(**fields(local_run, tmp_path / "here")))
    for number in range(len(plan)):
        expected(number, frozenset([poison]))
    same_files(tmp_path / "ray", tmp_path / "here")
    for number in set(range(len(plan))) - {1}:
        name = batch_table(tmp_path, number).name
        assert file_digest(tmp_path / "ray" / "batches" / name) == file_digest(
            local_run.stages["extract"].path / "batches" / name
        )


def _errors(folder: Path, batch: int) -> list[tuple[int, str | None]]:
    table = read_table(batch_table(folder, batch), ["row", "error"])
    return list(zip(table.column("row").to_pylist(), table.column("error").to_pylist(), strict=True))


def test_neighbors_in_a_large_s_are_searched_by_workers(
    local_run: Run, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = with_settings(local_run.setup, "neighbors", exact_up_to=1, k=2)
    job = NEIGHBORS.job(setup, locate(NEIGHBORS, setup))
    seen: list[int] = []

    def execute(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        for report in ray_executor(cluster, "evaluate", "cpu")(work, batches):
            seen.append(report.batch)
            yield report

    monkeypatch.setattr(neighborhoods, "spread", partial(spread, block=8))
    facts = neighborhoods.neighbors(job, Runners(search=execute), Silence())
    found = file_digest(job.stage.path / PAIRS)
    assert len(seen) > 3
    assert neighborhoods.neighbors(job, LOCAL, Silence()) == facts
    assert file_digest(job.stage.path / PAIRS) == found


@pytest.mark.parametrize(("bug", "kind", "text"), [(False, ModelError, "no such model"), (True, WorkerError, "Zero")])
def test_failures_are_one_message(
    local_run: Run, cluster: Cluster, tmp_path: Path, bug: bool, kind: type[Exception], text: str
) -> None:
    """What a worker raises reaches the user as that one message, with the traceback in the file that it names."""
    work = FailingWork(**fields(local_run, tmp_path / "ray"), bug=bug)
    with pytest.raises(kind) as caught:
        list(ray_executor(cluster, "extract", "cpu")(work, [0, 1]))
    message, _, place = str(caught.value).partition("\nThe worker's traceback: ")
    assert text in message
    assert "\n" not in message
    assert "Traceback" not in message
    assert "support.py" in Path(place).read_text()


def worker_of(work: Work) -> BatchWorker:
    """A worker in this process."""
    return BatchWorker(work.folder, pickle.dumps(work), "token", 1)


def test_deaths_that_are_nobodys_fault_end_the_run(local_run: Run, tmp_path: Path) -> None:
    """A batch that kills though no row alone does, and a model that cannot be loaded, end in a message."""
    worker = worker_of(ExtractWork(**fields(local_run, tmp_path / "ray")))
    marks = Marks(str(tmp_path / "ray"), "token", 0)
    for _ in range(4):
        marks.add("batch")
    assert "batch_tokens" in worker({"item": [0]})["failure"][0]
    assert worker({"item": [1]})["failure"] == [""]

    # Requests of a benchmark are not set aside one by one: two deaths are enough.
    whole = worker_of(FailingWork(**fields(local_run, tmp_path / "whole"), bug=True))
    for _ in range(2):
        Marks(str(tmp_path / "whole"), "token", 0).add("batch")
    failure = json.loads(whole({"item": [0]})["failure"][0])
    assert failure["kind"] == "WorkerError"
    assert "batch 0 killed its worker 2 times" in failure["text"]

    other = Marks(str(tmp_path / "ray"), "token", 2)
    for _ in range(3):
        other.add("open")
    failure = json.loads(worker_of(worker.work)({"item": [2]})["failure"][0])
    assert failure["kind"] == "WorkerError"
    assert "loading the model killed" in failure["text"]


def test_marks_are_of_one_run_of_the_driver(tmp_path: Path) -> None:
    """A driver that was killed leaves marks behind; they do not count against the rows of the next run."""
    Marks(str(tmp_path), "first", 7).add("batch")
    assert Marks(str(tmp_path), "first", 7).lines.count("batch") == 1
    assert Marks(str(tmp_path), "second", 7).lines == []


def test_a_storage_that_takes_no_marks_is_named(tmp_path: Path) -> None:
    """What the system says, and where: a worker's first write on a full or read-only storage is a mark."""
    (tmp_path / ATTEMPTS).write_text("a file where a folder must be")
    with pytest.raises(StorageError, match=r"cannot write .*000003: (Not a directory|File exists)"):
        Marks(str(tmp_path), "token", 3).add("batch")
    assert packed(OSError(30, "Read-only file system"))["text"].endswith("Read-only file system")


def test_a_model_that_drops_most_questions_is_refused_from_the_workers(cluster: Cluster, tmp_path: Path) -> None:
    """Where its values first stop being finite is found on the cluster too: the driver need not hold a layer."""
    config = make_world(tmp_path, count=24)
    file = Path(config.model.path) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.3.self_attn.v_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    setup = resolve(config, device="cpu")
    made(QUESTIONS, setup)
    with pytest.raises(
        ModelError, match=r"questions failed in extraction.*comes from layer 3 \(self_attn\), whose weights"
    ):
        made(EXTRACT, setup, Runners(extract=ray_executor(cluster, "extract", "cpu")))
