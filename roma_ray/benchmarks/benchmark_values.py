"""What is measured of one benchmark question: lm-eval's own metrics, and those of `measures` that it has not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from roma_ray.evaluation.measures import log_softmax

if TYPE_CHECKING:
    from lm_eval.api.task import Task


def measured(sample: Mapping[str, Any], task: Task, tokens: Mapping[tuple[str, str], int]) -> dict[str, float]:
    """A question's metrics: lm-eval's own that are numbers, then those of `measures` that lm-eval has not."""
    found = {metric: number(sample[metric]) for metric in sample["metrics"]}
    values = {metric: value for metric, value in found.items() if value is not None}
    gold = _gold(sample, task)
    if gold is not None:
        # Some tasks ask for more than the choices after their prompt (acc_mutual_info: the choices alone), behind them.
        scores = [repeats[0][0] for repeats in sample["resps"][: len(task.doc_to_choice(sample["doc"]))]]
        values["gold_logp"] = scores[gold] / tokens[tuple(sample["arguments"][gold])]
        values["choice_logp"] = float(log_softmax(np.array(scores))[gold])
    return values


def _gold(sample: Mapping[str, Any], task: Task) -> int | None:
    """The number of the right choice, as lm-eval finds it; None where a task has no choices, or several are right."""
    if task.get_config("output_type") != "multiple_choice":
        return None
    doc = sample["doc"]
    # Where the prompts differ and the continuation does not (winogrande), the prompt's number is the answer.
    right, choices = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc), task.doc_to_choice(doc)
    if isinstance(right, str):
        right = choices.index(right) if right in choices else None
    return right if isinstance(right, int) and 0 <= right < len(choices) else None


def number(value: Any) -> float | None:
    """A metric's value of one question, where it is a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
