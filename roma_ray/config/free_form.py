"""Settings of free-form questions (`questions.prompt.format: free`), and what they do not go with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from roma_ray.config.section import Section

FREE = "free"
ANSWER = "Answer"
"""The rule of `routing.tokens` that reads r_i where the answer is predicted: at the last prompt token and those of the answer."""


class SuccessConfig(Section):
    """When the base model answers a free-form question rightly (S of eq. 2)."""

    metric: Literal["likelihood", "verdict"] = "likelihood"
    """`likelihood`: the answer's mean log-likelihood a token is at least `threshold`. `verdict`: what the rows say in a field
    `correct` (an external judge's)."""
    threshold: float = -1.0
    """Nats a token (`likelihood`)."""


def free_form_fault(
    *, free: bool, tokens: str, registered: Sequence[str], choices: bool, alone: bool, positions: str
) -> str | None:
    """What of a configuration does not go with its kind of questions, in a sentence; None where all does.

    tokens: `routing.tokens`; registered: data sets of the registry; choices: whether a mapping of columns names any; alone:
    `evaluation.task_loss_alone`; positions: of the regularizer.
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
    if alone:
        return (
            "evaluation.task_loss_alone judges multiple-choice questions, and questions.prompt.format is free: set it to false "
            "and compare with a run of finetune.regularizer.kind=none by `roma-ray compare`"
        )
    if tokens == ANSWER and positions == "sum":
        return (
            "finetune.regularizer.positions: sum pulls each position to the neighbors' at the same place, and answers of other "
            "lengths have no same places: set it to mean where routing.tokens is Answer"
        )
    return None
