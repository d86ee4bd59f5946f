"""Encoded questions on their way into the question table: a row group at a time, with what is counted of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from roma_ray.errors import QuestionError
from roma_ray.questions.asked import REJECTED, AskedQuestions, Faults
from roma_ray.questions.held_out import check_held_out
from roma_ray.questions.prompts import none_usable
from roma_ray.questions.splits import PARTS
from roma_ray.stages.encoding import question_schema
from roma_ray.store.tables import PART_ROWS, in_groups, write_parts


class QuestionWriter:
    """Writes the questions that have a prompt, and keeps those that have none with the rows that were set aside before."""

    def __init__(self, asked: AskedQuestions, *, free: bool) -> None:
        self.schema = question_schema(free)
        self.used_N = np.zeros(len(asked), dtype=bool)
        """Which of the questions that were asked are in the table."""
        self.faults = Faults()
        self.faults.add(asked.faults)
        self.rows = self.truncated = self._seen = 0
        self.splits: Counter[str] = Counter()
        self.task_splits: dict[tuple[str, str], None] = {}
        """The (task, split) of all questions."""
        self._reason = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.faults.__exit__()

    def write(self, path: Path, encoded: Iterable[pa.Table], held_out: Sequence[str]) -> None:
        """Write the table, or nothing where training could not do with it. `encoded`: all that were asked (`encoded_schema`).

        Raises QuestionError, ConfigError, StorageError.
        """
        groups = in_groups(map(self._numbered, encoded), PART_ROWS)
        write_parts(path, self.schema, self._checked(groups, held_out))

    def _checked(self, parts: Iterator[pa.Table], held_out: Sequence[str]) -> Iterator[pa.Table]:
        yield from parts
        if not self.rows:
            raise none_usable(self._seen, self._reason)
        # Training needs all three parts; a missing one is a fault of the sources.
        missing = [part for part in PARTS if not self.splits[part]]
        if missing:
            raise QuestionError(
                f"no usable {' and no '.join(missing)} questions among {self.rows}: give more rows, or change "
                "questions.validation_fraction or questions.test_fraction (or questions.splits, where that is set)"
            )
        check_held_out(held_out, list(self.task_splits))

    def _numbered(self, encoded: pa.Table) -> pa.Table:
        """Those that have a prompt, with their rows; all are counted."""
        usable = encoded.column("reason").is_null()
        self.used_N[self._seen : self._seen + len(encoded)] = usable.to_numpy()
        self._seen += len(encoded)
        unusable = encoded.filter(pc.invert(usable))
        if len(unusable):
            self._reason = self._reason or unusable.column("reason")[0].as_py()
            self.faults.add(unusable.select(REJECTED.names))
        good, first = encoded.filter(usable), self.rows
        self.rows += len(good)
        self.truncated += pc.sum(good.column("truncated")).as_py() or 0
        for group in good.group_by(["task", "split"], use_threads=False).aggregate([([], "count_all")]).to_pylist():
            self.splits[group["split"]] += group["count_all"]
            self.task_splits[group["task"], group["split"]] = None
        rows = pa.array(np.arange(first, self.rows), pa.int64())
        return good.select(self.schema.names[1:]).add_column(0, "row", rows).cast(self.schema)
