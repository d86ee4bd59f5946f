"""Base's and tuned routers' answers to free-form test questions as a table, and every measure of them, question by question.

greedy       whether each token of the answer is the likeliest, so that greedy decoding writes it (lm-eval's `acc` of a likelihood)
likelihood   whether the answer's log-likelihood a token is at least the threshold (`extraction.success`), where that is success
gold_logp    the answer's log-likelihood, in nats a token

And of what greedy decoding writes, where that is success: `exact_match`, `f1`, `contains`, `numeric` (where the answers hold
numbers) as `questions/answer_metrics.py` has them, `rouge_l` (ROUGE-L's F of the best accepted answer, rouge-score) and `bleu`
(a sentence's, of 100, sacrebleu).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from roma_ray.config.free_form import SuccessConfig
from roma_ray.engine.generation import ENDINGS, Written
from roma_ray.engine.question_table import read_table, table_facts, write_table
from roma_ray.engine.scoring import Scores
from roma_ray.questions.answer_metrics import WRITTEN, number_of
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
        ("answers", pa.list_(pa.string())),
        ("base_text", pa.string()),
        ("tuned_text", pa.string()),
        ("base_ended", pa.string()),
        ("tuned_ended", pa.string()),
        ("base_routing", pa.list_(pa.float32())),
        ("tuned_routing", pa.list_(pa.float32())),
    ]
)


def configured_measure(success: SuccessConfig) -> str:
    """The measure that a run's answers are judged by. What a judge said of the base model's answers he did not say of others."""
    return "greedy" if success.metric == "verdict" else success.metric


@dataclass(frozen=True)
class Texts:
    """What both models wrote to some questions, in one order, and the accepted answers."""

    accepted: list[list[str]]
    written: Mapping[str, Sequence[Written]]
    """By model (`base`, `tuned`)."""


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
    accepted: Sequence[Sequence[str]]
    texts: Mapping[str, Sequence[str]]
    """By model, what it wrote; nothing where answers were not written."""
    ended: Mapping[str, Sequence[str]]

    def values(self, which: str) -> dict[str, np.ndarray]:
        """Every measure's values of a model, [N] fp64; the configured one is the first."""
        each = self.logp[which] / self.tokens
        found = {"greedy": self.greedy[which].astype(float), "gold_logp": each}
        if self.configured == "likelihood":
            found["likelihood"] = (each >= self.threshold).astype(float)
        if which in self.texts:
            found |= self._of_texts(self.texts[which])
        return {self.configured: found.pop(self.configured), **found}

    def _of_texts(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        numbers = all(any(number_of(answer) is not None for answer in accepted) for accepted in self.accepted)
        metrics = {**WRITTEN, "rouge_l": rouge_l, "bleu": bleu}
        if not numbers and self.configured != "numeric":
            del metrics["numeric"]
        return {
            name: np.array([float(metric(t, a)) for t, a in zip(texts, self.accepted, strict=True)])
            for name, metric in metrics.items()
        }

    def written(self) -> dict[str, dict[str, int]]:
        """By model, how many of its answers ended by what."""
        return {which: {name: list(found).count(name) for name in ENDINGS} for which, found in self.ended.items()}

    def perplexity(self, which: str) -> float:
        """Of the answers' tokens, all together; infinite past what a number holds."""
        mean = -float(self.logp[which].sum() / self.tokens.sum())
        return math.exp(mean) if mean < math.log(1e300) else math.inf


def write_free_results(
    path: Path,
    prompts: Sequence[Prompt],
    base: Scores,
    tuned: Scores,
    columns: list[int],
    success: SuccessConfig,
    texts: Texts | None,
) -> None:
    """Write both models' answers; `columns` are the tuned layers among the head's routers. Raises StorageError."""
    kept = [prompts[row] for row in base.rows]
    nothing = [None] * len(kept)
    said: dict[str, Sequence[Any]] = {"answers": nothing if texts is None else texts.accepted}
    for which in ("base", "tuned"):
        own = None if texts is None else texts.written[which]
        said[f"{which}_text"] = nothing if own is None else [written.text for written in own]
        said[f"{which}_ended"] = nothing if own is None else [written.ended for written in own]
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
        **said,
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
    spoken = models if None not in found["answers"] else ()
    return FreeJudged(
        found["row"],
        tuple(found["id"]),
        found["task"],
        facts["configured"],
        facts["threshold"],
        np.array(found["tokens"], dtype=float),
        {which: np.array(found[f"{which}_logp"], dtype=float) for which in models},
        {which: np.array(found[f"{which}_prediction"]) == 0 for which in models},
        found["answers"],
        {which: found[f"{which}_text"] for which in spoken},
        {which: found[f"{which}_ended"] for which in spoken},
    )


def bleu(text: str, accepted: Sequence[str]) -> float:
    """A sentence's BLEU, of 100."""
    import sacrebleu

    return float(sacrebleu.sentence_bleu(text, list(accepted)).score)


def rouge_l(text: str, accepted: Sequence[str]) -> float:
    """ROUGE-L's F of the best accepted answer."""
    return float(_rouge().score_multi(list(accepted), text)["rougeL"].fmeasure)


@cache
def _rouge() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"])
