"""Encoded questions on their way into the question table: a row group at a time, with what is counted of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from roma_ray.engine.question_table import FREE_QUESTIONS, QUESTIONS
from roma_ray.errors import QuestionError
from roma_ray.questions.asked import AskedQuestions, Faults
from roma_ray.questions.held_out import check_held_out
from roma_ray.questions.prompts import Prompt, none_usable
from roma_ray.questions.records import Question, Rejected
from roma_ray.questions.splits import PARTS
from roma_ray.store.tables import PART_ROWS, write_parts

_AT_ONCE = 2048

Encoded = tuple[Question, Prompt | Rejected]


class QuestionWriter:
    """Writes the questions that have a prompt, and keeps those that have none with the rows that were set aside before."""

    def __init__(self, asked: AskedQuestions, *, free: bool) -> None:
        self.schema = FREE_QUESTIONS if free else QUESTIONS
        self.used_N = np.zeros(len(asked), dtype=bool)
        """Which of the questions that were asked are in the table."""
        self.faults = Faults()
        self.faults.add(asked.faults)
        self.rows = self.truncated = self._unusable = 0
        self.splits: Counter[str] = Counter()
        self.task_splits: dict[tuple[str, str], None] = {}
        """The (task, split) of all questions."""
        self._reason = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.faults.__exit__()

    def write(self, path: Path, encoded: Iterable[Encoded], held_out: Sequence[str]) -> None:
        """Write the table, or nothing where training could not do with it. Raises QuestionError, ConfigError, StorageError."""
        write_parts(path, self.schema, self._checked(self._groups(iter(encoded)), held_out))

    def _checked(self, parts: Iterator[pa.Table], held_out: Sequence[str]) -> Iterator[pa.Table]:
        yield from parts
        if not self.rows:
            raise none_usable(self._unusable, self._reason)
        # Training needs all three parts; a missing one is a fault of the sources.
        missing = [part for part in PARTS if not self.splits[part]]
        if missing:
            raise QuestionError(
                f"no usable {' and no '.join(missing)} questions among {self.rows}: give more rows, or change "
                "questions.validation_fraction or questions.test_fraction (or questions.splits, where that is set)"
            )
        check_held_out(held_out, list(self.task_splits))

    def _groups(self, encoded: Iterator[Encoded]) -> Iterator[pa.Table]:
        """The rows as row groups of `PART_ROWS`, the last of what is left."""
        place, held, size = 0, [], 0
        while some := list(islice(encoded, _AT_ONCE)):
            self.faults.put([result for _, result in some if isinstance(result, Rejected)])
            for question, result in some:
                if isinstance(result, Prompt):
                    self.used_N[place] = True
                    self._count(question, result)
                elif not self._unusable:
                    self._reason = result.reason
                self._unusable += isinstance(result, Rejected)
                place += 1
            good = [(question, result) for question, result in some if isinstance(result, Prompt)]
            held.append(self._table(good, self.rows - len(good)))
            size += len(good)
            while size >= PART_ROWS:
                table = pa.concat_tables(held)
                yield table.slice(0, PART_ROWS).combine_chunks()
                held, size = [table.slice(PART_ROWS)], size - PART_ROWS
        if size:
            yield pa.concat_tables(held).combine_chunks()

    def _count(self, question: Question, prompt: Prompt) -> None:
        self.rows += 1
        self.truncated += prompt.truncated
        self.splits[prompt.split] += 1
        self.task_splits[question.task, prompt.split] = None

    def _table(self, rows: Sequence[tuple[Question, Prompt]], first: int) -> pa.Table:
        columns: dict[str, Any] = {"row": range(first, first + len(rows))}
        for name in self.schema.names[1:]:
            of_question = name in {"question", "choices", "context", "form", "verdict"}
            columns[name] = [getattr(question if of_question else prompt, name) for question, prompt in rows]
        return pa.table([pa.array(columns[field.name], field.type) for field in self.schema], schema=self.schema)
