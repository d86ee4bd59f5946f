"""Slice streaming: extraction of a model that does not fit, as a chain of layer slices, each loaded once over all batches.

Slice k reads the states that slice k - 1 left of every batch (under `.stream/`, in the model's own type, so nothing is
rounded) and leaves its own; the last one writes the batches' tables. The result is that of the whole model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from roma_ray.engine.devices import device_kind
from roma_ray.engine.extractor import Batches, Extracted, ExtractWork, batch_table, run_part
from roma_ray.engine.forward import answered, choice_scores
from roma_ray.engine.model_spec import ModelSpec
from roma_ray.engine.work import Executor, Report
from roma_ray.errors import CacheError, ModelError
from roma_ray.moe.snapshot import open_snapshot
from roma_ray.moe.whole import check_weights, model_sizes
from roma_ray.store.artifacts import note_device
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
    sizes = model_sizes(model.path, revision=model.revision)
    itemsize = getattr(torch, model.dtype).itemsize
    budget = memory_gb * 1e9 / itemsize
    layers = list(sizes.layers)
    layers[0] += sizes.embedding
    layers[-1] += sizes.head
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
        note_device(self.folder, device_kind(self.work.model.device))
        return SliceExtractor(self)


class SliceExtractor:
    """A loaded slice that runs planned batches."""

    def __init__(self, link: SliceWork) -> None:
        self.link = link
        self.batches = Batches(link.work)
        self.part = link.work.model.load(link.start, None if link.last else link.stop, with_lm_head=link.last)
        self.vocabulary = self.part.model.config.get_text_config().vocab_size

    @torch.inference_mode()
    def __call__(self, batch: int) -> Report:
        """Run one batch through the slice and write what it leaves."""
        started = time.monotonic()
        link, rows = self.link, self.batches.batches[batch]
        errors = self.batches.foreign_tokens(rows, self.vocabulary)
        good = [row for row in rows if row not in errors]
        routing: list[Tensor] = []
        result, tokens = Extracted.empty(), 0
        if good:
            reading = self.batches.reading(good)
            tokens = len(reading.layout.packing)
            entering = _read(link.states(batch, link.number - 1))["hidden"] if link.number else None
            try:
                states, after_attention, own = run_part(self.part, reading, entering, link.work.cuts)
            except (RuntimeError, ValueError, IndexError) as failure:
                raise ModelError(
                    f"batch {batch} fails in layers {link.start} to {link.stop - 1}: {failure}. If memory ran out, lower "
                    "extraction.batch_tokens; without extraction.memory_gb a single bad question is set aside."
                ) from failure
            self.batches.write_activations(batch, after_attention)
            routing = [own] if own is not None else []
            if link.last:
                earlier = [_read(link.parts(batch, n)).get("routing") for n in range(link.number)]
                whole = torch.cat([part.to(states.device) for part in [*earlier, *routing] if part is not None], dim=2)
                scores = choice_scores(states, reading.keep, reading.layout)
                predictions = answered(states, reading.keep, reading.layout, scores, self.batches.rule)
                result = Extracted(good, after_attention, reading.routing(whole), scores, predictions)
            else:
                write_tensors(link.states(batch, link.number), {"hidden": states.cpu().contiguous()})
        if link.last:
            self.batches.write_rows(batch, result, errors)
        else:
            kept = {"routing": routing[0].cpu().contiguous()} if routing else {"none": torch.zeros(1)}
            write_tensors(link.parts(batch, link.number), kept)
        return Report(batch, len(rows), tokens, len(errors), time.monotonic() - started)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)[0]
    except DAMAGED as error:
        folder = path.parents[1]
        raise CacheError(f"{path} cannot be read ({error}); remove {folder} and run again") from None
