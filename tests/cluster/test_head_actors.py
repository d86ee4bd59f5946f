"""A head over actors: the files of a head in one process to the bit, whatever happens to the actors."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch

from roma_ray.cluster.chain_plans import ChainPlan, plan_chains
from roma_ray.cluster.head_actors import ActorLinks, ChainHeads, HeadActors, HeadLink, head_over
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.cluster.ray_runners import ray_runners
from roma_ray.cluster.ray_training import finetune_on_ray
from roma_ray.config.loading import with_overrides
from roma_ray.engine.progress import Silence
from roma_ray.engine.scoring import score_rows
from roma_ray.engine.setup import resolve
from roma_ray.engine.training import Outcome, World
from roma_ray.errors import ConfigError, ModelError, WorkerError
from roma_ray.moe.head_chain import Chain
from roma_ray.moe.links import HeldSlice
from roma_ray.runs.pipeline import Run, run
from roma_ray.stages.finetuning import TrainJob
from roma_ray.store.artifacts import file_digest
from tests.cluster.support import digests
from tests.cluster.test_chain_actors import connected
from tests.cluster.test_ray_training import WEIGHTS
from tests.making import train_job
from tests.world import make_world

FILES = (WEIGHTS, "epochs.jsonl", "steps.parquet", "outcome.json")


def same_training(job: TrainJob, expected: Path) -> None:
    for name in FILES:
        assert file_digest(Path(job.folder) / name) == file_digest(expected / name), name


def trained(job: TrainJob, **settings: Any) -> list[dict[str, Any]]:
    """Train on the tests' cluster; the epochs that were told."""
    records: list[dict[str, Any]] = []
    finetune_on_ray(connected(job.setup.config, **settings), "cpu")(job, records.append, lambda count, note: None)
    return records


def planned(job: TrainJob) -> ChainPlan:
    """One chain of two slices."""
    over = connected(job.setup.config, finetune_workers=None)
    return plan_chains(over, "finetune", job.model, 2, None, 1, "cpu", first=job.setup.cut)


def process_of(head: Any) -> int:
    """The process that holds the lower one of two slices."""
    assert isinstance(head, Chain)
    assert isinstance(head.links, ActorLinks)
    (actor,) = head.links.actors.actors
    found: int = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))
    assert found != os.getpid()
    return found


def kill(head: Any) -> int:
    """Kill that process as the system does when memory runs out; which it was."""
    process = process_of(head)
    os.kill(process, signal.SIGKILL)
    return process


@pytest.mark.parametrize(("workers", "activations"), [(2, "keep"), (4, "recompute")])
def test_chains_train_to_the_files_of_one_process(
    workers: int, activations: str, local_run: Run, cluster: Cluster, tmp_path: Path
) -> None:
    job = train_job(local_run, tmp_path, chain=2, chain_activations=activations)
    assert job.setup.layers == (4, 5)
    records = trained(job, finetune_workers=workers)
    assert [record["epoch"] for record in records] == [0, 1]
    same_training(job, local_run.stages["finetune"].path)


def test_three_slices_train_and_judge_a_run(cluster: Cluster, tmp_path: Path) -> None:
    """All stages of a run whose tuned layers are in three actors and the driver, against the same run in this process."""
    world = with_overrides(make_world(tmp_path / "world"), ["routing.layers=All", "finetune.epochs=1"])
    whole = run(resolve(world, device="cpu"), Silence())
    elsewhere = with_overrides(world, [f"storage={tmp_path / 'chained'}", "finetune.chain=3"])
    over = connected(elsewhere)
    chained = run(resolve(elsewhere, device="cpu"), Silence(), ray_runners(over, "cpu"))
    assert digests(chained) == digests(whole)


@dataclass(frozen=True)
class LinkKiller(TrainJob):
    """Training in which the actor of a slice is killed once, at a step, as the system does when memory runs out."""

    at_step: int = 3
    notes: str = ""

    def run(
        self,
        world: World | None = None,
        report: Callable[[dict[str, Any]], None] = lambda epoch: None,
        advance: Callable[[int, str], None] = lambda count, note: None,
        head: Any = None,
    ) -> Outcome:
        assert world is not None
        steps = 0

        def counting(count: int, note: str) -> None:
            nonlocal steps
            steps += 1
            marker = Path(self.notes) / "killed"
            if steps == self.at_step and not marker.exists():
                marker.write_text(str(kill(head)))
            advance(count, note)

        (Path(self.notes) / f"started-{os.getpid()}").touch()
        return super().run(world, report, counting, head)


