"""Settings of free-form questions (`questions.prompt.format: free`), and what they do not go with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, field_validator

from roma_ray.config.section import Section

FREE = "free"
ANSWER = "Answer"
"""The rule of `routing.tokens` that reads r_i where the answer is predicted: at the last prompt token and those of the answer."""


WRITING = ("exact_match", "contains", "numeric")
"""Metrics of success that judge what the model writes."""


class SuccessConfig(Section):
    """When the base model answers a free-form question rightly (S of eq. 2), and how answers are written where that needs any."""

    metric: Literal["exact_match", "contains", "numeric", "likelihood", "verdict"] = "exact_match"
    """Of the answer that greedy decoding writes: `exact_match` after SQuAD's normalisation; `contains`, the answer stands in it;
    `numeric`, equal numbers, after `####` where that stands (GSM8K). Nothing is written for `likelihood`, the answer's mean
    log-likelihood a token is at least `threshold`, and `verdict`, what the rows say in a field `correct` (an external judge's)."""
    threshold: float = -1.0
    """Nats a token (`likelihood`)."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest answer that is written; longer ones are cut, and counted."""
    stop: tuple[str, ...] = ("Question:",)
    """Texts at which a written answer ends, themselves left out, beside the model's own end of text."""
    generation_batch: int = Field(default=16, ge=1)
    """Prompts that are continued together."""

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(value):
            raise ValueError("an empty text ends every answer before it begins")
        return value

    @property
    def writes(self) -> bool:
        """Whether answers are written."""
        return self.metric in WRITING


def free_form_fault(
    *, free: bool, tokens: str, registered: Sequence[str], choices: bool, positions: str, written: str, sliced: str
) -> str | None:
    """What of a configuration does not go with its kind of questions, in a sentence; None where all does.

    tokens: `routing.tokens`; registered: data sets of the registry; choices: whether a mapping of columns names any;
    positions: of the regularizer; written: the metric that needs written answers, if it does; sliced: the setting of the extraction
    by which no worker holds the whole model, if there is one.
    """
    if not free:
        if tokens == ANSWER:
            return (
                "routing.tokens: Answer reads the routing at the answer's tokens, which would tell a multiple-choice question's "
                "right answer: it is of questions.prompt.format free alone"
            )
        return None
    if registered:
        return (
            f"dataset: {registered[0]} holds multiple-choice questions, and questions.prompt.format is free: name a hub id "
            "(owner/name) or a file of free-form rows"
        )
    if choices:
        return "columns.choices and columns.labels are of multiple choice, and questions.prompt.format is free: leave them out"
    if written and sliced:
        return (
            f"extraction.success.metric: {written} writes answers with the whole model, and extraction.{sliced} divides it: leave "
            f"{sliced} out, or set the metric to likelihood or verdict"
        )
    if tokens == ANSWER and positions == "sum":
        return (
            "finetune.regularizer.positions: sum pulls each position to the neighbors' at the same place, and answers of other "
            "lengths have no same places: set it to mean where routing.tokens is Answer"
        )
    return None
