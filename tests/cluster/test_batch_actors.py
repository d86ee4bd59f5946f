"""Planned batches on actors: the same files as in one process, whatever happens to the workers."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
import signal
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError
from safetensors.torch import load_file, save_file

from roma_ray.cluster.batch_actors import Call, Hand, HandOut, ray_executor
from roma_ray.cluster.batch_worker import (
    ATTEMPTS,
    FAILURE,
    OPENED,
    REPORTS,
    STANDS,
    BatchWorker,
    Journal,
    Left,
    Order,
    Told,
)
from roma_ray.cluster.failures import explained, packed
from roma_ray.cluster.placement import Need
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.cluster.worker_pool import Worker, WorkerPool
from roma_ray.engine.batches import read_plan
from roma_ray.engine.extractor import PLAN, Extractor, ExtractWork, batch_table
from roma_ray.engine.held_slices import HeldSlices
from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import TABLE, read_table
from roma_ray.engine.runners import LOCAL, Runners
from roma_ray.engine.setup import resolve
from roma_ray.engine.steps import locate
from roma_ray.engine.work import Report, Work
from roma_ray.errors import ModelError, StorageError, WorkerError
from roma_ray.runs.pipeline import Run
from roma_ray.stages import encoding, neighborhoods, preparation
from roma_ray.stages.encoding import EncodeWork
from roma_ray.stages.extraction import EXTRACT
from roma_ray.stages.neighbor_lists import spread
from roma_ray.stages.neighborhoods import NEIGHBORS, PAIRS
from roma_ray.stages.preparation import FAULTS, QUESTIONS
from roma_ray.store.artifacts import Stage, file_digest, noted_starts
from tests.cluster.support import DeadlyEncoding, DeadlyWork, FailingWork, LightWork, NotingWork, TunedWork, begun
from tests.making import made, with_settings
from tests.stages.test_encoding import job_in as questions_in
from tests.stages.test_encoding import write as write_questions
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


def test_a_kill_within_a_group_repeats_one_batch(cluster: Cluster, tmp_path: Path) -> None:
    """Of the group that a killed worker had, what was done is not done again, whether or not it was told of."""
    work = NotingWork(str(tmp_path), waits_at=5)

    def kill() -> None:
        while not (found := [pid for batch, pid in begun(tmp_path) if batch == 5]):
            time.sleep(0.02)
        (tmp_path / "killed").touch()
        os.kill(found[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    reports = list(ray_executor(cluster, "extract", "cpu")(work, range(200)))
    killer.join()
    assert sorted(report.batch for report in reports) == list(range(200))
    times = Counter(batch for batch, _ in begun(tmp_path))
    assert times == Counter({**dict.fromkeys(range(200), 1), 5: 2})
    assert len({pid for batch, pid in begun(tmp_path) if batch == 5}) == 2
    starting = noted_starts(tmp_path)
    assert set(starting) == {"workers", "imports", "model", "first_batch"}
    assert min(starting.values()) >= 0
    assert not (tmp_path / ATTEMPTS).exists()


def test_a_poison_row_within_a_group_costs_its_batch_alone(cluster: Cluster, tmp_path: Path) -> None:
    work = NotingWork(str(tmp_path), poison=2 * 5 + 1)
    reports = list(ray_executor(cluster, "extract", "cpu")(work, range(200)))
    assert sorted(report.batch for report in reports) == list(range(200))
    assert {report.batch: report.errors for report in reports if report.errors} == {5: 1}
    # Twice with the row, once without it; between them it was tried alone.
    times = Counter(batch for batch, _ in begun(tmp_path))
    assert times == Counter({**dict.fromkeys(range(200), 1), 5: 3})


def test_who_has_told_all_stays_and_who_is_at_work_ends() -> None:
    """Of the last call the end need not have been heard."""

    class Counted:
        ended = False

        def end(self) -> None:
            self.ended = True

    over, busy, rising, idle = Counted(), Counted(), Counted(), Counted()
    given = HandOut.__new__(HandOut)
    given.hands = [
        Hand(over, None, deque([Call("1", None, {})])),  # type: ignore[arg-type]
        Hand(busy, None, deque([Call("2", None, {}), Call("3", None, {7: None})])),  # type: ignore[arg-type]
        Hand(rising, object()),  # type: ignore[arg-type]
        Hand(idle, None),  # type: ignore[arg-type]
    ]
    assert given.leave() == [over, idle]
    assert [worker.ended for worker in (over, busy, rising, idle)] == [False, True, True, False]


def test_groups_shrink_towards_the_end() -> None:
    """So that no worker has much left when the others have ended; what may kill its worker goes alone."""
    given = HandOut.__new__(HandOut)
    given.waiting, given.before = deque(range(1000)), {3: ("batch 3",), 500: ("batch 500",)}
    given.hands = [object()] * 4  # type: ignore[list-item]
    groups = []
    while given.waiting:
        groups.append(given._group())
    assert [batch for group in groups for batch in group] == list(range(1000))
    assert groups[:3] == [[0, 1, 2], [3], list(range(4, 35))]
    assert [500] in groups
    assert [len(group) for group in groups[-60:]] == [1] * 60
    assert len(groups) < 170


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


def test_questions_are_encoded_by_workers_one_of_which_dies(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_questions(tmp_path / "q.jsonl")
    job = questions_in(tmp_path)
    facts = preparation.prepare(job, LOCAL, Silence())
    expected = [file_digest(job.stage.path / name) for name in (TABLE, FAULTS)]
    monkeypatch.setattr(encoding, "ROWS", 4)
    seen: list[int] = []

    def execute(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        assert isinstance(work, EncodeWork)
        deadly = DeadlyEncoding(**{field.name: getattr(work, field.name) for field in dataclasses.fields(work)})
        for report in ray_executor(cluster, "extract", "cpu")(deadly, batches):
            seen.append(report.batch)
            yield report

    assert preparation.prepare(job, Runners(encode=execute), Silence()) == facts
    assert (job.stage.path / ".died").exists()
    assert sorted(seen) == list(range(len(seen)))
    assert len(seen) > 10
    assert [file_digest(job.stage.path / name) for name in (TABLE, FAULTS)] == expected


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


@pytest.mark.parametrize("more_to_come", [False, True])
def test_workers_that_the_next_work_needs_stay_though_this_one_needs_fewer(
    monkeypatch: pytest.MonkeyPatch, more_to_come: bool
) -> None:
    """Few questions are encoded by some of the workers that began to import for the extraction."""
    ended: list[Any] = []
    monkeypatch.setattr(Worker, "end", lambda worker: ended.append(worker.actor))
    pool, fit, other = WorkerPool(), Need(0.5), Need(0.5, gpus=1.0)
    pool.keep([Worker(need, 1, actor=f"actor {n}") for n, need in enumerate([fit, other, fit, fit])])
    lent = pool.lend(fit, 2, 1, more_to_come=more_to_come)
    assert [worker.actor for worker in lent] == ["actor 0", "actor 2"]
    assert ended == (["actor 1"] if more_to_come else ["actor 1", "actor 3"])
    pool.keep(lent)
    assert {worker.actor for worker in pool.lend(fit, 3 if more_to_come else 2, 1)} >= {"actor 0", "actor 2"}
    assert len(ended) == (1 if more_to_come else 2)


def test_memory_that_ran_out_names_the_setting_of_these_workers(tmp_path: Path) -> None:
    """Questions are encoded by the workers of extract, and have no setting of their own."""
    with (
        pytest.raises(WorkerError, match=r"^questions: memory ran out .*\(ray\.extract_workers\)"),
        explained("questions", tmp_path, "extract"),
    ):
        raise OutOfMemoryError("the node runs low on memory")


def told_by(worker: BatchWorker, work: Work, batches: Sequence[int], before: Sequence[str] = ()) -> list[Told]:
    """What a worker in this process tells of some batches."""
    order = Order(work.name, "extract", work.folder, f"run of {work.folder}", pickle.dumps(work), 1)
    return list(worker.run(order, "000001", batches, before))


def test_deaths_that_are_nobodys_fault_end_the_run(local_run: Run, tmp_path: Path) -> None:
    """A batch that kills though no row alone does ends in a message; the others of the group are told of."""
    work, worker = ExtractWork(**fields(local_run, tmp_path / "ray")), BatchWorker()
    kind, failure = told_by(worker, work, [0], ["batch 0"] * 4)[-1]
    assert kind == FAILURE
    assert "ray.extract_workers" in failure["text"]
    assert [kind for kind, _ in told_by(worker, work, [1, 2], ["batch 1"])][-1] == REPORTS

    # Requests of a benchmark are not set aside one by one: two deaths are enough.
    whole = FailingWork(**fields(local_run, tmp_path / "whole"), bug=True)
    kind, failure = told_by(worker, whole, [0], ["batch 0"] * 2)[-1]
    assert failure["kind"] == "WorkerError"
    assert "batch 0 killed its worker 2 times" in failure["text"]


def test_a_kept_worker_gives_the_bytes_of_a_fresh_one(local_run: Run, tmp_path: Path) -> None:
    """Its model is loaded once for three works, though one of them has put other gates in their place; then it goes."""
    worker, plan = BatchWorker(), fields(local_run, tmp_path / "plan")["stage"].path / PLAN
    batches, light = range(len(read_plan(plan)[1])), LightWork(str(tmp_path / "light"))
    Path(light.folder).mkdir()
    for name, kind in (("first", ExtractWork), ("tuned", TunedWork), ("second", ExtractWork)):
        told = told_by(worker, kind(**fields(local_run, tmp_path / name)), batches)
        assert {kind for kind, _ in told} == {STANDS, OPENED, REPORTS}
        # What loads no model, as encoding, takes none away.
        assert [kind for kind, _ in told_by(worker, light, [0])][-1] == REPORTS
    assert worker.held is not None
    assert worker.held.loaded == 1
    same_files(tmp_path / "second", tmp_path / "first")
    same_files(tmp_path / "second", local_run.stages["extract"].path)
    (held,) = worker.held._held.values()
    model = weakref.ref(held.part.model)
    del held
    told_by(worker, NotingWork(str(tmp_path)), [0])
    assert model() is None


def test_the_next_run_finds_no_model_that_only_a_path_names(local_run: Run, tmp_path: Path) -> None:
    """Other weights may lie there by then; those of a model with routers are told by their content."""
    worker = BatchWorker()
    for checks, left in (("checks", 1), ("", 0)):
        model = dataclasses.replace(local_run.setup.model, checks=checks and str(tmp_path / checks))
        worker.held = HeldSlices()
        with worker.held.opening(model):
            model.load(0, 1, with_lm_head=False)
        worker.free()
        assert worker.claim(time.time() + 60)
        assert len(worker.held._held) == left


def test_a_worker_that_may_outlive_its_run_ends_when_it_idles(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one run's at a time; who has given up asking does not get it."""
    ended: list[float] = []
    over = threading.Event()

    def end(code: int) -> None:
        ended.append(time.monotonic())
        over.set()

    monkeypatch.setattr(os, "_exit", end)
    worker, began = BatchWorker(kept_seconds=1), time.monotonic()
    later = time.time() + 600
    assert not worker.claim(later)
    worker.free()
    assert not worker.claim(time.time() - 1)
    assert worker.claim(later)
    assert not worker.claim(later)
    worker.busy = 1
    assert not over.wait(1.5)
    worker.busy = 0
    assert over.wait(60)
    assert ended[0] - began >= 1


