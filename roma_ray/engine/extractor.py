"""One worker's part of the extraction: planned batches through a loaded model, each writing its own files.

T flat tokens, D width, N kept tokens, P routing positions, L layers, E experts, Q questions, V vocabulary.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from roma_ray.engine.batches import read_plan
from roma_ray.engine.devices import device_kind
from roma_ray.engine.forward import Layout, answered, choice_scores, lay_out, mean_routing, own_tokens
from roma_ray.engine.generation import Decoder, Written, begun_batches, rules_for
from roma_ray.engine.identity import answer_rule, is_free
from roma_ray.engine.model_spec import ModelSpec
from roma_ray.engine.question_table import TABLE, read_prompts, write_table
from roma_ray.engine.setup import Setup
from roma_ray.engine.tokenizer import load_tokenizer
from roma_ray.engine.work import Job, Report
from roma_ray.errors import ModelError, RomaError
from roma_ray.moe.passes import run_packed
from roma_ray.moe.reading import read_routing
from roma_ray.moe.slices import Slice
from roma_ray.store.artifacts import note_device
from roma_ray.store.tensors import write_tensors

PLAN = "plan.parquet"
NOT_FINITE = "the model's scores are not finite"
_FAILURES = (RuntimeError, ValueError, IndexError)


def batch_table(folder: str | Path, batch: int) -> Path:
    """The table of a batch; its presence marks the batch as done."""
    return Path(folder) / "batches" / f"{batch:06d}.parquet"


def batch_activations(folder: str | Path, batch: int, cut: int) -> Path:
    """The states of a batch after the attention of layer `cut`."""
    return Path(folder) / "batches" / f"{batch:06d}.{cut}.safetensors"


def cache_dtype(setup: Setup) -> str:
    """Type of the cached activations; `auto` is the model's own."""
    chosen = setup.config.extraction.activation_dtype
    return setup.model.dtype if chosen == "auto" else chosen


@dataclass(frozen=True)
class ExtractWork(Job):
    """The extraction as planned batches."""

    @property
    def questions(self) -> Path:
        """The table of encoded questions."""
        return self.stages["questions"].path / TABLE

    @property
    def model(self) -> ModelSpec:
        """What a worker loads."""
        return self.setup.model

    @property
    def cuts(self) -> tuple[int, ...]:
        """Layers after whose attention the states are kept; empty without a cache."""
        return self.setup.cuts if self.setup.config.extraction.cache else ()

    @property
    def tokens(self) -> tuple[str, ...]:
        """Token rules whose routing is kept."""
        return self.setup.token_rules

    def open(self) -> Callable[[int], Report]:
        """Load the model; returns the function that extracts one planned batch."""
        note_device(self.folder, device_kind(self.model.device))
        return Extractor(self)


@dataclass(frozen=True)
class Reading:
    """What is read of a batch: at which tokens, under which rules."""

    layout: Layout
    positions: dict[str, Tensor]
    """Flat routing positions [Q, P] of each token rule."""
    keep: list[int]

    @staticmethod
    def of(layout: Layout, rules: Sequence[str]) -> Reading:
        """Everything that the scores and these token rules read."""
        return Reading.at(layout, {rule: layout.routing_positions(rule) for rule in rules})

    @staticmethod
    def at(layout: Layout, positions: dict[str, Tensor]) -> Reading:
        """Everything that the scores read, and these positions."""
        return Reading(layout, positions, layout.keep(*positions.values()))

    @property
    def flat_positions(self) -> Tensor:
        """All rules' positions as one row [1, ...]."""
        return torch.cat([table.reshape(-1) for table in self.positions.values()])[None]

    def routing(self, routing_1PLE: Tensor) -> dict[str, np.ndarray]:
        """r of every question under each rule, [Q, L, E] fp32, from the rows read at `flat_positions`."""
        found, start = {}, 0
        for rule, table in self.positions.items():
            section = routing_1PLE[:, start : start + table.numel()]
            found[rule] = mean_routing(section, table.to(section.device)).float().cpu().numpy()
            start += table.numel()
        return found


def run_part(
    part: Slice, reading: Reading, states_TD: Tensor | None, cuts: Sequence[int]
) -> tuple[Tensor, dict[int, Tensor], Tensor | None]:
    """Run one slice of the chain: what leaves it (the last slice: logits at the kept tokens), the states at those of `cuts`
    that lie in it, and the routing rows [1, P, L, E] at the reading's positions (None without an MoE layer)."""
    packing = reading.layout.packing
    mine = [cut for cut in cuts if part.start <= cut < part.stop]
    with read_routing(part.model, part.routers, reading.flat_positions) as tape:
        out = run_packed(
            part,
            packing,
            states_TD,
            after_attention=mine,
            keep=reading.keep if part.stop == part.num_layers else None,
        )
    return out.states, out.after_attention, tape.routing_BPLE if part.routers else None


