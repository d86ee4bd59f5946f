"""How many questions each source gives to training, validation and test, and what of that its owner may not have meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from roma_ray.questions.asked import AskedQuestions
from roma_ray.questions.splits import PARTS


@dataclass(frozen=True)
class SourceCount:
    """A source's usable questions by part; `declared` counts those whose rows, or whose source, say validation or test."""

    source: str
    train: int
    validation: int
    test: int
    declared: int
    tasks: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """As plain data, for a manifest."""
        return {**asdict(self), "tasks": list(self.tasks)}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> SourceCount:
        """From a manifest's facts."""
        return cls(**{**facts, "tasks": tuple(facts["tasks"])})


def count_sources(asked: AskedQuestions, parts: np.ndarray, used: np.ndarray | None = None) -> tuple[SourceCount, ...]:
    """Counts of each source; `parts` [N] are the questions' parts (places in `PARTS`), `used` [N] a mask of those that count."""
    codes, tasks, declared = asked.source_codes(), asked.declared.tasks, asked.declared.parts
    found = []
    for code, source in enumerate(asked.sources):
        rows = np.flatnonzero((codes == code) & (True if used is None else used))
        train, validation, test = np.bincount(parts[rows], minlength=len(PARTS)).tolist()
        named = sorted(tasks.names[task] for task in np.unique(tasks.codes[rows]).tolist())
        declaring = int((declared[rows] != PARTS.index("train")).sum())
        found.append(SourceCount(source, train, validation, test, declaring, tuple(named)))
    return tuple(found)


def describe_sources(counts: Sequence[SourceCount]) -> list[str]:
    """One line a source, and a note where one gives nothing to train on though its owner may think it does."""
    lines = [
        f"questions of {c.source}: {c.train:,} train, {c.validation:,} validation, {c.test:,} test" for c in counts
    ]
    trained = {task for c in counts if c.train for task in c.tasks}
    for c in counts:
        if c.train or not c.declared:
            continue
        if c.validation:
            lines.append(
                f"note: nothing of {c.source} is trained on: its rows (or `split` of the source) declare them as validation"
                f"{' or test' if c.test else ''}. Where they are to be trained on, set `split: train` on the source."
            )
        elif missing := [task for task in c.tasks if task not in trained]:
            lines.append(
                f"note: {c.source} is declared as test, and no source gives training questions of {_some(missing)}"
            )
    return lines


def _some(tasks: Sequence[str], most: int = 5) -> str:
    return ", ".join(tasks[:most]) + (f" and {len(tasks) - most} more tasks" if len(tasks) > most else "")
