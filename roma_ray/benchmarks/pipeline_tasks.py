"""The pipeline's own test questions as lm-eval tasks, answered by the scores that the paired evaluation has already.

So a run's accuracies are lm-evaluation-harness's own, to the last digit, and are written as it writes them. Import this file
only where lm-eval is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from roma_ray.benchmarks.tasks import question_task
from roma_ray.questions.prompts import PromptBuilder
from roma_ray.questions.records import Question


class Answered(LM):
    """Gives the log-likelihoods of choices that are known already, by question id and choice."""

    def __init__(self, scores: Mapping[str, Sequence[float]]) -> None:
        super().__init__()
        self.scores = scores

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """The known scores; whether a choice is the greedy one is not known and asked by no metric of these tasks."""
        return [(self.scores[request.doc["id"]][request.idx], False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Not asked for by multiple-choice tasks."""
        raise AssertionError("questions are multiple choice")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Not asked for by multiple-choice tasks."""
        raise AssertionError("questions are multiple choice")


def lm_eval_results(
    questions: Sequence[Question], scores: Mapping[str, Mapping[str, Sequence[float]]], builder: PromptBuilder
) -> dict[str, dict[str, Any]]:
    """lm-eval's results (samples left out) of each model whose scores are given, {model: {question id: choices' scores}}."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = sorted({q.task for q in questions})
    tasks = {name: question_task(name, [q for q in questions if q.task == name], builder) for name in names}
    for task in tasks.values():
        task.set_fewshot_seed(seed=0)
    results = {}
    for name, known in scores.items():
        found = evaluate(Answered(known), {"tasks": tasks, "groups": {}}, log_samples=False)
        results[name] = {key: value for key, value in dict(found).items() if key not in ("samples", "configs")}
    return results
