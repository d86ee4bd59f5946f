"""Base's and tuned routers' answers to free-form test questions as a table, and every measure of them, question by question.

greedy       whether each token of the answer is the likeliest, so that greedy decoding writes it (lm-eval's `acc` of a likelihood)
likelihood   whether the answer's log-likelihood a token is at least the threshold (`extraction.success`), where that is success
gold_logp    the answer's log-likelihood, in nats a token
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from roma_ray.config.free_form import SuccessConfig
from roma_ray.engine.question_table import read_table, table_facts, write_table
from roma_ray.engine.scoring import Scores
from roma_ray.questions.prompts import Prompt

FREE_RULE = "greedy"
"""The rule in a table of such answers (`engine/identity.py`)."""
_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("tokens", pa.int32()),
        ("base_prediction", pa.int32()),
        ("tuned_prediction", pa.int32()),
        ("base_logp", pa.float64()),
        ("tuned_logp", pa.float64()),
        ("base_routing", pa.list_(pa.float32())),
        ("tuned_routing", pa.list_(pa.float32())),
    ]
)


def configured_measure(success: SuccessConfig) -> str:
    """The measure that a run's answers are judged by. What a judge said of the base model's answers he did not say of others."""
    return "likelihood" if success.metric == "likelihood" else "greedy"


@dataclass(frozen=True)
class FreeJudged:
    """Some questions' answers by both models, in the order of the table."""

    rows: Sequence[int]
    """In the question table."""
    ids: tuple[str, ...]
    tasks: Sequence[str]
    configured: str
    threshold: float
    tokens: np.ndarray
    """[N], of each answer."""
    logp: Mapping[str, np.ndarray]
    """By model (`base`, `tuned`): the log-likelihood of each answer, [N] fp64."""
    greedy: Mapping[str, np.ndarray]
    """By model: bool [N]."""

    def values(self, which: str) -> dict[str, np.ndarray]:
        """Every measure's values of a model, [N] fp64; the configured one is the first."""
        each = self.logp[which] / self.tokens
        found = {"greedy": self.greedy[which].astype(float), "gold_logp": each}
        if self.configured == "likelihood":
            found = {"likelihood": (each >= self.threshold).astype(float), **found}
        return found

    def perplexity(self, which: str) -> float:
        """Of the answers' tokens, all together; infinite past what a number holds."""
        mean = -float(self.logp[which].sum() / self.tokens.sum())
        return math.exp(mean) if mean < math.log(1e300) else math.inf


def write_free_results(
    path: Path, prompts: Sequence[Prompt], base: Scores, tuned: Scores, columns: list[int], success: SuccessConfig
) -> None:
    """Write both models' answers; `columns` are the tuned layers among the head's routers. Raises StorageError."""
    kept = [prompts[row] for row in base.rows]
    table = {
        "row": base.rows,
        "id": [p.id for p in kept],
        "task": [p.task for p in kept],
        "split": [p.split for p in kept],
        "tokens": [len(p.choice_ids[p.answer]) for p in kept],
        "base_prediction": base.predictions,
        "tuned_prediction": tuned.predictions,
        "base_logp": [scores[0] for scores in base.scores],
        "tuned_logp": [scores[0] for scores in tuned.scores],
        "base_routing": list(base.routing_NLE[:, columns].reshape(len(kept), -1)),
        "tuned_routing": list(tuned.routing_NLE[:, columns].reshape(len(kept), -1)),
    }
    facts = {
        "layers": len(columns),
        "experts": base.routing_NLE.shape[2],
        "rule": FREE_RULE,
        "configured": configured_measure(success),
        "threshold": success.threshold,
    }
    write_table(path, table, _SCHEMA, facts)


def read_free(path: Path) -> FreeJudged:
    """The answers of such a table. Raises ArtifactError."""
    table = read_table(path, [name for name in _SCHEMA.names if not name.endswith("_routing")])
    facts, found = table_facts(table), table.to_pydict()
    models = ("base", "tuned")
    return FreeJudged(
        found["row"],
        tuple(found["id"]),
        found["task"],
        facts["configured"],
        facts["threshold"],
        np.array(found["tokens"], dtype=float),
        {which: np.array(found[f"{which}_logp"], dtype=float) for which in models},
        {which: np.array(found[f"{which}_prediction"]) == 0 for which in models},
    )
