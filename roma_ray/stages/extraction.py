"""The extraction pass: routing weights, choice scores, answers and activations at the cuts, one forward a question.

Each planned batch writes `batches/NNNNNN.CUT.safetensors` (states after the attention of layer CUT, flat tokens x width) and
then, as the mark that it is done, `batches/NNNNNN.parquet` (one row a question). `rows.parquet` gathers the rows at the end.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from roma_ray.engine.batches import PlannedBatches, plan_batches, read_plan, write_plan
from roma_ray.engine.cache import ROWS
from roma_ray.engine.extractor import PLAN, ExtractWork, batch_table, cache_dtype
from roma_ray.engine.generation import ENDINGS
from roma_ray.engine.identity import answer_rule, writing_settings
from roma_ray.engine.kept_selfchecks import worst_of
from roma_ray.engine.progress import Progress
from roma_ray.engine.question_table import TABLE, iterate_table, read_table, table_facts
from roma_ray.engine.runners import Runners
from roma_ray.engine.setup import Setup
from roma_ray.engine.steps import Facts, Step
from roma_ray.engine.stored_prompts import PROMPT_COLUMNS, Measured
from roma_ray.engine.streaming import STREAM, make_chain, stream
from roma_ray.engine.work import Executor, Job
from roma_ray.errors import ArtifactError, ModelError, StorageError
from roma_ray.stages.failed_questions import failed_rows, refuse, too_many
from roma_ray.stages.preparation import QUESTIONS
from roma_ray.store.artifacts import MANIFEST, Stage, Store, read_manifest
from roma_ray.store.files import exists, free_bytes, listed, present, remove_folder
from roma_ray.store.row_order import in_row_order, not_each_once
from roma_ray.store.tables import read_tables, write_parts

VERSION = 2


def extract_settings(setup: Setup) -> dict[str, Any]:
    """What decides the extraction of some questions: the model, and what is kept."""
    extraction = setup.config.extraction
    return {
        **setup.numeric_identity(),
        "cuts": list(setup.cuts) if extraction.cache else [],
        "tokens": list(setup.token_rules),
        "batch_tokens": extraction.batch_tokens,
        "activation_dtype": cache_dtype(setup) if extraction.cache else None,
        "rule": answer_rule(setup.config.questions.prompt),
        **writing_settings(setup.config),
    }


def known_extractions(store: Store) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
    """Cuts and token rules of every complete extraction in the storage, the oldest first, then of those that only finished
    trainings still tell of; damaged and outdated ones are left out.
    """
    found, told = [], set()
    for manifest in listed(store.root, f"extract/*/{MANIFEST}"):
        with contextlib.suppress(ArtifactError):
            content = read_manifest(manifest.parent)
            if content["stage"] == "extract" and content["identity"].get("version") == VERSION:
                settings, key = content["identity"]["settings"], (content["finished"], manifest.parent.name)
                found.append((key, tuple(settings["cuts"]), tuple(settings["tokens"])))
    for manifest in listed(store.root, f"finetune/*/{MANIFEST}"):
        with contextlib.suppress(ArtifactError):
            place = read_manifest(manifest.parent)["facts"].get("extraction")
            if place:
                told.add((tuple(place["cuts"]), tuple(place["tokens"])))
    return list(dict.fromkeys([*((cuts, rules) for _, cuts, rules in sorted(found)), *sorted(told)]))


def bring_back(stage: Stage) -> None:
    """Make an extraction unfinished whose activations were removed: who needs them makes them again, to the same bits."""
    if stage.reusable and stage.released:
        with stage.exclusive():
            stage.discard()


def check_failures(job: Job, runners: Runners) -> None:
    """Raise ModelError where more questions failed in a complete extraction than `extraction.max_failed` tolerates now."""
    facts = job.stage.manifest()["facts"]
    if too_many(job.setup, facts["errors"], facts["rows"]):
        raise refuse(job, runners.extract)


def extract(job: Job, runners: Runners, progress: Progress) -> Facts:
    """Run the batches that are not done yet, then gather their rows.

    Raises ModelError, also where more questions fail than `extraction.max_failed` tolerates, and StorageError.
    """
    setup, stage, execute = job.setup, job.stage, runners.extract
    asked = job.stages["questions"].path / TABLE
    measured = Measured(iterate_table(asked, PROMPT_COLUMNS))
    own_N, questions = measured.own_tokens(), len(measured.prompt_tokens)
    prefix, plan = _plan(stage, measured, setup.config.extraction.batch_tokens)
    done = [n for n, there in enumerate(present([batch_table(stage.path, n) for n in range(len(plan))])) if there]
    pending = sorted(set(range(len(plan))) - set(done))
    # Not by questions: the longest run first, and an estimate by them would be ten times too long.
    tokens = (prefix + plan.sums(own_N)).tolist()
    run, limit = _way(setup, runners, progress)
    if setup.config.extraction.cache or limit is not None:
        _check_room(setup, stage, sum(tokens[n] for n in pending), progress, streaming=limit is not None)
    if pending and (note := setup.model.storage_note()):
        progress.say(note)
    work = ExtractWork(setup, job.stages, stage)
    chain = make_chain(work, limit) if limit is not None else ()
    finished: float = sum(tokens[n] for n in done)
    finished += sum(tokens[n] * sum(link.share for link in chain if link.done(n)) for n in pending)
    failed = len(failed_rows(stage, done))
    with progress.meter("extract", sum(tokens), "tokens", finished) as meter:
        if too_many(setup, failed, questions):
            pending = []
        if limit is None:
            for report in run(work, pending):
                meter.advance(tokens[report.batch], seconds=report.seconds)
                failed += report.errors
                if too_many(setup, failed, questions):
                    break  # no question that is left can change that
        elif not too_many(setup, failed, questions):
            progress.say(f"extraction streams {len(chain)} slices of at most {limit:g} GB of weights")
            stream(chain, pending, execute, lambda batch, share: meter.advance(tokens[batch] * share))
            failed = len(failed_rows(stage, range(len(plan))))
    if too_many(setup, failed, questions):
        raise refuse(job, execute)
    # Also what a streamed attempt left that was gone on with unstreamed.
    remove_folder(stage.path / STREAM)
    facts = {**gather(stage, len(plan), asked, prefix), "self_check": worst_of(setup.model.checks)}
    if written := facts.get("written"):
        progress.say(
            f"answers written to training questions: {written['answers']:,}, {written['tokens']:,} tokens; {written['length']:,} were cut "
            "at extraction.success.max_new_tokens"
        )
    if facts["errors"]:
        progress.say(
            f"{facts['errors']} question(s) failed in extraction and are left out; see `error` in {stage.path / ROWS}"
        )
    return facts


def _plan(stage: Stage, measured: Measured, batch_tokens: int) -> tuple[int, PlannedBatches]:
    """Tokens of the shared prefix, and the planned batches, as saved by the first attempt or made now."""
    path = stage.path / PLAN
    if not exists(path):
        write_plan(path, plan_batches(measured.own_tokens(), batch_tokens), measured.prefix)
    return read_plan(path)


def _way(setup: Setup, runners: Runners, progress: Progress) -> tuple[Executor, float | None]:
    """Who runs the batches, and how many GB of weights a worker holds at most where slices are streamed."""
    limit = setup.config.extraction.memory_gb
    if setup.config.extraction.chain is None:
        return runners.extract, limit
    if runners.chain is not None:
        return runners.chain, None
    size = f"the whole model ({setup.model.weight_bytes() / 1e9:.2f} GB of weights)"
    streams = "streams slices, as extraction.memory_gb says"
    does = f"holds {size}; extraction.memory_gb streams one that does not fit" if limit is None else streams
    progress.say(
        f"note: extraction.chain needs the workers of a cluster; this process {does}. The results are the same"
    )
    return runners.extract, limit


def _check_room(setup: Setup, stage: Stage, tokens: int, progress: Progress, *, streaming: bool) -> None:
    """Tell the cache's size, of so many tokens, before it is written. Raises StorageError when the storage has no room for it."""
    import torch

    dtype = cache_dtype(setup)
    caching = setup.config.extraction.cache
    size = tokens * setup.hidden_size * getattr(torch, dtype).itemsize * len(setup.cuts) * caching
    # Two generations of states lie between a slice and the next.
    passing = 2 * tokens * setup.hidden_size * getattr(torch, setup.model.dtype).itemsize * streaming
    free = free_bytes(stage.path)
    at = ", ".join(map(str, setup.cuts))
    room = "in a bucket" if free is None else f"{free / 1e9:.0f} GB free"
    if caching:
        progress.say(
            f"activation cache: {tokens:,} tokens x {setup.hidden_size} x {dtype} at layer {at}: {size / 1e9:.2f} GB "
            f"({room})"
        )
    if streaming:
        progress.say(f"states between slices take {passing / 1e9:.2f} GB while the extraction streams")
    if free is not None and size + passing > 0.95 * free:
        raise StorageError(
            f"the activation cache and what streaming leaves meanwhile need {(size + passing) / 1e9:.1f} GB and "
            f"{stage.path} has {free / 1e9:.1f} GB left. Give another place with --storage, free some space, use "
            "extraction.activation_dtype=bfloat16, or extraction.cache=false: then every epoch runs the layers below the tuned "
            "ones again."
        )