@dataclass(frozen=True)
class Extracted:
    """What a batch gives; lists are in the order of `rows`."""

    rows: list[int]
    after_attention: dict[int, Tensor]
    routing: dict[str, np.ndarray]
    scores: list[list[float]]
    predictions: list[int]

    @staticmethod
    def empty() -> Extracted:
        return Extracted([], {}, {}, [], [])


class Batches:
    """The plan, and the files of a planned batch."""

    def __init__(self, work: ExtractWork) -> None:
        self.work = work
        self.prefix, self.batches = read_plan(Path(work.folder) / PLAN)
        self.prompts = read_prompts(work.questions)
        config = work.setup.config
        self.rule = answer_rule(config.questions.prompt)
        self.free = is_free(config)
        self.writing = config.extraction.success if self.free and config.extraction.success.writes else None

    def reading(self, rows: Sequence[int]) -> Reading:
        """The layout of some rows and what is read of it."""
        return Reading.of(lay_out([self.prompts[row] for row in rows], prefix=self.prefix), self.work.tokens)

    def foreign_tokens(self, rows: Sequence[int], vocabulary: int) -> dict[int, str]:
        """Why some of the rows cannot run on a model of this vocabulary."""
        errors = {}
        for row in rows:
            ids = (*self.prompts[row].prompt_ids, *(t for c in self.prompts[row].choice_ids for t in c))
            if max(ids) >= vocabulary:
                errors[row] = f"token {max(ids)} is beyond the model's vocabulary of {vocabulary}"
        return errors

    def write_activations(self, batch: int, after_attention: dict[int, Tensor]) -> None:
        """Write the states at each cut."""
        for cut, states_TD in after_attention.items():
            whole = states_TD.to(getattr(torch, cache_dtype(self.work.setup))).cpu().contiguous()
            write_tensors(batch_activations(self.work.folder, batch, cut), {"hidden": whole})

    def to_write(self, rows: Sequence[int]) -> list[int]:
        """Those of the rows whose answer is written: the training questions, where S takes that. The others' are in the evaluation."""
        return [row for row in rows if self.writing is not None and self.prompts[row].split == "train"]

    def write_rows(
        self,
        batch: int,
        result: Extracted,
        errors: dict[int, str],
        written: Mapping[int, Written] = MappingProxyType({}),
    ) -> int:
        """Write the batch's table, which marks it as done; returns how many rows failed."""
        for row, scores in zip(result.rows, result.scores, strict=True):
            if not all(np.isfinite(scores)):
                errors.setdefault(row, NOT_FINITE)
        place = {row: n for n, row in enumerate(result.rows)}
        lengths = [own_tokens(self.prompts[row], self.prefix) for row in result.rows]
        offsets = (self.prefix + np.concatenate([[0], np.cumsum(lengths)])).astype(int).tolist()
        schema = _schema(self.work.tokens, self.writing is not None)
        columns: dict[str, list[Any]] = {name: [] for name in schema.names}
        for row in self.batches[batch]:
            prompt, at = self.prompts[row], None if row in errors else place[row]
            found = None if at is None else result.scores[at]
            answer = None if at is None else result.predictions[at]
            columns["row"].append(row)
            columns["id"].append(prompt.id)
            columns["batch"].append(batch)
            columns["error"].append(errors.get(row))
            columns["scores"].append(found)
            columns["prediction"].append(answer)
            # Of a free answer the neighborhoods judge it, by a metric (`engine/success.py`).
            columns["is_correct"].append(None if self.free else answer is not None and answer == prompt.answer)
            text = written.get(row)
            for name in set(WRITTEN_FIELDS) & set(columns):
                columns[name].append(None if text is None or found is None else WRITTEN_FIELDS[name](text))
            columns["offset"].append(None if at is None else offsets[at])
            columns["tokens"].append(None if at is None else lengths[at])
            columns["shard_tokens"].append(offsets[-1])
            for rule in self.work.tokens:
                columns[f"routing_{rule}"].append(None if at is None else result.routing[rule][at].ravel())
        good = [at for row, at in place.items() if row not in errors]
        shape = next(iter(result.routing.values())).shape[1:] if good else None
        facts = {"layers": shape[0], "experts": shape[1]} if shape else {}
        write_table(batch_table(self.work.folder, batch), columns, schema, facts)
        return len(errors)


