"""The extraction pass: routing weights, choice scores, answers and activations at the cuts, one forward a question.

Each planned batch writes `batches/NNNNNN.CUT.safetensors` (states after the attention of layer CUT, flat tokens x width) and
then, as the mark that it is done, `batches/NNNNNN.parquet` (one row a question). `rows.parquet` gathers the rows at the end.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from roma_ray.engine.batches import plan_batches
from roma_ray.engine.cache import ROWS
from roma_ray.engine.extractor import PLAN, ExtractWork, batch_table, cache_dtype, read_plan
from roma_ray.engine.forward import own_tokens, shared_prefix
from roma_ray.engine.generation import ENDINGS
from roma_ray.engine.identity import answer_rule, writing_settings
from roma_ray.engine.kept_selfchecks import worst_of
from roma_ray.engine.progress import Progress
from roma_ray.engine.question_table import TABLE, matrix, read_prompts, table_facts
from roma_ray.engine.runners import Runners
from roma_ray.engine.setup import Setup
from roma_ray.engine.steps import Facts, Step
from roma_ray.engine.streaming import STREAM, make_chain, stream
from roma_ray.engine.work import Executor, Job
from roma_ray.errors import ArtifactError, ModelError, StorageError
from roma_ray.questions.prompts import Prompt
from roma_ray.stages.failed_questions import failed_rows, refuse, too_many
from roma_ray.stages.preparation import QUESTIONS
from roma_ray.store.artifacts import MANIFEST, Stage, Store, read_manifest, write_json
from roma_ray.store.files import exists, free_bytes, listed, present, remove_folder, roomy
from roma_ray.store.scratch import ScratchArray
from roma_ray.store.tables import read_tables, write_parts

VERSION = 2
# Rows of one row group: 64 MB of routing rows at 16 layers of 64 experts.
_ROWS_AT_ONCE = 16_384


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
    prompts = read_prompts(job.stages["questions"].path / TABLE)
    prefix, plan = _plan(stage, prompts, setup.config.extraction.batch_tokens)
    done = [n for n, there in enumerate(present([batch_table(stage.path, n) for n in range(len(plan))])) if there]
    pending = sorted(set(range(len(plan))) - set(done))
    # Not by questions: the longest run first, and an estimate by them would be ten times too long.
    tokens = [prefix + sum(own_tokens(prompts[row], prefix) for row in batch) for batch in plan]
    run, limit = _way(setup, runners, progress)
    if setup.config.extraction.cache or limit is not None:
        _check_room(setup, stage, sum(tokens[n] for n in pending), progress, streaming=limit is not None)
    if pending and (note := setup.model.storage_note()):
        progress.say(note)
    work = ExtractWork(setup, job.stages, stage)
    chain = make_chain(work, limit) if limit is not None else ()
    finished: float = sum(tokens[n] for n in done)
    finished += sum(tokens[n] * sum(link.share for link in chain if link.done(n)) for n in pending)
    ids = [p.id for p in prompts]
    # Planned with and weighed; a million of them would lie in the driver's memory for as long as the workers work.
    del prompts
    failed = len(failed_rows(stage, done))
    with progress.meter("extract", sum(tokens), "tokens", finished) as meter:
        if too_many(setup, failed, len(ids)):
            pending = []
        if limit is None:
            for report in run(work, pending):
                meter.advance(tokens[report.batch], seconds=report.seconds)
                failed += report.errors
                if too_many(setup, failed, len(ids)):
                    break  # no question that is left can change that
        elif not too_many(setup, failed, len(ids)):
            progress.say(f"extraction streams {len(chain)} slices of at most {limit:g} GB of weights")
            stream(chain, pending, execute, lambda batch, share: meter.advance(tokens[batch] * share))
            failed = len(failed_rows(stage, range(len(plan))))
    if too_many(setup, failed, len(ids)):
        raise refuse(job, execute)
    # Also what a streamed attempt left that was gone on with unstreamed.
    remove_folder(stage.path / STREAM)
    facts = {**gather(stage, len(plan), ids, prefix), "self_check": worst_of(setup.model.checks)}
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


def _plan(stage: Stage, prompts: Sequence[Prompt], batch_tokens: int) -> tuple[int, list[list[int]]]:
    """Tokens of the shared prefix, and the planned batches, as saved by the first attempt or made now."""
    path = stage.path / PLAN
    if not exists(path):
        prefix = shared_prefix(prompts)
        batches = plan_batches([own_tokens(p, prefix) for p in prompts], batch_tokens)
        write_json(path, {"prefix": prefix, "batches": batches})
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


def gather(stage: Stage, batches: int, ids: Sequence[str], prefix: int) -> dict[str, Any]:
    """Gather the batches' rows, in row order, into `rows.parquet`; returns counts. Raises ArtifactError when rows lack.

    Rows lie scattered over the batches. The routing rows, kilobytes each, are put in order in a file and not in memory.
    """
    facts: dict[str, Any] = {}
    small, routing, schema = [], {}, None
    try:
        for table in read_tables([batch_table(stage.path, number) for number in range(batches)]):
            schema = schema or table.schema.remove_metadata()
            facts = facts or table_facts(table)
            wide = [name for name in table.column_names if name.startswith("routing_")]
            for name in wide if facts else ():
                if name not in routing:
                    routing[name] = ScatteredRows(stage.path, len(ids), facts["layers"] * facts["experts"])
                routing[name].put(table, name)
            small.append(table.drop_columns(wide).replace_schema_metadata(None))
        assert schema is not None
        if not facts:
            reason = small[0].column("error")[0].as_py()
            raise ModelError(
                f"every question failed in extraction, the first one with: {reason}. All reasons are in the tables under "
                f"{stage.path / 'batches'}; remove {stage.path} to try again"
            )
        facts = {**facts, "prefix": prefix}
        table = pa.concat_tables(small).sort_by("row").combine_chunks()
        if table.column("id").to_pylist() != list(ids):
            raise ArtifactError(f"{stage.path} does not hold each question once; remove it and run again")
        ordered = schema.with_metadata({"roma": json.dumps(facts)})

        def parts() -> Iterator[pa.Table]:
            for start in range(0, len(table), _ROWS_AT_ONCE):
                part = table.slice(start, _ROWS_AT_ONCE)
                columns = {name: rows.column(start, part) for name, rows in routing.items()}
                columns |= {name: part.column(name) for name in part.column_names}
                yield pa.table([columns[name] for name in ordered.names], schema=ordered)

        write_parts(stage.path / ROWS, ordered, parts())
    finally:
        for rows in routing.values():
            rows.close()
    errors = len(table) - table.column("error").null_count
    correct = pc.sum(table.column("is_correct")).as_py()
    tokens = pc.sum(table.column("tokens")).as_py() or 0
    counts = {"rows": len(table), "errors": errors, "correct": correct, "tokens": tokens, "batches": batches}
    return {**facts, **counts, **_written(table)}


def _written(table: pa.Table) -> dict[str, Any]:
    """Counts of the answers that were written, where any were: their tokens, and by what they ended."""
    if "ended" not in table.column_names:
        return {}
    ended = Counter(table.column("ended").drop_null().to_pylist())
    written = {"answers": ended.total(), "tokens": pc.sum(table.column("new_tokens")).as_py() or 0}
    return {"written": {**written, **{name: ended[name] for name in ENDINGS}}}


class ScatteredRows:
    """Rows of equal width, put down in any order and read in theirs: a file in the stage's folder that goes when it is closed."""

    def __init__(self, folder: Path, rows: int, width: int) -> None:
        self.scratch = ScratchArray(roomy(folder), rows, width)
        self.values = self.scratch.values

    def put(self, table: pa.Table, name: str) -> None:
        """The rows of a batch's table; those of failed questions are null there and stay zero here."""
        present = table.filter(pc.is_valid(table.column(name)))
        rows = present.column("row").to_numpy()
        if ((rows < 0) | (rows >= len(self.values))).any():
            raise ArtifactError(
                "a batch's table names rows that do not exist; remove the extraction folder and run again"
            )
        self.values[rows] = matrix(present, name, self.values.shape[1])

    def column(self, start: int, part: pa.Table) -> pa.Array:
        """The rows from `start` on as a column of lists, null where the question failed."""
        failed = part.column("error").combine_chunks().is_valid().to_numpy(zero_copy_only=False)
        width = self.values.shape[1]
        offsets = np.arange(len(part) + 1, dtype=np.int32) * width
        flat = pa.array(self.values[start : start + len(part)].ravel())
        whole = pa.ListArray.from_arrays(pa.array(offsets), flat)
        return pc.if_else(pa.array(failed), pa.scalar(None, whole.type), whole)

    def close(self) -> None:
        """Remove the file."""
        self.scratch.close()


EXTRACT = Step("extract", VERSION, (QUESTIONS,), extract_settings, extract, accept=check_failures)