def gather(stage: Stage, batches: int, questions: Path, prefix: int) -> dict[str, Any]:
    """Gather the batches' rows, in the order of the table of `questions`, into `rows.parquet`; returns counts.

    Raises ArtifactError when rows lack. Rows lie scattered over the batches, and are put in order in a file and not in memory.
    """
    ids = read_table(questions, ["id"]).column("id")
    heard = _Heard()
    tables = read_tables([batch_table(stage.path, number) for number in range(batches)])
    blocks = in_row_order(map(heard.table, tables), len(ids), stage.path)
    if not heard.facts:
        raise ModelError(
            f"every question failed in extraction, the first one with: {heard.reason}. All reasons are in the tables under "
            f"{stage.path / 'batches'}; remove {stage.path} to try again"
        )
    facts = {**heard.facts, "prefix": prefix}
    counts = _Counts(facts["layers"] * facts["experts"])

    def parts() -> Iterator[pa.Table]:
        for block in blocks:
            if not block.column("id").equals(ids.slice(counts.rows, len(block))):
                raise not_each_once(stage.path)
            counts.add(block)
            yield block.cast(ordered)

    ordered = heard.schema.with_metadata({"roma": json.dumps(facts)})
    write_parts(stage.path / ROWS, ordered, parts())
    return {**facts, **counts.facts(batches)}


