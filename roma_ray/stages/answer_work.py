"""What base and tuned routers answer, as planned batches: one process or a cluster's workers answer, kill and resume included.

An evaluation has four sections: `base` (validation and test questions by the base's routers, which a stage of its own keeps),
`tuned` (the test questions by the exported routers), `trained` (a sample of the trained questions by these) and `texts` (what
both write to free-form test questions). A section's folder holds `plan.json`, its parts, and a table a part, which marks it as
done. A part is one planned batch of the head or, of many, a few: a file for each of thousands would cost more than it saves.

A worker loads the head once and exchanges its gates. Nobody is set aside: a question that fails, or kills its worker, is named.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from roma_ray.engine.batches import chunks
from roma_ray.engine.cache import States, open_states
from roma_ray.engine.devices import device_kind
from roma_ray.engine.generation import Decoder, Written, rules_for
from roma_ray.engine.identity import is_free
from roma_ray.engine.model_spec import ModelSpec, set_threads
from roma_ray.engine.question_table import TABLE, read_prompts, read_table, write_table
from roma_ray.engine.scoring import Scores, joined, plan_scoring, refuse_not_finite, score_batches
from roma_ray.engine.setup import Setup
from roma_ray.engine.tokenizer import load_tokenizer
from roma_ray.engine.work import Job, Report
from roma_ray.errors import ArtifactError, ModelError, RomaError, WorkerError
from roma_ray.moe.adapters import load_adapter
from roma_ray.moe.head_chain import Chain
from roma_ray.moe.routers import gates_of, put_gates
from roma_ray.moe.slices import Slice
from roma_ray.questions.prompts import Prompt
from roma_ray.stages.base_scores import PARTS, scores_of, scoring, write_scores
from roma_ray.stages.finetuning import ADAPTER
from roma_ray.store.artifacts import note_device, write_json
from roma_ray.store.files import exists, present, read_json
from roma_ray.store.tables import read_tables, table_facts

SECTIONS = ("base", "tuned", "trained", "texts")
_PLAN = "plan.json"
_PARTS, _BATCHES = 32, 8
"""About how many parts there are at least before a part has several batches, and how many it has at most."""
_WRITTEN = pa.schema(
    [
        ("row", pa.int64()),
        *(
            (f"{model}_{name}", kind)
            for model in ("base", "tuned")
            for name, kind in (("text", pa.string()), ("ids", pa.list_(pa.int64())), ("ended", pa.string()))
        ),
    ]
)


@dataclass(frozen=True)
class Part:
    """Some planned batches of rows that are answered together."""

    batches: list[list[int]]
    size: int
    """Tokens; of `texts` questions."""

    @property
    def rows(self) -> list[int]:
        """The rows of all batches."""
        return [row for batch in self.batches for row in batch]


def plan_scores(prompts: Sequence[Prompt], rows: Sequence[int], prefix: int, batch_tokens: int) -> list[Part]:
    """The parts in which some rows are scored, whoever does it."""
    planned = plan_scoring(prompts, rows, prefix, batch_tokens)
    size = max(1, min(len(planned) // _PARTS, _BATCHES))
    groups = [planned[start : start + size] for start in range(0, len(planned), size)]
    return [Part([batch for batch, _ in group], sum(size for _, size in group)) for group in groups]


def plan_texts(prompts: Sequence[Prompt], rows: Sequence[int], generation_batch: int) -> list[Part]:
    """The parts in which answers to some rows are written, the longest prompts first: prompts of like length go together."""
    order = sorted(rows, key=lambda row: -len(prompts[row].prompt_ids))
    return [Part([batch], len(batch)) for batch in chunks(order, generation_batch)]


@dataclass(frozen=True)
class AnswerWork(Job):
    """An evaluation's answers as planned parts of its sections; part n of section s is batch `number(s, n)`."""

    base: str
    """The folder in which the base's section lies."""

    @property
    def name(self) -> str:
        """It is placed, and its workers are counted, as those of benchmarks."""
        return "evaluate"

    @property
    def model(self) -> ModelSpec:
        """What a worker loads a part of."""
        return self.setup.model

    def place(self, section: str) -> Path:
        """Where a section lies."""
        return Path(self.base if section == "base" else self.folder) / PARTS / section

    def file(self, section: str, part: int) -> Path:
        """The answers of a part; its presence marks it as done."""
        return self.place(section) / f"{part:06d}.parquet"

    def planned(self, section: str, parts: Sequence[Part]) -> list[Part]:
        """The parts of a section, as saved by the first attempt, or else these. Raises ArtifactError."""
        path = self.place(section) / _PLAN
        if not exists(path):
            write_json(path, [[part.size, part.batches] for part in parts])
        return read_parts(path)

    def missing(self, section: str, parts: Sequence[Part]) -> list[int]:
        """The parts that are not done."""
        done = present([self.file(section, part) for part in range(len(parts))])
        return [part for part, there in enumerate(done) if not there]

    def scores(self, section: str, rows: Sequence[int], count: int) -> Scores:
        """What was gathered of a section of `count` parts, in the order of `rows`. Raises ArtifactError."""
        whole = joined([scores_of(table) for table in read_tables(self._files(section, count))])
        self._check_whole(section, whole.rows, rows)
        return whole.of(rows)

    def texts(self, rows: Sequence[int], count: int) -> dict[str, list[Written]]:
        """What each model wrote to the questions `rows`. Raises ArtifactError."""
        found = {row["row"]: row for table in read_tables(self._files("texts", count)) for row in table.to_pylist()}
        self._check_whole("texts", list(found), rows)
        return {
            model: [
                Written(one[f"{model}_text"], tuple(one[f"{model}_ids"]), one[f"{model}_ended"])
                for one in (found[row] for row in rows)
            ]
            for model in ("base", "tuned")
        }

    def shape(self, section: str) -> dict[str, Any]:
        """What a part says of the head's routers: `routers` (their layers), `top_k`. Raises ArtifactError."""
        return table_facts(read_table(self.file(section, 0), ["row"]), "top_k")

    def _files(self, section: str, count: int) -> list[Path]:
        return [self.file(section, part) for part in range(count)]

    def _check_whole(self, section: str, found: Sequence[int], rows: Sequence[int]) -> None:
        if sorted(found) != sorted(rows):
            place = self.place(section)
            raise ArtifactError(f"{place} does not hold each question once; remove {place.parent} and run again")

    def open(self) -> Callable[[int], Report]:
        """Load the head; returns the function that answers one part."""
        set_threads(self.model.threads)
        head = self.model.load(self.setup.cut, None, with_lm_head=True)
        return Answerer(self, head, ahead=False)


