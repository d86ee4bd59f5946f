"""lm-eval's requests as planned batches, so that one process or a cluster's actors answer them, kill and resume included.

A folder holds `requests.parquet` (what is asked, as token ids or texts), `plan.json` (the batches) and, a batch,
`batches/NNNNNN.parquet` (the answers of the base and, with an adapter, of the tuned model). Base and tuned answers come
from one pass through the trunk: the head runs twice.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from roma_ray.benchmarks.judged_model import Subject
from roma_ray.benchmarks.request_tree import Path as TokenPath
from roma_ray.benchmarks.request_tree import plan_paths, tree_tokens
from roma_ray.engine.model_spec import ModelSpec
from roma_ray.engine.progress import Progress
from roma_ray.engine.question_table import read_table, table_facts, write_table
from roma_ray.engine.steps import Facts, make
from roma_ray.engine.work import Executor, Report
from roma_ray.errors import ArtifactError, CacheError, ModelError
from roma_ray.store.artifacts import Stage, Store, write_json
from roma_ray.store.files import exists, present, read_json
from roma_ray.store.tables import read_tables
from roma_ray.store.tensors import DAMAGED, read_tensors, write_tensors

if TYPE_CHECKING:
    from roma_ray.benchmarks.scorers import Kept

VERSION = 1
REQUESTS, PLAN, ANSWERS = "requests.parquet", "plan.json", "answers.parquet"
LIKELIHOOD = pa.schema([("context", pa.list_(pa.int32())), ("continuation", pa.list_(pa.int32()))])
GENERATION = pa.schema([("context", pa.string()), ("arguments", pa.string()), ("repeat", pa.int32())])
SCORED = pa.schema(
    [
        ("request", pa.int64()),
        ("base", pa.float64()),
        ("base_greedy", pa.bool_()),
        ("tuned", pa.float64()),
        ("tuned_greedy", pa.bool_()),
    ]
)
_WRITTEN = pa.schema([("request", pa.int64()), ("base", pa.string()), ("tuned", pa.string())])


@dataclass(frozen=True)
class Scorable:
    """A loglikelihood request in tokens, already cut to the model's longest input."""

    context: TokenPath
    continuation: TokenPath

    @property
    def path(self) -> TokenPath:
        """The tokens that the model reads: all but the last."""
        return (self.context + self.continuation)[:-1]


@dataclass(frozen=True)
class Writable:
    """A generation request; `arguments` is lm-eval's generation arguments as JSON, `repeat` tells equal requests apart."""

    context: str
    arguments: str
    repeat: int = 0


@dataclass(frozen=True)
class RequestAnswers:
    """What the models answered, by request."""

    base: list[Any]
    tuned: list[Any] | None
    stage: Stage
    facts: dict[str, Any] = field(default_factory=dict)


def answer(
    kind: str,
    requests: Sequence[Scorable] | Sequence[Writable],
    subject: Subject,
    store: Store,
    execute: Executor,
    progress: Progress,
) -> RequestAnswers:
    """Answers to the requests, in order: those on the storage, and by `execute` those that are missing.

    kind: `loglikelihood` (answers are (log-likelihood in nats, whether greedy)) or `generate_until` (texts). Equal requests are
    answered once. Raises what loading and running the model raises (ModelError, CheckpointError, WorkerError), StorageError.
    """
    unique = list(dict.fromkeys(requests))
    table = _table(kind, unique)
    settings = {**subject.identity(), "kind": kind, "requests": _digest(table), "plan": subject.plan_settings(kind)}
    stage = store.stage("requests", settings, {}, VERSION)
    if stage.reusable and (other := stage.other_versions()) is not None:
        progress.say(f"note: {other}")

    def run() -> Facts:
        _run(kind, unique, table, subject, store, stage, execute, progress)
        return _gather(kind, stage, len(unique))

    make(stage, run, verify=True)
    place = {request: n for n, request in enumerate(unique)}
    base, tuned = _read(kind, stage)
    rows = [place[request] for request in requests]
    return RequestAnswers(
        [base[n] for n in rows],
        None if subject.adapter is None else [tuned[n] for n in rows],
        stage,
        stage.manifest()["facts"],
    )


def _table(kind: str, requests: Sequence[Any]) -> pa.Table:
    schema = LIKELIHOOD if kind == "loglikelihood" else GENERATION
    return pa.table(
        [pa.array([getattr(r, name) for r in requests], schema.field(name).type) for name in schema.names],
        schema=schema,
    )


def _digest(table: pa.Table) -> str:
    """What tells these requests from others: their content, in order."""
    digest = hashlib.sha256()
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if pa.types.is_list(column.type):
            digest.update(pc.list_value_length(column).to_numpy(zero_copy_only=False).tobytes())
            digest.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
        else:
            digest.update(json.dumps(column.to_pylist()).encode())
    return digest.hexdigest()


