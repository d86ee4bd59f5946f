"""The prompts of a question table as a sequence that decodes one when it is indexed, and columns over all of them.

A million prompts as Python objects take gigabytes; here they stay Arrow columns, which large tables map from a file
(`store.tables.hold`), beside arrays of a few bytes a question.

N questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from roma_ray.engine.decoded import Decoded
from roma_ray.errors import ArtifactError
from roma_ray.questions.held_out import UNUSED
from roma_ray.questions.labels import Labels
from roma_ray.questions.prompts import Prompt
from roma_ray.store.tables import hold

_TYPES = {
    "id": pa.string(),
    "prompt_ids": pa.list_(pa.int32()),
    "choice_ids": pa.list_(pa.list_(pa.int32())),
    "choice_chars": pa.list_(pa.int32()),
    "task": pa.string(),
    "split": pa.string(),
    "answer": pa.int32(),
    "truncated": pa.bool_(),
}
_DECODED = ("id", "prompt_ids", "choice_ids", "choice_chars")
PROMPT_COLUMNS = tuple(_TYPES)


def _checked(table: pa.Table) -> pa.Table:
    """A part whose columns are those of a question table. Raises ArtifactError."""
    if any(table.column(name).type != type_ or table.column(name).null_count for name, type_ in _TYPES.items()):
        raise ArtifactError("a table is none of questions; remove its folder and run again to recompute it")
    return table


class _Part:
    """One record batch of the decoded columns, as views of its buffers."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        columns = {name: batch.column(name) for name in _DECODED}
        nested = columns["choice_ids"].values
        self.ids = columns["id"]
        self.prompts, self.prompt_ids = _lists(columns["prompt_ids"])
        self.choices = columns["choice_ids"].offsets.to_numpy()
        self.continuations, self.choice_ids = _lists(nested)
        self.chars, self.choice_chars = _lists(columns["choice_chars"])

    def prompt_tokens(self) -> np.ndarray:
        return np.diff(self.prompts)

    def fed_tokens(self) -> np.ndarray:
        """Of each question's continuations, all tokens but each one's last."""
        return np.diff(self.continuations[self.choices]) - np.diff(self.choices)

    def gold_tokens(self, answers: np.ndarray) -> np.ndarray:
        gold = self.choices[:-1] + answers
        return self.continuations[gold + 1] - self.continuations[gold]

    def decoded(self, at: int) -> tuple[str, tuple[int, ...], tuple[tuple[int, ...], ...], tuple[int, ...]]:
        bounds = self.continuations[self.choices[at] : self.choices[at + 1] + 1].tolist()
        return (
            self.ids[at].as_py(),
            tuple(self.prompt_ids[self.prompts[at] : self.prompts[at + 1]].tolist()),
            tuple(tuple(self.choice_ids[a:b].tolist()) for a, b in pairwise(bounds)),
            tuple(self.choice_chars[self.chars[at] : self.chars[at + 1]].tolist()),
        )


class Prompts(Decoded[Prompt]):
    """The prompts of a question table, by row."""

    def __init__(self, parts: Iterable[pa.Table], held_out: Sequence[str] = ()) -> None:
        """Tables with `PROMPT_COLUMNS`, one after another; parts as with tasks `held_out`. Raises ArtifactError, StorageError."""
        self.tasks, self.splits = Labels(), Labels()
        self._small: dict[str, list[np.ndarray]] = {"answer": [], "truncated": []}
        table = hold(map(self._taken, parts))
        self._parts = [_Part(batch) for batch in table.to_batches() if batch.num_rows]
        self._starts = np.cumsum([0, *(len(part.ids) for part in self._parts)])
        self.answers, self.truncated = map(np.concatenate, self._small.values())
        """[N] int32, [N] bool"""
        self.ids: pa.ChunkedArray = table.column("id")
        if held_out:
            self.splits.put(self.tasks.mask(held_out) & ~self.splits.mask(["test"]), UNUSED)

    def _taken(self, part: pa.Table) -> pa.Table:
        """Take the small columns of a part as arrays; returns the others."""
        _checked(part)
        self.tasks.extend(part.column("task"))
        self.splits.extend(part.column("split"))
        for name, arrays in self._small.items():
            arrays.append(part.column(name).to_numpy())
        return part.select(list(_DECODED))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def item(self, at: int) -> Prompt:
        """The prompt of a row."""
        part = int(np.searchsorted(self._starts, at, side="right")) - 1
        id, prompt_ids, choice_ids, chars = self._parts[part].decoded(at - self._starts[part])
        answer, truncated = int(self.answers[at]), bool(self.truncated[at])
        return Prompt(id, self.tasks[at], self.splits[at], prompt_ids, choice_ids, chars, answer, truncated)

    def rows_of(self, split: str, mask_N: Any = True) -> list[int]:
        """The rows of one split, ascending; `mask_N`: of these alone."""
        rows: list[int] = np.flatnonzero(self.splits.mask([split]) & np.asarray(mask_N)).tolist()
        return rows

    @cached_property
    def prompt_tokens(self) -> np.ndarray:
        """Tokens of each prompt, [N]."""
        return _joined(part.prompt_tokens() for part in self._parts)

    @cached_property
    def fed_tokens(self) -> np.ndarray:
        """Tokens that each question's continuations add to a packing, [N]."""
        return _joined(part.fed_tokens() for part in self._parts)

    @cached_property
    def gold_tokens(self) -> np.ndarray:
        """Tokens of each question's right continuation, [N]."""
        bounds = zip(self._parts, pairwise(self._starts), strict=True)
        return _joined(part.gold_tokens(self.answers[start:stop]) for part, (start, stop) in bounds)


class Measured:
    """What a plan needs to know of a question table, and no token of it: counts [N], and the prefix that all prompts share."""

    def __init__(self, parts: Iterable[pa.Table]) -> None:
        """Tables with `PROMPT_COLUMNS`, one after another; none is kept."""
        prompts, fed, shared = [], [], None
        for table in parts:
            for batch in _checked(table).to_batches():
                if batch.num_rows:
                    part = _Part(batch)
                    prompts.append(part.prompt_tokens())
                    fed.append(part.fed_tokens())
                    shared = _shared(part, shared)
        self.prompt_tokens, self.fed_tokens = _joined(prompts), _joined(fed)
        # A prompt keeps a token of its own.
        self.prefix = 0 if shared is None else min(len(shared), int(self.prompt_tokens.min()) - 1)

    def own_tokens(self) -> np.ndarray:
        """What each question adds to a packing after the shared prefix (`forward.own_tokens`), [N]."""
        return self.prompt_tokens - self.prefix + self.fed_tokens


def _shared(part: _Part, known: np.ndarray | None) -> np.ndarray:
    """The tokens with which all prompts of a part begin, and those that `known` is of."""
    shared = part.prompt_ids[part.prompts[0] : part.prompts[1]] if known is None else known
    shared = shared[: part.prompt_tokens().min()]
    for place, token in enumerate(shared):
        if (part.prompt_ids[part.prompts[:-1] + place] != token).any():
            return shared[:place].copy()
    return shared.copy()


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.int32), *parts])


def _lists(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and values of a column of lists."""
    return column.offsets.to_numpy(), column.values.to_numpy()
