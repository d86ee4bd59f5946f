"""What the regularizer adds: the same run without it (lambda = 0), judged on the same questions.

It is a run like any other, so its stages are those that `finetune.regularizer.kind=none` would make; all before training is
shared. The comparison is paired by question: base with the task loss alone, and the task loss alone with both terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from roma_ray.borders.text import figure
from roma_ray.config.loading import with_overrides
from roma_ray.engine.setup import Setup
from roma_ray.evaluation.free_results import FreeJudged
from roma_ray.evaluation.results_file import read_answers_of
from roma_ray.evaluation.statistics import p_value, pair, significant
from roma_ray.store.artifacts import Stage

ALONE = "task_loss_alone"
"""What a run calls that evaluation among its stages."""
HEADER = ("trained by", "from %", "to %", "difference", "p")


def without_regularizer(setup: Setup) -> Setup | None:
    """The set-up of the run that is trained by the task loss alone; None where none is asked for, or this one is it."""
    config = setup.config
    term = config.finetune.regularizer
    if not config.evaluation.task_loss_alone or term.kind == "none" or term.weight == 0:
        return None
    changed = with_overrides(config, ["finetune.regularizer.kind=none", "evaluation.task_loss_alone=false"])
    return replace(setup, config=changed.model_copy(update={"name": f"{config.name}, task loss alone"}))


def what_it_adds(alone: Stage, both: Stage) -> dict[str, Any]:
    """Paired figures, of verdicts by the configured rule: {"alone": base to the task loss alone, "added": the task loss alone to both
    terms, "tasks": the same by task, "choice_logp": of the right answer's log-probability among the choices, of free-form questions
    "gold_logp": of the answer's log-likelihood}. Raises ArtifactError.
    """
    found, other = read_answers_of(both.path), read_answers_of(alone.path)
    assert found.rows == other.rows, "both are judged on the same test questions"
    base, first, second = found.values("base"), other.values("tuned"), found.values("tuned")
    rule, tasks = found.configured, np.asarray(found.tasks)
    likelihood = "gold_logp" if isinstance(found, FreeJudged) else "choice_logp"
    return {
        "alone": pair(base[rule], first[rule]).plain(),
        "added": pair(first[rule], second[rule]).plain(),
        "tasks": {
            str(task): pair(first[rule][tasks == task], second[rule][tasks == task]).plain()
            for task in np.unique(tasks)
        },
        likelihood: pair(first[likelihood], second[likelihood]).plain(),
    }


def added_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The two steps from base to both terms, as text under `HEADER`."""
    steps = {"task loss": found["alone"], "+ regularizer": found["added"]}
    return [
        (name, *(figure(one, which) for which in ("base", "tuned", "difference")), p_value(one["mcnemar_p"]))
        for name, one in steps.items()
    ]


def added_words(found: Mapping[str, Any]) -> str:
    """What the regularizer adds to the task loss, in a sentence."""
    one = found["added"]
    told = f"{figure(one, 'difference')} points, McNemar's exact p {p_value(one['mcnemar_p'])}"
    if not significant(one["mcnemar_p"]):
        return f"That the regularizer adds anything to the task loss alone is not shown ({told})."
    if one["difference"] > 0:
        return f"The regularizer adds to what the task loss alone gains ({told})."
    return f"The task loss alone does better than with the regularizer ({told})."
