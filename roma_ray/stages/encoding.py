"""Questions become prompts: a few here, many as planned batches on whatever workers there are.

The driver reads the sources and decides each question's part, which takes all ids; what a tokenizer makes of a question takes the
question alone. So of many questions each batch lies in a file until some worker has encoded it, and the driver gathers the tables
in the questions' order. Who did which batch changes nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from roma_ray.engine.identity import is_free
from roma_ray.engine.progress import Progress
from roma_ray.engine.question_table import FREE_QUESTIONS, QUESTIONS
from roma_ray.engine.setup import Setup
from roma_ray.engine.tokenizer import load_tokenizer
from roma_ray.engine.work import Executor, Job, Report
from roma_ray.questions.asked import ASKED, AskedQuestions, questions_of
from roma_ray.questions.free_prompts import prompt_builder
from roma_ray.questions.prompts import PromptBuilder, encode
from roma_ray.questions.records import Rejected
from roma_ray.store.files import exists, present
from roma_ray.store.tables import iterate_table, read_tables, write_parts
from roma_ray.store.uploads import trailing

ENCODING = ".encoding"
"""Where batches lie until the question table is written."""
ROWS = 16_384
"""Questions of a batch: some seconds of a core. No more are encoded where they were read, and leave no file."""
_AT_ONCE = 2048
"""Questions that are objects at a time: long prompts are then ten times as large as in a table."""
_OF_QUESTION = frozenset({"task", "split", "question", "choices", "context", "form", "verdict", "file", "line"})


def question_schema(free: bool) -> pa.Schema:
    """Of the question table."""
    return FREE_QUESTIONS if free else QUESTIONS


def encoded_schema(free: bool) -> pa.Schema:
    """Of encoded questions before they have a row: those that have no prompt too, with the reason."""
    columns = [field for field in question_schema(free) if field.name != "row"]
    return pa.schema([*columns, ("file", pa.string()), ("line", pa.int64()), ("reason", pa.string())])


def builder_of(setup: Setup) -> PromptBuilder:
    """What makes the prompts. Raises ConfigError, ModelError."""
    return prompt_builder(load_tokenizer(setup.model.path, setup.model.revision), setup.config.questions.prompt)


def encoded(
    job: Job, asked: AskedQuestions, parts: np.ndarray, execute: Executor, progress: Progress
) -> Iterator[pa.Table]:
    """All questions, each in its part (`PARTS`), encoded, in order, as tables (`encoded_schema`); of many all batches are done first.

    Raises ConfigError, ModelError, StorageError, ArtifactError, and what `execute` raises.
    """
    builder, free = builder_of(job.setup), is_free(job.setup.config)
    if len(asked) <= ROWS:
        return (encoded_table(table, builder, free) for table in asked.tables(_AT_ONCE, parts))
    work = _planned(job, asked, parts)
    files = [work.encoded(batch) for batch in range(len(work.batches))]
    done = [batch for batch, there in enumerate(present(files)) if there]
    sizes = [min(ROWS, len(asked) - batch * ROWS) for batch in range(len(files))]
    with progress.meter("questions", len(asked), "questions", sum(sizes[batch] for batch in done)) as meter:
        for report in execute(work, sorted(set(range(len(files))) - set(done))):
            meter.advance(sizes[report.batch], seconds=report.seconds)
    return read_tables(files, encoded_schema(free).names)


def _planned(job: Job, asked: AskedQuestions, parts: np.ndarray) -> EncodeWork:
    """The batches, their questions written where they are not encoded yet."""
    names: list[str] = []
    with trailing() as put:
        for table in asked.tables(ROWS, parts):
            names.append(f"{len(names):06d}-{_digest(table)}")
            work = EncodeWork(job.setup, job.stages, job.stage, tuple(names[-1:]))
            if not exists(work.encoded(0)):
                put(partial(write_parts, work.asked(0), ASKED, [table]))
    return EncodeWork(job.setup, job.stages, job.stage, tuple(names))


def _digest(table: pa.Table) -> str:
    """Tells the questions of a batch from others: a hub's data set may be another one than when an earlier attempt read it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return hashlib.blake2b(sink.getvalue(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class EncodeWork(Job):
    """The encoding as planned batches."""

    batches: tuple[str, ...]
    """What each batch's files are called after: its number, and what is in it."""
    loads_model: ClassVar[bool] = False

    def asked(self, batch: int) -> Path:
        """A batch's questions."""
        return self.stage.path / ENCODING / f"{self.batches[batch]}.asked.parquet"

    def encoded(self, batch: int) -> Path:
        """What they became."""
        return self.stage.path / ENCODING / f"{self.batches[batch]}.parquet"

    def open(self) -> Callable[[int], Report]:
        """Load the tokenizer; returns the function that encodes one batch."""
        builder, free = builder_of(self.setup), is_free(self.setup.config)

        def do(batch: int) -> Report:
            started = time.monotonic()
            asked = iterate_table(self.asked(batch), ASKED.names, _AT_ONCE)
            tables = [encoded_table(table, builder, free) for table in asked]
            write_parts(self.encoded(batch), encoded_schema(free), tables)
            return Report(batch, sum(map(len, tables)), 0, 0, time.monotonic() - started)

        return do


def encoded_table(asked: pa.Table, builder: PromptBuilder, free: bool) -> pa.Table:
    """Questions (`ASKED`) with their prompts, or the reason why they have none (`encoded_schema`)."""
    results = list(encode(questions_of(asked), builder))

    def values(name: str) -> list[Any]:
        if name in _OF_QUESTION:
            return [getattr(question, name) for question, _ in results]
        if name == "id":
            return [result.id for _, result in results]
        if name == "reason":
            return [result.reason if isinstance(result, Rejected) else None for _, result in results]
        return [None if isinstance(result, Rejected) else getattr(result, name) for _, result in results]

    schema = encoded_schema(free)
    return pa.table([pa.array(values(field.name), field.type) for field in schema], schema=schema)