def _run(
    kind: str,
    requests: Sequence[Any],
    table: pa.Table,
    subject: Subject,
    store: Store,
    stage: Stage,
    execute: Executor,
    progress: Progress,
) -> None:
    plan_file = stage.path / PLAN
    if not exists(plan_file):
        write_table(stage.path / REQUESTS, table.to_pydict(), table.schema)
        write_json(plan_file, _plan(kind, requests, subject))
    plan: list[list[int]] = read_json(plan_file)
    done = present([batch_file(stage.path, n) for n in range(len(plan))])
    pending = [n for n, there in enumerate(done) if not there]
    if pending and (note := subject.model.storage_note()):
        progress.say(note)
    states = None
    if kind == "loglikelihood" and subject.keep_states and subject.cut:
        # The tuned gates alone are left out of the identity: every adapter with this first tuned layer shares the states.
        settings = {**stage.identity["settings"], "adapter": None, "cut": subject.cut}
        shared = store.stage("states", settings, {}, VERSION)
        shared.check_makers()
        if (other := shared.other_versions()) is not None:
            progress.say(f"note: {other}")
        stage.note_makers(of=shared)
        shared.note_makers()
        states = str(shared.path)
    work = RequestWork(str(stage.path), kind, subject, states)
    # Requests differ in length by far, and what they share is computed once; of a generation the length is not known before.
    unit = "tokens" if kind == "loglikelihood" else "generations"
    sizes = [tree_tokens([requests[n].path for n in b]) if unit == "tokens" else len(b) for b in plan]
    with progress.meter("evaluate", sum(sizes), unit, sum(sizes) - sum(sizes[n] for n in pending)) as meter:
        for report in execute(work, pending):
            meter.advance(sizes[report.batch], seconds=report.seconds)


def _plan(kind: str, requests: Sequence[Any], subject: Subject) -> list[list[int]]:
    if kind == "loglikelihood":
        return plan_paths([r.path for r in requests], subject.batch_tokens)
    # Like stock: one set of arguments a batch, the longest prompts first.
    order = sorted(range(len(requests)), key=lambda n: (requests[n].arguments, -len(requests[n].context), n))
    batches: list[list[int]] = []
    for number in order:
        last = batches[-1] if batches else []
        if last and len(last) < subject.generation_batch and requests[last[0]].arguments == requests[number].arguments:
            last.append(number)
        else:
            batches.append([number])
    return batches


def batch_file(folder: str | Path, batch: int) -> Path:
    """The answers of a batch; its presence marks the batch as done."""
    return Path(folder) / "batches" / f"{batch:06d}.parquet"


@dataclass(frozen=True)
class RequestWork:
    """What a worker needs to answer planned batches of requests."""

    folder: str
    kind: str
    subject: Subject
    states: str | None = None
    """Folder of the trunk's states, where they are kept for later adapters."""
    name: str = "evaluate"

    @property
    def model(self) -> ModelSpec:
        """The model that a worker loads."""
        return self.subject.model

    def open(self) -> Callable[[int], Report]:
        """Load the model; returns the function that answers one planned batch, which raises ModelError."""
        import torch

        do: Callable[[int], Report] = _Scorer(self) if self.kind == "loglikelihood" else _Writer(self)
        setting = "batch_tokens" if self.kind == "loglikelihood" else "generation_batch"

        def answer_batch(batch: int) -> Report:
            try:
                return do(batch)
            except torch.OutOfMemoryError as error:
                raise ModelError(f"memory ran out on a batch of requests; lower evaluation.{setting}") from error

        return answer_batch


class _Scorer:
    """A loaded model that scores planned batches."""

    def __init__(self, work: RequestWork) -> None:
        from roma_ray.benchmarks.scorers import load_scorer

        self.work = work
        self.plan: list[list[int]] = read_json(Path(work.folder) / PLAN)
        table = read_table(Path(work.folder) / REQUESTS)
        contexts, continuations = (table.column(name).to_pylist() for name in LIKELIHOOD.names)
        self.requests = [Scorable(tuple(a), tuple(b)) for a, b in zip(contexts, continuations, strict=True)]
        self.model = load_scorer(work.subject)

    def __call__(self, batch: int) -> Report:
        """Score one batch and write its file."""
        started = time.monotonic()
        rows = self.plan[batch]
        chosen = [self.requests[row] for row in rows]
        kept = read_kept(self.work.states, batch, len(rows))
        # The first batch alone is counted: the counter slows a pass down several times.
        scored = self.model.score(
            [r.path for r in chosen], [r.continuation for r in chosen], count=batch == 0, kept=kept
        )
        if self.work.states is not None and scored.kept is not None:
            write_kept(self.work.states, batch, scored.kept)
        columns: dict[str, Any] = {"request": rows}
        for name in ("base", "tuned"):
            found = scored.answers.get(name)
            columns[name] = [None] * len(rows) if found is None else [value for value, _ in found]
            columns[f"{name}_greedy"] = [None] * len(rows) if found is None else [greedy for _, greedy in found]
        facts = {
            "seconds": scored.seconds,
            "tokens": scored.tokens,
            "flops": scored.flops,
            "reused": kept is not None,
        }
        write_table(batch_file(self.work.folder, batch), columns, SCORED, facts)
        return Report(batch, len(rows), scored.tokens, 0, time.monotonic() - started)