class Extractor:
    """A loaded model that extracts planned batches."""

    def __init__(self, work: ExtractWork) -> None:
        self.work = work
        self.batches = Batches(work)
        self.model = work.model.load(0, None, with_lm_head=True)
        self.vocabulary = self.model.model.config.get_text_config().vocab_size
        self.decoder: Decoder | None = None
        if self.batches.writing is not None:
            tokenizer = load_tokenizer(work.model.path, work.model.revision)
            rules = rules_for(work.model, tokenizer, self.batches.prompts, self.batches.writing)
            self.decoder = Decoder([self.model], tokenizer, rules)

    def __call__(self, batch: int, excluded: frozenset[int] = frozenset()) -> Report:
        """Extract one batch and write its files; `excluded` rows are set aside as having killed a worker."""
        started = time.monotonic()
        rows = self.rows(batch)
        errors = {row: "killed its worker" for row in rows if row in excluded}
        errors = {**self.batches.foreign_tokens(rows, self.vocabulary), **errors}
        result, tokens = self._survivors(rows, errors)
        self.batches.write_activations(batch, result.after_attention)
        bad = {row for row, scores in zip(result.rows, result.scores, strict=True) if not all(np.isfinite(scores))}
        written = self._written([row for row in result.rows if row not in bad])
        failed = self.batches.write_rows(batch, result, errors, written)
        return Report(batch, len(rows), tokens, failed, time.monotonic() - started)

    def rows(self, batch: int) -> list[int]:
        """The rows of a planned batch."""
        return self.batches.batches[batch]

    def probe(self, row: int) -> None:
        """Run one row alone and keep nothing, to find out whether it kills the process."""
        with contextlib.suppress(*_FAILURES):
            self._forward([row])
            self._written([row])

    def _survivors(self, rows: Sequence[int], errors: dict[int, str]) -> tuple[Extracted, int]:
        """The batch's result without the rows in `errors`, to which rows that fail on their own are added."""
        good = [row for row in rows if row not in errors]
        try:
            return self._forward(good)
        except _FAILURES as failure:
            for row in good:
                try:
                    self._forward([row])
                except _FAILURES as own:
                    errors[row] = f"{type(own).__name__}: {str(own).splitlines()[0]}"
            good = [row for row in rows if row not in errors]
            try:
                return self._forward(good)
            except _FAILURES:
                raise ModelError(
                    f"a batch of {len(good)} questions fails though each alone succeeds: {failure}. "
                    "If memory ran out, lower extraction.batch_tokens."
                ) from failure

    def _written(self, rows: Sequence[int]) -> dict[int, Written]:
        """The answers that greedy decoding writes, of those rows that need one. Raises ModelError, GuardError."""
        writing = self.batches.writing
        if self.decoder is None or writing is None:
            return {}
        wanted = self.batches.to_write(rows)
        prompts = [self.batches.prompts[row] for row in wanted]
        found: dict[int, Written] = {}
        try:
            for numbers, begun in begun_batches(self.decoder, prompts, writing.generation_batch):
                found |= {wanted[n]: answer for n, answer in zip(numbers, self.decoder.write(begun), strict=True)}
        except RomaError:
            raise
        except RuntimeError as failure:
            raise ModelError(
                f"writing the answers to {len(wanted)} questions fails: {str(failure).splitlines()[0]}. If memory ran out, lower "
                "extraction.success.generation_batch or max_new_tokens."
            ) from failure
        return found

    @torch.inference_mode()
    def _forward(self, rows: Sequence[int]) -> tuple[Extracted, int]:
        if not rows:
            return Extracted.empty(), 0
        reading = self.batches.reading(rows)
        logits_NV, after_attention, routing_1PLE = run_part(self.model, reading, None, self.work.cuts)
        assert routing_1PLE is not None
        scores = choice_scores(logits_NV, reading.keep, reading.layout)
        predictions = answered(logits_NV, reading.keep, reading.layout, scores, self.batches.rule)
        result = Extracted(list(rows), after_attention, reading.routing(routing_1PLE), scores, predictions)
        return result, len(reading.layout.packing)


WRITTEN_FIELDS: Mapping[str, Callable[[Written], Any]] = {
    "text": lambda written: written.text,
    "new_tokens": lambda written: len(written.ids),
    "ended": lambda written: written.ended,
}
"""What a table keeps of a written answer."""
_WRITTEN_TYPES = (("text", pa.string()), ("new_tokens", pa.int32()), ("ended", pa.string()))


def _schema(tokens: Sequence[str], writes: bool) -> pa.Schema:
    fields = [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("batch", pa.int64()),
        ("error", pa.string()),
        ("scores", pa.list_(pa.float32())),
        ("prediction", pa.int32()),
        ("is_correct", pa.bool_()),
        ("offset", pa.int64()),
        ("tokens", pa.int64()),
        ("shard_tokens", pa.int64()),
        *(_WRITTEN_TYPES if writes else ()),
        *((f"routing_{rule}", pa.list_(pa.float32())) for rule in tokens),
    ]
    return pa.schema(fields)
