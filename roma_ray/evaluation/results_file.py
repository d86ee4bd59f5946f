"""`results.parquet` of the paired evaluation: base's and tuned routers' answers to the test questions, and what judges them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from roma_ray.engine.question_table import read_table, table_facts, write_table
from roma_ray.engine.scoring import Scores
from roma_ray.errors import ArtifactError
from roma_ray.evaluation.free_results import FREE_RULE, FreeJudged, read_free
from roma_ray.evaluation.measures import RULES, Asked, measure
from roma_ray.questions.prompts import Prompt
from roma_ray.store.artifacts import read_manifest

RESULTS = "results.parquet"
_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("answer", pa.int32()),
        ("choice_tokens", pa.list_(pa.int32())),
        ("choice_chars", pa.list_(pa.int32())),
        ("base_prediction", pa.int32()),
        ("tuned_prediction", pa.int32()),
        ("base_correct", pa.bool_()),
        ("tuned_correct", pa.bool_()),
        ("base_scores", pa.list_(pa.float32())),
        ("tuned_scores", pa.list_(pa.float32())),
        ("base_routing", pa.list_(pa.float32())),
        ("tuned_routing", pa.list_(pa.float32())),
    ]
)
_JUDGED = ("row", "id", "task", "answer", "choice_tokens", "choice_chars", "base_scores", "tuned_scores")


@dataclass(frozen=True)
class Judged:
    """Some questions' answers by both models, in the order of the table."""

    rows: Sequence[int]
    """In the question table."""
    ids: tuple[str, ...]
    asked: Asked
    scores: Mapping[str, Sequence[Sequence[float]]]
    """By model (`base`, `tuned`): the log-likelihood of each choice."""

    @property
    def tasks(self) -> Sequence[str]:
        """Of each question."""
        return self.asked.tasks

    @property
    def configured(self) -> str:
        """The measure by which answers are chosen."""
        return RULES[self.asked.rule]

    def values(self, which: str) -> dict[str, np.ndarray]:
        """Every measure's values of a model, [N] fp64."""
        return measure(self.scores[which], self.asked)


def write_results(
    path: Path, prompts: Sequence[Prompt], base: Scores, tuned: Scores, columns: list[int], rule: str, *, letter: bool
) -> None:
    """Write both models' answers; `columns` are the tuned layers among the head's routers. Raises StorageError."""
    kept = [prompts[row] for row in base.rows]
    asked = Asked.of(kept, rule, letter=letter)
    table = {
        "row": base.rows,
        "id": [p.id for p in kept],
        "task": asked.tasks,
        "split": [p.split for p in kept],
        "answer": asked.answers,
        "choice_tokens": asked.tokens,
        "choice_chars": asked.chars,
        "base_prediction": base.predictions,
        "tuned_prediction": tuned.predictions,
        "base_correct": base.correct.tolist(),
        "tuned_correct": tuned.correct.tolist(),
        "base_scores": base.scores,
        "tuned_scores": tuned.scores,
        "base_routing": list(base.routing_NLE[:, columns].reshape(len(kept), -1)),
        "tuned_routing": list(tuned.routing_NLE[:, columns].reshape(len(kept), -1)),
    }
    facts = {"layers": len(columns), "experts": base.routing_NLE.shape[2], "rule": rule}
    write_table(path, table, _SCHEMA, facts)


def read_judged(folder: str | Path) -> Judged:
    """The answers to the test questions in an evaluation's folder. Raises ArtifactError."""
    table = read_table(Path(folder) / RESULTS, _JUDGED)
    rule = table_facts(table).get("rule")
    if rule not in RULES:
        raise ArtifactError(f"{Path(folder) / RESULTS} does not say how its answers were chosen; evaluate again")
    found = table.to_pydict()
    asked = Asked(found["task"], found["answer"], found["choice_tokens"], found["choice_chars"], rule)
    scores = {which: found[f"{which}_scores"] for which in ("base", "tuned")}
    return Judged(found["row"], tuple(found["id"]), asked, scores)


def read_verdicts(
    folder: str | Path, which: str
) -> tuple[list[tuple[str, str]], list[str], list[float], dict[str, str]]:
    """A model's values of the test questions by every measure: ((task, metric), question id, value) by row, and each task's pin."""
    pin = str(read_manifest(folder)["facts"]["pin"])
    found = read_answers_of(folder)
    keys: list[tuple[str, str]] = []
    ids: list[str] = []
    measured: list[float] = []
    for metric, values in found.values(which).items():
        keys += [(task, metric) for task in found.tasks]
        ids += found.ids
        measured += values.tolist()
    return keys, ids, measured, dict.fromkeys(found.tasks, pin)


def read_answers_of(folder: str | Path) -> Judged | FreeJudged:
    """The answers to the test questions in an evaluation's folder, whether they have choices. Raises ArtifactError."""
    rule = table_facts(read_table(Path(folder) / RESULTS, ["row"])).get("rule")
    return read_free(Path(folder) / RESULTS) if rule == FREE_RULE else read_judged(folder)