def writes(setup: Setup) -> bool:
    """Whether the evaluation needs answers that are written."""
    return is_free(setup.config) and setup.config.extraction.success.writes


def number(section: str, part: int) -> int:
    """A part among those of all sections."""
    return part * len(SECTIONS) + SECTIONS.index(section)


def section_of(number: int) -> tuple[str, int]:
    """The section of a part, and which one of it."""
    part, section = divmod(number, len(SECTIONS))
    return SECTIONS[section], part


def read_parts(path: Path) -> list[Part]:
    """A section's parts. Raises ArtifactError for a damaged file."""
    try:
        return [Part([[int(row) for row in rows] for rows in batches], int(size)) for size, batches in read_json(path)]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); remove {path.parents[1]} and run again") from None


class Gates:
    """The base's and the exported gates of a loaded head, exchanged in place."""

    def __init__(self, head: Slice | Chain, adapter: Path) -> None:
        self.head, self.adapter, self.current = head, adapter, "base"
        self.known = {"base": gates_of(head.routers)}

    def put(self, model: str) -> None:
        """Make `base` or `tuned` the head's gates. Raises CheckpointError."""
        if model == self.current:
            return
        if model in self.known:
            put_gates(self.head.routers, self.known[model])
        else:
            load_adapter(self.adapter, self.head)
            self.known[model] = gates_of(self.head.routers)
        self.current = model