def test_a_call_that_is_broken_off_leaves_its_worker_idle(tmp_path: Path) -> None:
    """Else a worker that outlives its run would never end."""
    worker = BatchWorker()
    order = Order("extract", "extract", str(tmp_path), "token", pickle.dumps(NotingWork(str(tmp_path))), 1)
    telling = worker.run(order, "000001", [0, 1])
    assert isinstance(telling, Generator)
    next(telling)
    assert worker.busy == 1
    telling.close()
    assert worker.busy == 0


def test_a_journal_tells_what_a_dead_worker_was_at(tmp_path: Path) -> None:
    order = Order("extract", "extract", str(tmp_path), "token", b"", 1)
    journal, report = Journal(order, "000001"), Report(3, 8, 100, 0, 0.5)
    assert journal.read() == Left([], None, (), False)
    journal.add("open")
    assert journal.read().opening
    journal.add("batch 3")
    journal.done(report)
    assert journal.read() == Left([asdict(report)], None, (), False)
    for line in ("probe 4 12", "lives 4 12", "probe 4 17"):
        journal.add(line)
    assert journal.read() == Left([asdict(report)], 4, ("probe 4 12", "lives 4 12", "probe 4 17"), False)
    journal.close()
    assert not journal.path.exists()


def test_a_storage_that_takes_no_marks_is_named(tmp_path: Path) -> None:
    """What the system says, and where: a worker's first write on a full or read-only storage is a mark."""
    (tmp_path / ATTEMPTS).write_text("a file where a folder must be")
    with pytest.raises(StorageError, match=r"cannot write .*000003: (Not a directory|File exists)"):
        Journal(Order("extract", "extract", str(tmp_path), "token", b"", 1), "000003").add("batch 3")
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
