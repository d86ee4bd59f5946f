"""Slice streaming: extraction of a model that does not fit, as a chain of layer slices, each loaded once over all batches.

Slice k reads the states that slice k - 1 left of every batch (under `.stream/`, in the model's own type, so nothing is
rounded) and leaves its own; the last one writes the batches' tables. The result is that of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from roma_ray.engine.chain import SlicePass, layer_parameters
from roma_ray.engine.extractor import ExtractWork, batch_table
from roma_ray.engine.model_spec import ModelSpec
from roma_ray.engine.work import Executor, Report
from roma_ray.errors import CacheError, ModelError
from roma_ray.moe.snapshot import open_snapshot
from roma_ray.moe.whole import check_weights
from roma_ray.store.files import exists, remove, remove_folder
from roma_ray.store.tensors import DAMAGED, read_tensors, write_tensors

STREAM = ".stream"


def make_chain(work: ExtractWork, memory_gb: float) -> list[SliceWork]:
    """The slices of an extraction, in order.

    Raises ModelError when no layer fits into the limit, or a tensor of any layer is missing.
    """
    # The last slice is loaded after all the others have worked.
    check_weights(open_snapshot(work.model.path, work.model.revision))
    ranges = plan_chain(work.model, memory_gb)
    layers = ranges[-1][1]
    # Another limit is another chain, whose slices must not take up what these leave.
    place = f"{STREAM}/{memory_gb:g}"
    return [
        SliceWork(work, place, start, stop, number, last=number == len(ranges) - 1, share=(stop - start) / layers)
        for number, (start, stop) in enumerate(ranges)
    ]


def stream(
    chain: Sequence[SliceWork], pending: Sequence[int], execute: Executor, advance: Callable[[int, float], None]
) -> None:
    """Extract the pending batches, one slice after another; `advance` hears of each batch and the slice's share of its layers."""
    for link in chain:
        left = [batch for batch in pending if not link.done(batch)]
        for report in execute(link, left):
            advance(report.batch, link.share)
        if link.number > 0:
            for batch in pending:
                remove(link.states(batch, link.number - 1))
    remove_folder(Path(chain[0].folder) / STREAM)


def plan_chain(model: ModelSpec, memory_gb: float, *, least: bool = False) -> list[tuple[int, int]]:
    """Consecutive layer ranges whose weights fit into the limit, as few as there can be.

    `least`: a layer that is larger than the limit runs alone. Raises ModelError for such a layer otherwise.
    """
    layers = layer_parameters(model)
    itemsize = getattr(torch, model.dtype).itemsize
    budget = memory_gb * 1e9 / itemsize
    if max(layers) > budget and not least:
        need = max(layers) * itemsize / 1e9
        raise ModelError(f"extraction.memory_gb={memory_gb:g} holds no single layer; the largest needs {need:.2f} GB")
    chain, start, held = [], 0, 0
    for layer, size in enumerate(layers):
        if held and held + size > budget:
            chain.append((start, layer))
            start, held = layer, 0
        held += size
    return [*chain, (start, len(layers))]


@dataclass(frozen=True)
class SliceWork:
    """One slice of the chain over all batches."""

    work: ExtractWork
    place: str
    """Where the slices leave what they hand on, within the stage's folder."""
    start: int
    stop: int
    number: int
    last: bool
    share: float
    """Of the model's layers."""

    @property
    def name(self) -> str:
        """Shown in progress and errors."""
        return self.work.name

    @property
    def folder(self) -> str:
        """The stage's folder."""
        return self.work.folder

    def parts(self, batch: int, number: int) -> Path:
        """What slice `number` keeps of a batch until the last slice is through: routing rows and errors."""
        return Path(self.folder) / self.place / str(number) / f"{batch:06d}.parts.safetensors"

    def states(self, batch: int, number: int) -> Path:
        """The states that left slice `number`."""
        return Path(self.folder) / self.place / str(number) / f"{batch:06d}.states.safetensors"

    def done(self, batch: int) -> bool:
        """Whether this slice is through with a batch."""
        return exists(batch_table(self.folder, batch)) if self.last else exists(self.parts(batch, self.number))

    def open(self) -> Callable[[int], Report]:
        """Load the slice; returns the function that runs it on one batch."""
        return SliceExtractor(self)


class SliceExtractor:
    """A loaded slice that runs planned batches, from and to files."""

    def __init__(self, link: SliceWork) -> None:
        self.link = link
        self.run = SlicePass(link.work, link.start, link.stop, last=link.last)

    def __call__(self, batch: int) -> Report:
        """Run one batch through the slice and write what it leaves. Raises ModelError, CacheError."""
        link = self.link
        leaving = self.run(batch, _OnDisk(link, batch) if link.number else None)
        if not link.last:
            if leaving.states_TD is not None:
                write_tensors(link.states(batch, link.number), {"hidden": leaving.states_TD.cpu().contiguous()})
            own = leaving.routing_1PLE
            kept = {"none": torch.zeros(1)} if own is None else {"routing": own.cpu().contiguous()}
            write_tensors(link.parts(batch, link.number), kept)
        return leaving.report


@dataclass(frozen=True)
class _OnDisk:
    """What the slices before `link` left of a batch: a `Before`."""

    link: SliceWork
    batch: int

    def states(self) -> Tensor:
        return _read(self.link.states(self.batch, self.link.number - 1))["hidden"]

    def routing(self) -> list[Tensor]:
        found = [_read(self.link.parts(self.batch, number)).get("routing") for number in range(self.link.number)]
        return [part for part in found if part is not None]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)[0]
    except DAMAGED as error:
        folder = path.parents[1]
        raise CacheError(f"{path} cannot be read ({error}); remove {folder} and run again") from None