class _Heard:
    """What the batches' tables say of themselves."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.schema: pa.Schema = None
        self.reason: str | None = None

    def table(self, table: pa.Table) -> pa.Table:
        """Take a table's facts; returns it without them. A batch in which every question failed has none."""
        self.facts = self.facts or table_facts(table)
        table = table.replace_schema_metadata(None)
        if self.schema is None:
            self.schema, self.reason = table.schema, table.column("error")[0].as_py()
        return table


class _Counts:
    """What is counted of the gathered rows."""

    def __init__(self, width: int) -> None:
        self.width, self.rows, self.failed = width, 0, 0
        self.sums: Counter[str] = Counter()
        self.ended: Counter[str] | None = None

    def add(self, table: pa.Table) -> None:
        """Count a block's rows. Raises ArtifactError where routing rows are not as wide as the facts say."""
        self.rows += len(table)
        self.failed += len(table) - table.column("error").null_count
        for name in table.column_names:
            if name.startswith("routing_"):
                values = pc.sum(pc.list_value_length(table.column(name))).as_py() or 0
                if values != self.width * (len(table) - table.column(name).null_count):
                    raise ArtifactError(
                        f"column {name} of the batches' tables holds rows that are not {self.width} values wide: remove the "
                        "extraction's folder and run again"
                    )
        for name in {"is_correct", "tokens", "new_tokens"} & set(table.column_names):
            total = pc.sum(table.column(name)).as_py()
            if total is not None:
                self.sums[name] += total
        if "ended" in table.column_names:
            self.ended = (self.ended or Counter()) + Counter(table.column("ended").drop_null().to_pylist())

    def facts(self, batches: int) -> dict[str, Any]:
        """The counts as plain data: of the answers that were written, where any were, their tokens and by what they ended."""
        found: dict[str, Any] = {"rows": self.rows, "errors": self.failed}
        # Of free answers nobody has said yet which are right.
        found |= {"correct": self.sums.get("is_correct"), "tokens": self.sums["tokens"], "batches": batches}
        if self.ended is None:
            return found
        written = {"answers": self.ended.total(), "tokens": self.sums["new_tokens"]}
        return {**found, "written": {**written, **{name: self.ended[name] for name in ENDINGS}}}


EXTRACT = Step("extract", VERSION, (QUESTIONS,), extract_settings, extract, accept=check_failures)