def test_a_slice_that_is_killed_costs_the_steps_since_the_checkpoint(
    local_run: Run, cluster: Cluster, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    job = train_job(local_run, tmp_path, chain=2)
    records = trained(LinkKiller(job.setup, job.stages, job.stage, notes=str(notes)), finetune_workers=2)
    assert not psutil.pid_exists(int((notes / "killed").read_text()))
    assert len(list(notes.glob("started-*"))) == 2
    assert [record["epoch"] for record in records] == [0, 1]
    same_training(job, local_run.stages["finetune"].path)


def test_each_actor_holds_its_slice_alone(local_run: Run, cluster: Cluster, tmp_path: Path) -> None:
    job = train_job(local_run, tmp_path, chain=2)
    plan = plan_chains(
        connected(job.setup.config, finetune_workers=None), "finetune", job.model, 2, None, 1, "cpu", first=4
    )
    assert plan.ranges == ((4, 5), (5, 6))
    with head_over(plan, job.model, job.setup.config, name="finetune", folder=tmp_path) as head:
        assert isinstance(head, Chain)
        assert isinstance(head.links, ActorLinks)
        (actor,) = head.links.actors.actors
        held = ray.get(actor.__ray_call__.remote(_parameters))
        assert held == sum(p.numel() for p in job.model.load(4, 5, with_lm_head=False).model.parameters())
        assert [router.layer for router in head.routers] == [4, 5]
    assert ray.util.placement_group_table(head.links.actors.group)["state"] != "CREATED"


def _parameters(actor: Any) -> int:
    """Of what an actor holds: the link is in what its `do` closes over."""
    (link,) = (cell.cell_contents for cell in actor.do.__closure__ if isinstance(cell.cell_contents, HeldSlice))
    frozen, gates = link.part.model.parameters(), link.masters.parameters()
    return sum(p.numel() for p in [*frozen, *gates])


def test_a_head_that_cannot_be_divided_so_is_refused(local_run: Run, cluster: Cluster, tmp_path: Path) -> None:
    job = train_job(local_run, tmp_path / "many", chain=3)
    with pytest.raises(ConfigError, match=r"finetune\.chain: 3 slices, and there are 2 layers"):
        trained(job, finetune_workers=3)
    job = train_job(local_run, tmp_path / "few", chain=2)
    with pytest.raises(ConfigError, match=r"ray\.finetune_workers: 3 workers make 1 chain|cluster has room for"):
        trained(job, finetune_workers=1)


def test_a_slice_that_cannot_be_loaded_is_a_named_error(local_run: Run, cluster: Cluster, tmp_path: Path) -> None:
    """It is raised here as it was there, and the actors and their places are given back."""
    job = train_job(local_run, tmp_path, chain=2)
    plan = planned(job)
    gone = replace(job.model, path=str(tmp_path / "gone"))
    actors = HeadActors([HeadLink(gone, 4, 5, first=True, keep=True)], plan.needs[:1], "finetune", job.folder, None, 1)
    with pytest.raises(ModelError, match="gone"):
        actors.stand(60.0)
    actors.close()
    assert ray.util.placement_group_table(actors.group)["state"] != "CREATED"


def test_memory_that_runs_out_in_a_slice_is_told_with_what_helps(
    local_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(HeldSlice, "infer", full)
    serve = HeadLink(local_run.setup.model, 4, 5, first=True, keep=True).open()
    with pytest.raises(ModelError, match=r"memory ran out in layers 4 to 4 .*finetune\.chain"):
        serve("infer", (None, None, None))


def test_a_slice_that_dies_in_the_evaluation_is_a_named_error(local_run: Run, cluster: Cluster, tmp_path: Path) -> None:
    job = train_job(local_run, tmp_path, chain=2)
    config = job.setup.config.model_copy(update={"storage": str(tmp_path / "storage")})
    data = job.open_data()

    def judge() -> None:
        with ChainHeads(config, "cpu").lend(job.model, job.setup.cut) as head:
            kill(head)
            score_rows(head, data.states, data.prompts, range(9), tokens="Last1", rule="raw", batch_tokens=500)

    with pytest.raises(WorkerError, match="evaluate: a worker with a slice of the head died"):
        judge()
