"""Comparisons of runs, and works and jobs that die on purpose."""

from __future__ import annotations

import ipaddress
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import psutil
import ray
import torch
from ray.exceptions import OutOfMemoryError, RayActorError

from roma_ray.ablations.trial import TrialWork, here
from roma_ray.engine.extractor import Extractor, ExtractWork
from roma_ray.engine.training import Outcome, World
from roma_ray.engine.work import Report
from roma_ray.errors import ModelError, TrainingError
from roma_ray.moe.slices import Slice
from roma_ray.runs.pipeline import Run
from roma_ray.stages.encoding import EncodeWork
from roma_ray.stages.finetuning import TrainJob


def digests(run: Run) -> dict[str, str]:
    """Every file of a run by stage, fingerprint and name."""
    return {
        f"{name}/{stage.fingerprint}/{file}": fact["sha256"]
        for name, stage in run.stages.items()
        for file, fact in stage.manifest()["files"].items()
    }


def die() -> None:
    """What the system does to a process when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


class DeadlyExtractor(Extractor):
    """An extractor whose process dies at a row, or once at a batch."""

    work: DeadlyWork

    def __call__(self, batch: int, excluded: frozenset[int] = frozenset()) -> Report:
        marker = Path(self.work.folder) / ".died"
        if batch == self.work.dies_once_at and not marker.exists():
            marker.touch()
            die()
        if set(self.rows(batch)) & set(self.work.poison) - excluded:
            die()
        return super().__call__(batch, excluded)

    def probe(self, row: int) -> None:
        if row in self.work.poison:
            die()
        super().probe(row)


@dataclass(frozen=True)
class DeadlyWork(ExtractWork):
    """Extraction that dies on purpose."""

    poison: tuple[int, ...] = ()
    dies_once_at: int | None = None

    def open(self) -> Callable[[int], Report]:
        return DeadlyExtractor(self)


@dataclass(frozen=True)
class DeadlyEncoding(EncodeWork):
    """Encoding that dies once, in its fifth batch."""

    def open(self) -> Callable[[int], Report]:
        do, marker = super().open(), self.stage.path / ".died"

        def deadly(batch: int) -> Report:
            if batch == 4 and not marker.exists():
                marker.touch()
                die()
            return do(batch)

        return deadly


@dataclass(frozen=True)
class FailingWork(ExtractWork):
    """Extraction that fails in the worker, expectedly or by a bug."""

    bug: bool = False

    def open(self) -> Callable[[int], Report]:
        if self.bug:
            return lambda batch: Report(batch, 1 // 0, 0, 0, 0.0)
        raise ModelError("no such model; give another")


@dataclass(frozen=True)
class TunedWork(ExtractWork):
    """Works with other gates than the base model's in the whole of it, as a judge of tuned routers does."""

    def open(self) -> Callable[[int], Report]:
        whole = self.model.load(0, None, with_lm_head=True)
        with torch.no_grad():
            for router in whole.routers:
                router.gate.weight.mul_(-1)
        return lambda batch: Report(batch, 0, 0, 0, 0.0)


class Noting:
    """An opened `NotingWork`: batch n has the rows 2 n and 2 n + 1."""

    def __init__(self, work: NotingWork) -> None:
        self.work, self.notes = work, Path(work.folder) / "notes"

    def rows(self, batch: int) -> list[int]:
        return [2 * batch, 2 * batch + 1]

    def probe(self, row: int) -> None:
        if row == self.work.poison:
            die()

    def __call__(self, batch: int, excluded: frozenset[int] = frozenset()) -> Report:
        with open(self.notes, "a") as stream:
            stream.write(f"{batch} {os.getpid()}\n")
        if self.work.poison in set(self.rows(batch)) - excluded:
            die()
        if batch == self.work.waits_at and not (Path(self.work.folder) / "killed").exists():
            time.sleep(600)
        return Report(batch, 2, 2, len(excluded), 0.0)


@dataclass(frozen=True)
class NotingWork:
    """Batches without work that note that they were begun, and in which process; one of them waits for its process to be killed."""

    folder: str
    waits_at: int | None = None
    poison: int | None = None
    name: str = "extract"

    def open(self) -> Noting:
        return Noting(self)


class LightWork(NotingWork):
    """One that loads no model."""

    loads_model: ClassVar[bool] = False


def begun(folder: Path) -> list[tuple[int, int]]:
    """The batches of a NotingWork that were begun, each with its process."""
    notes = folder / "notes"
    if not notes.exists():
        return []
    return [(int(batch), int(pid)) for batch, pid in (line.split() for line in notes.read_text().splitlines())]


@dataclass(frozen=True)
class DeadlyJob(TrainJob):
    """Training in which one worker dies once, or fails, at a step."""

    victim: int = 0
    at_step: int = 3
    fails: bool = False
    notes: str = ""

    def run(
        self,
        world: World | None = None,
        report: Callable[[dict[str, Any]], None] = lambda epoch: None,
        advance: Callable[[int, str], None] = lambda count, note: None,
        head: Slice | None = None,
    ) -> Outcome:
        assert world is not None
        steps = 0
        (Path(self.notes) / f"started-{os.getpid()}").write_text("\n".join(listening(psutil.Process())))

        def counting(count: int, note: str) -> None:
            nonlocal steps
            steps += 1
            marker = Path(self.notes) / "died"
            if world.rank == self.victim and steps == self.at_step and not marker.exists():
                marker.touch()
                if self.fails:
                    raise TrainingError("the loss is not finite; lower the rate")
                die()
            advance(count, note)

        return super().run(world, report, counting, head)


def listening(process: psutil.Process) -> list[str]:
    """The addresses on which a process waits for connections."""
    return [found.laddr.ip for found in process.net_connections("inet") if found.status == psutil.CONN_LISTEN]


def loopback(address: str) -> bool:
    """Whether only this machine reaches the address (IPv4 may be written within IPv6)."""
    return ipaddress.ip_address(address.removeprefix("::ffff:")).is_loopback


def started(notes: Path) -> int:
    """How many workers have started a DeadlyJob."""
    return len(list(notes.glob("started-*")))


def epochs_in(records: Sequence[dict[str, Any]]) -> list[int]:
    return [record["epoch"] for record in records]


DEADLY_RATE = 0.5


def dies(work: TrialWork, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """`dies_once`; the trial with the deadly rate dies whenever it is tried."""
    if work.setup.config.finetune.learning_rate == DEADLY_RATE:
        with open(Path(work.setup.config.storage or "") / ".tries", "a") as stream:
            stream.write("x")
        die()
    return dies_once(work, report)


class ForMemory:
    """`ray` for whom a dead actor is one that the memory monitor ended."""

    def __getattr__(self, name: str) -> Any:
        return getattr(ray, name)

    def get(self, reference: Any) -> Any:
        try:
            return ray.get(reference)
        except RayActorError as error:
            raise OutOfMemoryError("Task was killed due to the node running low on memory.") from error


def dies_once(work: TrialWork, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """A trial whose process dies in the middle of training, once: `here`, with a death after its second checkpoint."""
    marker = Path(work.stages["finetune"].path) / ".died"

    def hear(record: dict[str, Any]) -> None:
        if not marker.exists():
            marker.touch()
            die()
        report(record)

    return here(work, hear)


def counts_epochs(work: TrialWork, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """A trial without work: its accuracy is its learning rate, four epochs long."""
    rate = work.setup.config.finetune.learning_rate
    for epoch in range(1, 4):
        report({"epoch": epoch, "validation_accuracy": rate})
    return {"epoch": 4, "validation_accuracy": rate}