def _kept_file(folder: str, batch: int) -> Path:
    return Path(folder) / f"{batch:06d}.safetensors"


def write_kept(folder: str, batch: int, kept: Kept) -> None:
    """Keep a batch's states and base answers, atomically. Raises StorageError."""
    import torch

    tensors = {
        "states": kept.states_TD.cpu().contiguous(),
        "base": torch.tensor([value for value, _ in kept.base], dtype=torch.float64),
        "greedy": torch.tensor([greedy for _, greedy in kept.base]),
    }
    write_tensors(_kept_file(folder, batch), tensors)


def read_kept(folder: str | None, batch: int, count: int) -> Kept | None:
    """What an earlier evaluation kept of a batch of `count` requests; None where there is nothing. Raises CacheError."""
    from roma_ray.benchmarks.scorers import Kept

    if folder is None or not exists(_kept_file(folder, batch)):
        return None
    path = _kept_file(folder, batch)
    try:
        tensors = read_tensors(path)[0]
        base = list(zip(tensors["base"].tolist(), tensors["greedy"].tolist(), strict=True))
        kept = Kept(tensors["states"], base)
    except (*DAMAGED, KeyError, ValueError) as error:
        raise CacheError(f"{path} cannot be read ({error}); remove {folder} to compute it again") from None
    if len(base) != count:
        raise CacheError(f"{path} holds {len(base)} answers instead of {count}; remove {folder} to compute it again")
    return kept


class _Writer:
    """A loaded model that continues the prompts of planned batches."""

    def __init__(self, work: RequestWork) -> None:
        from roma_ray.benchmarks.scorers import load_writer

        self.work = work
        self.plan: list[list[int]] = read_json(Path(work.folder) / PLAN)
        self.rows = read_table(Path(work.folder) / REQUESTS).to_pylist()
        self.model = load_writer(work.subject)

    def __call__(self, batch: int) -> Report:
        """Continue one batch's prompts and write its file."""
        started = time.monotonic()
        rows = self.plan[batch]
        prompts = [self.rows[row]["context"] for row in rows]
        written = self.model.write(prompts, json.loads(self.rows[rows[0]]["arguments"]), seed=batch)
        none = [None] * len(rows)
        columns = {"request": rows, "base": written.answers["base"], "tuned": written.answers.get("tuned", none)}
        facts = {"seconds": written.seconds, "tokens": written.tokens, "flops": {}}
        write_table(batch_file(self.work.folder, batch), columns, _WRITTEN, facts)
        return Report(batch, len(rows), written.tokens, 0, time.monotonic() - started)


def _gather(kind: str, stage: Stage, count: int) -> dict[str, Any]:
    """Gather the batches' answers, in request order, into one table; returns counts and times. Raises ArtifactError."""
    plan: list[list[int]] = read_json(stage.path / PLAN)
    tables = list(read_tables([batch_file(stage.path, n) for n in range(len(plan))]))
    whole = pa.concat_tables([t.replace_schema_metadata(None) for t in tables]).sort_by("request")
    if whole.column("request").to_pylist() != list(range(count)):
        raise ArtifactError(f"{stage.path} does not hold each request once; remove it and run again")
    schema = SCORED if kind == "loglikelihood" else _WRITTEN
    write_table(stage.path / ANSWERS, whole.to_pydict(), schema)
    facts = [table_facts(t) for t in tables]
    seconds = {part: sum(f["seconds"].get(part, 0.0) for f in facts) for part in ("trunk", "base", "tuned")}
    counted: dict[str, Any] = next((f["flops"] | {"tokens": f["tokens"]} for f in facts if f["flops"]), {})
    return {
        "requests": count,
        "batches": len(plan),
        "tokens": sum(f["tokens"] for f in facts),
        "model_seconds": seconds,
        "counted_flops": counted,
        "reused_batches": sum(bool(f.get("reused")) for f in facts),
    }


def _read(kind: str, stage: Stage) -> tuple[list[Any], list[Any]]:
    table = read_table(stage.path / ANSWERS)
    values = {name: table.column(name).to_pylist() for name in table.column_names}
    if kind != "loglikelihood":
        return values["base"], values["tuned"]
    return (
        list(zip(values["base"], values["base_greedy"], strict=True)),
        list(zip(values["tuned"], values["tuned_greedy"], strict=True)),
    )
