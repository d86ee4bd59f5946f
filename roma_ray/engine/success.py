"""Which free-form questions the base model answers rightly (S of eq. 2), by the declared metric."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from roma_ray.config.free_form import SuccessConfig
from roma_ray.engine.question_table import read_table
from roma_ray.errors import QuestionError
from roma_ray.questions.answer_metrics import WRITTEN


def successes(success: SuccessConfig, questions: Path, rows: Path) -> list[bool]:
    """Whether each question of a table is answered rightly, from what the extraction's `rows` hold of it.

    One that failed, of which nothing was written, or that has no verdict is not. Raises ArtifactError; QuestionError where no
    row holds the verdict that is to be taken.
    """
    if success.metric == "verdict":
        verdicts = read_table(questions, ["verdict"]).column("verdict").to_pylist()
        if not any(verdict is not None for verdict in verdicts):
            raise QuestionError(
                "extraction.success.metric is verdict, and no row has the field `correct`: write true or false into the rows, or "
                "choose another metric"
            )
        return [bool(verdict) for verdict in verdicts]
    if success.writes:
        texts = read_table(rows, ["text"]).column("text").to_pylist()
        metric = WRITTEN[success.metric]
        pairs = zip(texts, accepted_answers(questions), strict=True)
        return [text is not None and bool(metric(text, accepted)) for text, accepted in pairs]
    scores = read_table(rows, ["scores"]).column("scores").to_pylist()
    answers = read_table(questions, ["choice_ids"]).column("choice_ids").to_pylist()
    pairs = zip(scores, answers, strict=True)
    return [own is not None and likely(own, len(ids[0]), success.threshold) for own, ids in pairs]


def likely(scores: Sequence[float], tokens: int, threshold: float) -> bool:
    """Whether an answer of so many tokens has at least `threshold` as mean log-likelihood a token."""
    return scores[0] / tokens >= threshold


def accepted_answers(questions: Path) -> list[list[str]]:
    """The texts that are right, of every question of a table."""
    found: list[list[str]] = read_table(questions, ["choices"]).column("choices").to_pylist()
    return found
