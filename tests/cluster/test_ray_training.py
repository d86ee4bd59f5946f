"""Finetuning on Ray Train: the same bits on one, two and three workers, and after a worker's death."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from roma_ray.cluster.live import FILE, LiveReader, LiveWriter
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.cluster.ray_training import RUNS, finetune_on_ray, questions_before
from roma_ray.errors import TrainingError
from roma_ray.runs.pipeline import Run
from roma_ray.stages.finetuning import ADAPTER, CHECKPOINT, train_here
from roma_ray.store.artifacts import file_digest
from tests.cluster.support import DeadlyJob, epochs_in, loopback, started
from tests.engine.test_collapse import COLLAPSING, guard
from tests.making import train_job

WEIGHTS = f"{ADAPTER}/adapter_model.safetensors"


def deadly_job(run: Run, folder: Path, **settings: Any) -> DeadlyJob:
    """The finetuning of a finished run, in an empty folder, with a worker that dies or fails."""
    notes = folder / "notes"
    notes.mkdir()
    job = train_job(run, folder)
    return DeadlyJob(job.setup, job.stages, job.stage, notes=str(notes), **settings)


def test_three_workers_one_killed(local_run: Run, cluster: Cluster, tmp_path: Path) -> None:
    """kill -9 of a worker after a checkpoint: all restart from it, every epoch is told once, and no bit differs."""
    job = deadly_job(local_run, tmp_path, victim=2, at_step=4)
    records: list[dict[str, Any]] = []
    counts: list[int] = []
    finetune_on_ray(cluster, "cpu")(job, records.append, lambda count, note: counts.append(count))

    assert (tmp_path / "notes" / "died").exists()
    assert started(tmp_path / "notes") == 6
    heard = [line for note in (tmp_path / "notes").glob("started-*") for line in note.read_text().splitlines()]
    assert heard
    assert all(loopback(address) for address in heard), heard
    assert epochs_in(records) == [0, 1]
    assert sum(counts) == 2 * local_run.stages["neighbors"].manifest()["facts"]["training"]
    expected = local_run.stages["finetune"].path
    for name in (WEIGHTS, "epochs.jsonl", "steps.parquet", "outcome.json"):
        assert file_digest(Path(job.folder) / name) == file_digest(expected / name), name
    left = sorted(p.name for p in Path(job.folder).iterdir())
    assert FILE not in left
    assert RUNS not in left


def test_workers_end_together_where_the_guard_stops(local_run: Run, cluster: Cluster, tmp_path: Path) -> None:
    """The same bits as one process, which ends early too; no worker waits for the others' steps."""
    settings = {**COLLAPSING, "guard": guard("stop")}
    job = train_job(local_run, tmp_path / "workers", **settings)
    alone = train_job(local_run, tmp_path / "alone", **settings)
    train_here(alone, lambda epoch: None, lambda count, note: None)
    records: list[dict[str, Any]] = []
    finetune_on_ray(cluster, "cpu")(job, records.append, lambda count, note: None)
    assert [record.get("stopped") for record in records] == [None, True]
    for name in (WEIGHTS, "epochs.jsonl", "steps.parquet", "outcome.json"):
        assert file_digest(Path(job.folder) / name) == file_digest(Path(alone.folder) / name), name


def test_a_failing_worker_stops_all_with_its_message(local_run: Run, cluster: Cluster, tmp_path: Path) -> None:
    """A failure that would only repeat itself ends the run at once, though the other workers wait in a gather."""
    job = deadly_job(local_run, tmp_path, victim=1, at_step=3, fails=True)
    with pytest.raises(TrainingError, match="not finite; lower the rate") as caught:
        finetune_on_ray(cluster, "cpu")(job, lambda record: None, lambda count, note: None)
    assert started(tmp_path / "notes") == 3
    place = str(caught.value).partition("\nThe worker's traceback: ")[2]
    assert "TrainingError" in Path(place).read_text()
    # The checkpoint stays: the next run goes on from it.
    assert (Path(job.folder) / CHECKPOINT).exists()
    assert questions_before(job) == 2 * job.settings.batch_size


def test_progress_lines(tmp_path: Path) -> None:
    """Epochs are told once over restarts and runs; the count goes back to the checkpoint after a restart."""
    told: list[int] = []
    counts: list[int] = []
    first = LiveWriter(tmp_path, "one", 0)
    first.epoch({"epoch": 0})
    reader = LiveReader(tmp_path, "two", lambda record: told.append(record["epoch"]), lambda n, _: counts.append(n))
    reader.poll()
    second = LiveWriter(tmp_path, "two", 10)
    second.last = 0.0
    second.advance(8, "")
    second.advance(8, "")
    with open(tmp_path / FILE, "a") as stream:
        stream.write('{"run": "two", "do')
    reader.poll()
    with open(tmp_path / FILE, "a") as stream:
        stream.write('ne": 26, "note": ""}\n')
    reader.poll()
    LiveWriter(tmp_path, "two", 16).epoch({"epoch": 0})
    reader.poll()
    reader.tell({"epoch": 1})
    reader.tell({"epoch": 1})
    assert told == [0, 1]
    assert counts == [8, 8, -10]


def test_gather_of_one_worker_is_what_it_has() -> None:
    """The world of one worker adds nothing and copies nothing."""
    import torch.distributed as dist

    from roma_ray.cluster.world import PeerFailed, TorchWorld

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        world = TorchWorld(torch.device("cpu"))
        mine = [torch.ones(3), torch.zeros(3)]
        assert world.gather(mine, 2) is mine
        assert world.collect({"a": 1}) == [{"a": 1}]
        with pytest.raises(PeerFailed):
            world.agree(width=-1)
    finally:
        dist.destroy_process_group()
