"""All questions of the sources as they were read, in tables and not as objects: millions lie in scratch.

N questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from roma_ray.questions.labels import Labels
from roma_ray.questions.records import Question, Rejected
from roma_ray.questions.splits import PARTS, Declared
from roma_ray.store.tables import Holder, in_groups, rows_of

_AT_ONCE = 4096
REJECTED = pa.schema([("file", pa.string()), ("line", pa.int64()), ("id", pa.string()), ("reason", pa.string())])
_TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
_QUESTIONS = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("question", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("answer", pa.int32()),
        ("context", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("form", pa.string()),
        ("turns", pa.list_(_TURN)),
        ("verdict", pa.bool_()),
    ]
)
ASKED = pa.schema([*_QUESTIONS, ("split", pa.string())])
"""Of questions whose part is decided."""
# Where a question was read, and the part that it declares, do not make it another question, but they are kept.
assert set(ASKED.names) == {field.name for field in fields(Question)}


class AskedQuestions:
    """The questions of all sources in their order, and the rows that were set aside."""

    def __init__(self, sources: Iterable[tuple[str, Iterable[Question | Rejected]]]) -> None:
        """Read each source's name and its rows (`readers.iter_sources`). Raises what reading raises, and StorageError."""
        self.sources: list[str] = []
        self.forms: set[str] = set()
        self._tasks, self._counts = Labels(), []
        parts = [np.empty(0, dtype=np.int8)]
        with Holder(_QUESTIONS) as questions, Faults() as faults:
            for name, rows in sources:
                stream, count = iter(rows), 0
                while some := list(islice(stream, _AT_ONCE)):
                    faults.put([row for row in some if isinstance(row, Rejected)])
                    good = [row for row in some if isinstance(row, Question)]
                    questions.add(self._table(good))
                    parts.append(np.array([PARTS.index(question.split) for question in good], dtype=np.int8))
                    count += len(good)
                self.sources.append(name)
                self._counts.append(count)
            self._parts, self.faults = questions.parts(), faults.table()
        self.declared = Declared(self._tasks, np.concatenate(parts), self.ids)

    def _table(self, questions: Sequence[Question]) -> pa.Table:
        self._tasks.add(question.task for question in questions)
        self.forms |= {question.form for question in questions}
        columns: dict[str, Any] = {
            name: [getattr(question, name) for question in questions] for name in _QUESTIONS.names
        }
        columns["turns"] = [
            [{"role": role, "content": content} for role, content in question.turns] for question in questions
        ]
        return pa.table([pa.array(columns[field.name], field.type) for field in _QUESTIONS], schema=_QUESTIONS)

    def __len__(self) -> int:
        return sum(self._counts)

    def ids(self) -> Iterator[str]:
        """The ids, in order."""
        for part in self._parts():
            yield from part.column("id").to_pylist()

    def source_codes(self) -> np.ndarray:
        """The place of each question's source among the sources, [N]."""
        return np.repeat(np.arange(len(self.sources), dtype=np.int32), self._counts)

    def tables(self, rows: int, parts: np.ndarray | None = None) -> Iterator[pa.Table]:
        """The questions in order, so many a table (`ASKED`), in these parts (places in `PARTS`), or those that their rows declare."""
        known, start = self.declared.parts if parts is None else parts, 0
        for table in in_groups(self._parts(), rows):
            splits = np.array(PARTS, dtype=object)[known[start : start + len(table)]]
            start += len(table)
            yield table.append_column("split", pa.array(splits, pa.string()))

    def questions(self, parts: np.ndarray | None = None) -> Iterator[Question]:
        """The questions one by one, with the same parts."""
        for table in self.tables(_AT_ONCE, parts):
            yield from questions_of(table)


def questions_of(table: pa.Table) -> Iterator[Question]:
    """The questions of a table (`ASKED`)."""
    for row in rows_of(table):
        row["choices"] = tuple(row["choices"])
        row["turns"] = tuple((turn["role"], turn["content"]) for turn in row["turns"])
        yield Question(**row)


class Faults(Holder):
    """Rows that are set aside, as a table."""

    def __init__(self) -> None:
        super().__init__(REJECTED)

    def put(self, rows: Sequence[Rejected]) -> None:
        """Add some rows."""
        columns = {name: [getattr(row, name) for row in rows] for name in REJECTED.names}
        if rows:
            self.add(pa.table(columns, schema=REJECTED))