class Answerer:
    """A loaded head that answers parts."""

    def __init__(
        self, work: AnswerWork, head: Slice | Chain, prompts: Sequence[Prompt] | None = None, *, ahead: bool = True
    ) -> None:
        """`prompts`: the question table where it was read already; `ahead` as of `open_states`."""
        note_device(work.folder, device_kind(work.model.device))
        self.work, self.head = work, head
        self.prompts = prompts or read_prompts(work.stages["questions"].path / TABLE)
        self.states: States = open_states(work.model, work.stages["extract"].path, work.setup.cut, ahead=ahead)
        self.gates = Gates(head, work.stages["finetune"].path / ADAPTER)
        self.how = scoring(work.setup)
        self.batch_tokens = self.how.pop("batch_tokens")
        self.plans: dict[str, list[Part]] = {}
        self.decoder: Decoder | None = None

    def __call__(self, batch: int, excluded: frozenset[int] = frozenset()) -> Report:
        """Answer a part and write its table. Raises GuardError, CheckpointError, CacheError, ModelError; WorkerError for a question that
        kills the process that answers it (`excluded`): judging without it would judge other questions.
        """
        started = time.monotonic()
        section, part = section_of(batch)
        asked = self._part(batch)
        if excluded:
            names = ", ".join(repr(self.prompts[row].id) for row in sorted(excluded)[:3])
            raise WorkerError(
                f"answering {names} kills the worker that does it; most likely memory ran out. Use nodes with more memory, or fewer "
                "workers on a node (ray.evaluate_workers), or leave the question(s) out of the file: an evaluation sets none aside."
            )
        try:
            (self._write if section == "texts" else self._score)(section, part, asked)
        except torch.OutOfMemoryError as error:
            setting = "success.generation_batch" if section == "texts" else "batch_tokens"
            raise ModelError(f"memory ran out on a batch of the evaluation; lower extraction.{setting}") from error
        return Report(batch, len(asked.rows), asked.size, 0, time.monotonic() - started)

    def rows(self, batch: int) -> list[int]:
        """The rows of a part."""
        return self._part(batch).rows

    def probe(self, row: int) -> None:
        """Answer one row alone and keep nothing, to find out whether it kills the process."""
        with contextlib.suppress(RomaError, RuntimeError):
            list(score_batches(self.head, self.states, self.prompts, [[row]], **self.how))
            if writes(self.work.setup):
                self._written([row])

    def _part(self, batch: int) -> Part:
        section, part = section_of(batch)
        if section not in self.plans:
            self.plans[section] = read_parts(self.work.place(section) / _PLAN)
        return self.plans[section][part]

    def _score(self, section: str, part: int, asked: Part) -> None:
        self.gates.put("base" if section == "base" else "tuned")
        scores = joined(list(score_batches(self.head, self.states, self.prompts, asked.batches, **self.how)))
        bad = scores.not_finite()
        refuse_not_finite(bad, len(scores.rows), self.head, self.states, self.prompts, self.how["tokens"])
        routers = self.head.routers
        shape = {"routers": [router.layer for router in routers], "top_k": routers[0].top_k}
        write_scores(self.work.file(section, part), scores, **shape)

    def _write(self, section: str, part: int, asked: Part) -> None:
        written = self._written(asked.rows)
        columns: dict[str, Any] = {"row": asked.rows}
        for model, answers in written.items():
            columns[f"{model}_text"] = [answer.text for answer in answers]
            columns[f"{model}_ids"] = [answer.ids for answer in answers]
            columns[f"{model}_ended"] = [answer.ended for answer in answers]
        write_table(self.work.file(section, part), columns, _WRITTEN)

    def _written(self, rows: Sequence[int]) -> Mapping[str, list[Written]]:
        """What both models write; the layers below the head run each prompt once for both."""
        setup = self.work.setup
        assert isinstance(self.head, Slice), "a configuration that divides the head has no written answers"
        if self.decoder is None:
            spec = setup.model
            tokenizer = load_tokenizer(spec.path, spec.revision)
            below = [spec.load(0, setup.cut, with_lm_head=False)] if setup.cut else []
            rules = rules_for(spec, tokenizer, self.prompts, setup.config.extraction.success)
            self.decoder = Decoder([*below, self.head], tokenizer, rules)
        begun = self.decoder.begin([self.prompts[row].prompt_ids for row in rows])
        found = {}
        for model in ("base", "tuned"):
            self.gates.put(model)
            found[model] = self.decoder.write(begun)
        return found
