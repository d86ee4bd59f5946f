"""A chain of slices: which layers each of them holds, and what one of them does with a planned batch.

Streaming from disk (`engine/streaming.py`) and a chain of actors (`cluster/chain_actors.py`) carry what leaves a slice to the next
one, each in its own way. What is computed and written is here, once.

T flat tokens, D width, P routing positions, L layers, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from roma_ray.engine.devices import device_kind
from roma_ray.engine.extractor import Batches, Extracted, ExtractWork, run_part
from roma_ray.engine.forward import answered, choice_scores
from roma_ray.engine.model_spec import ModelSpec
from roma_ray.engine.work import Report
from roma_ray.errors import ModelError
from roma_ray.moe.whole import model_sizes
from roma_ray.store.artifacts import note_device


def layer_parameters(model: ModelSpec) -> list[int]:
    """Parameters of each layer; the first counts with the embeddings, the last with the final norm and `lm_head`. Raises ModelError."""
    sizes = model_sizes(model.path, revision=model.revision)
    layers = list(sizes.layers)
    layers[0] += sizes.embedding
    layers[-1] += sizes.head
    return layers


def balanced(sizes: Sequence[int], slices: int) -> list[tuple[int, int]]:
    """Consecutive ranges of layers, the largest as small as can be, and the others as even as they then come."""
    assert 1 <= slices <= len(sizes)
    ends = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    # (largest, sum of squares, start of each range) of the best division of the first n layers.
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for _ in range(slices):
        found: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for start, (largest, squares, starts) in best.items():
            for stop in range(start + 1, len(ends)):
                size = ends[stop] - ends[start]
                candidate = (max(largest, size), squares + size * size, (*starts, start))
                if stop not in found or candidate < found[stop]:
                    found[stop] = candidate
        best = found
    starts = best[len(sizes)][2]
    return list(zip(starts, (*starts[1:], len(sizes)), strict=True))


class Before(Protocol):
    """What the earlier slices left of a batch."""

    def states(self) -> Tensor:
        """The states [T, D] that left the slice before."""

    def routing(self) -> list[Tensor]:
        """The routing rows [1, P, L, E] of all earlier slices that have routers, in their order."""


@dataclass(frozen=True)
class Leaving:
    """What leaves a slice of a batch."""

    states_TD: Tensor | None
    """None of the last slice, and where no question of the batch can run."""
    routing_1PLE: Tensor | None
    """Its own routers' rows; None where it has none, and of the last slice, which has put them into the table."""
    report: Report


class SlicePass:
    """A loaded slice that runs planned batches of an extraction. The last one writes their tables."""

    def __init__(self, work: ExtractWork, start: int, stop: int, *, last: bool) -> None:
        note_device(work.folder, device_kind(work.model.device))
        self.start, self.stop, self.last = start, stop, last
        self.cuts = work.cuts
        self.batches = Batches(work)
        self.part = work.model.load(start, None if last else stop, with_lm_head=last)
        self.vocabulary = self.part.model.config.get_text_config().vocab_size

    @torch.inference_mode()
    def __call__(self, batch: int, before: Before | None) -> Leaving:
        """Run one batch; `before` is None of the first slice. Raises ModelError."""
        started = time.monotonic()
        rows = self.batches.batches[batch]
        errors = self.batches.foreign_tokens(rows, self.vocabulary)
        good = [row for row in rows if row not in errors]
        states: Tensor | None = None
        own: Tensor | None = None
        result, tokens = Extracted.empty(), 0
        if good:
            reading = self.batches.reading(good)
            tokens = len(reading.layout.packing)
            try:
                states, after_attention, own = run_part(
                    self.part, reading, None if before is None else before.states(), self.cuts
                )
            except (RuntimeError, ValueError, IndexError) as failure:
                raise ModelError(
                    f"batch {batch} fails in layers {self.start} to {self.stop - 1}: {failure}. If memory ran out, lower "
                    "extraction.batch_tokens; without extraction.memory_gb and extraction.chain a single bad question is set aside."
                ) from failure
            self.batches.write_activations(batch, after_attention)
            if self.last:
                parts = [*([] if before is None else before.routing()), *([] if own is None else [own])]
                whole = torch.cat([part.to(states.device) for part in parts], dim=2)
                scores = choice_scores(states, reading.keep, reading.layout)
                predictions = answered(states, reading.keep, reading.layout, scores, self.batches.rule)
                result = Extracted(good, after_attention, reading.routing(whole), scores, predictions)
                states = own = None
        failed = self.batches.write_rows(batch, result, errors) if self.last else len(errors)
        return Leaving(states, own, Report(batch, len(rows), tokens, failed, time.monotonic() - started))


@dataclass(frozen=True)
class Flat:
    """A tensor as an array of bytes, which pickle, and so Ray's object store, passes on without looking into it, whatever its type."""

    content: np.ndarray
    dtype: torch.dtype
    shape: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> Flat:
        """A tensor of any device."""
        whole = tensor.detach().cpu().contiguous()
        return Flat(whole.reshape(-1).view(torch.uint8).numpy(), whole.dtype, tuple(whole.shape))

    def tensor(self) -> Tensor:
        """The same values on the CPU, of this process alone: what comes out of an object store may not be written to."""
        return torch.from_numpy(self.content.copy()).view(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Handed:
    """What one actor of a chain hands to the next, a `Before` there."""

    flat_states: Flat | None
    flat_routing: tuple[Flat, ...]
    report: Report
    """Of all slices so far: the seconds are their sum."""

    def states(self) -> Tensor:
        """As `Before.states`."""
        assert self.flat_states is not None
        return self.flat_states.tensor()

    def routing(self) -> list[Tensor]:
        """As `Before.routing`."""
        return [part.tensor() for part in self.flat_routing]


@dataclass(frozen=True)
class ChainLink:
    """One slice of a chain of actors. Picklable."""

    work: ExtractWork
    start: int
    stop: int
    last: bool

    def open(self) -> Callable[[int, Handed | None], Handed]:
        """Load the slice; returns the function that runs it on one batch, given what the slice before handed on."""
        run = SlicePass(self.work, self.start, self.stop, last=self.last)

        def hand_on(batch: int, before: Handed | None) -> Handed:
            leaving = run(batch, before)
            spent = leaving.report.seconds + (before.report.seconds if before is not None else 0.0)
            states = None if leaving.states_TD is None else Flat.of(leaving.states_TD)
            earlier = () if before is None or self.last else before.flat_routing
            own = () if leaving.routing_1PLE is None else (Flat.of(leaving.routing_1PLE),)
            return Handed(states, (*earlier, *own), replace(leaving.report, seconds=spent))

        return hand_on


def links_of(work: ExtractWork, ranges: Sequence[tuple[int, int]]) -> list[ChainLink]:
    """The slices of an extraction, in order."""
    return [ChainLink(work, start, stop, last=stop == ranges[-1][1]) for start, stop in ranges]
