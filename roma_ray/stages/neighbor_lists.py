"""Neighbors in a large S as planned batches: each answers a block of questions from one shard of S.

A worker holds one shard's lists at a time (`manifold/inverted.py`) and takes the shard's blocks one after another; what it finds
lies in a file a batch until the driver, block by block, has the best of all shards. So neither holds a number a question and
candidate, and who did which batch changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from roma_ray.engine.devices import device_kind
from roma_ray.engine.model_spec import set_threads
from roma_ray.engine.progress import Progress
from roma_ray.engine.work import Executor, Job, Report
from roma_ray.errors import ArtifactError
from roma_ray.manifold.inverted import Lookup, Proposals, Propose, Sample, Shard, merged
from roma_ray.manifold.search import resolve_backend
from roma_ray.manifold.similarity import UnitRows
from roma_ray.stages.embedding import read_embeddings
from roma_ray.store.artifacts import note_device
from roma_ray.store.files import present
from roma_ray.store.tensors import DAMAGED, read_tensors, write_tensors

LISTS = ".lists"
# Questions of a batch: some seconds of a GPU, a minute of a core, and 12 MB of answers for three neighbors.
BLOCK = 2**17


def spread(job: Job, execute: Executor, progress: Progress, block: int = BLOCK) -> Propose:
    """Searches S by batches of `block` questions that `execute` runs. Raises what that raises, StorageError, ArtifactError."""

    def propose(unit: UnitRows, lookup: Lookup, device: torch.device) -> Proposals:
        work = ListsWork(job.setup, job.stages, job.stage, block, -(-len(lookup.rows_Q) // block))
        sought = {"candidates": lookup.candidates_M, "rows": lookup.rows_Q, "norms": unit.norm_N}
        write_tensors(work.place / "lookup.safetensors", {**sought, "counts": torch.tensor([lookup.k, lookup.count])})
        batches = range(lookup.shards * work.blocks)
        done = {n for n, there in enumerate(present([work.found(n) for n in batches])) if there}
        sizes = [work.rows(n, len(lookup.rows_Q)) for n in batches]
        with progress.meter("neighbors", sum(sizes), "lookups", sum(sizes[n] for n in done)) as meter:
            for report in execute(work, sorted(set(batches) - done)):
                meter.advance(sizes[report.batch], seconds=report.seconds)
        return Found(work, lookup)

    return propose


@dataclass(frozen=True)
class ListsWork(Job):
    """The search as planned batches, a shard's one after another."""

    block: int
    """Questions of a batch; the last of a shard may have fewer."""
    blocks: int
    """Batches of a shard."""

    @property
    def place(self) -> Path:
        """What the batches leave until the neighbors are written."""
        return self.stage.path / LISTS

    def found(self, batch: int) -> Path:
        """A batch's answers."""
        return self.place / f"{batch:06d}.safetensors"

    def sample(self, shard: int) -> Path:
        """What a shard says of the sample that recall is measured on."""
        return self.place / f"sample-{shard:04d}.safetensors"

    def rows(self, batch: int, queried: int) -> int:
        """How many questions a batch answers."""
        return min(self.block, queried - batch % self.blocks * self.block)

    def open(self) -> Callable[[int], Report]:
        """Map the embeddings; returns the function that answers one block from one shard, whose lists are kept for its next."""
        set_threads(self.setup.model.threads)
        sought = _read(self.place / "lookup.safetensors")
        lookup = Lookup(sought["candidates"], sought["rows"], *sought["counts"].tolist())
        unit = UnitRows(read_embeddings(self.stages["embed"]), sought["norms"])
        device = resolve_backend(self.setup.config.neighbors.backend)[1]
        note_device(self.folder, device_kind(device.type))
        held: dict[int, Shard] = {}

        def do(batch: int) -> Report:
            started = time.monotonic()
            number, block = divmod(batch, self.blocks)
            if number not in held:
                held.clear()
                held[number] = Shard(unit, lookup, number, device)
            if block == 0:
                write_tensors(self.sample(number), vars(held[number].sample))
            start = block * self.block
            stop = start + self.rows(batch, len(lookup.rows_Q))
            scores_BF, picks_BF = held[number].top(start, stop)
            write_tensors(self.found(batch), {"scores": scores_BF, "picks": picks_BF.int()})
            return Report(batch, stop - start, 0, 0, time.monotonic() - started)

        return do


class Found:
    """The answers of all shards, merged in their order a block of questions at a time."""

    def __init__(self, work: ListsWork, lookup: Lookup) -> None:
        self.work, self.count, self.shards = work, lookup.count, lookup.shards
        self.recall = lookup.recall([Sample(**_read(work.sample(number))) for number in range(lookup.shards)])
        self._block, self._best = -1, (torch.empty(0), torch.empty(0, dtype=torch.int64))

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        parts, size = [], self.work.block
        for block in range(start // size, (stop - 1) // size + 1):
            if block != self._block:
                self._block, self._best = block, self._merged(block)
            here = slice(max(0, start - block * size), stop - block * size)
            parts.append((self._best[0][here], self._best[1][here]))
        return torch.cat([scores for scores, _ in parts]), torch.cat([picks for _, picks in parts])

    def _merged(self, block: int) -> tuple[Tensor, Tensor]:
        best: tuple[Tensor, Tensor] | None = None
        for shard in range(self.shards):
            found = _read(self.work.found(shard * self.work.blocks + block))
            scores_BF, picks_BF = found["scores"], found["picks"].long()
            # As in one process: the first into an answer that holds nothing yet.
            best = best or (torch.full_like(scores_BF, float("-inf")), torch.zeros_like(picks_BF))
            best = merged(*best, scores_BF, picks_BF, self.count)
        assert best is not None
        return best


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)[0]
    except DAMAGED as error:
        raise ArtifactError(f"{path} cannot be read ({error}); remove {path.parent} and run again") from None
