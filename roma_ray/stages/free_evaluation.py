"""What the evaluation says of free-form questions: every measure of both models' answers, paired, and the guards' findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from roma_ray.engine.identity import success_settings
from roma_ray.engine.question_table import TABLE, iterate_rows
from roma_ray.engine.scoring import Scores
from roma_ray.engine.setup import Setup
from roma_ray.engine.stored_prompts import Prompts
from roma_ray.evaluation.free_results import FreeJudged, Texts, read_free, write_free_results
from roma_ray.evaluation.guards import TRUNCATED_LIMIT, Text, overlap
from roma_ray.evaluation.measures import pair_measures
from roma_ray.evaluation.results_file import RESULTS
from roma_ray.evaluation.transfer import by_group
from roma_ray.store.artifacts import Stage, fingerprint


@dataclass(frozen=True)
class Asking:
    """What was asked of both models, and where what is found goes."""

    setup: Setup
    stage: Stage
    questions: Stage
    prompts: Prompts
    """The whole question table."""
    columns: list[int]
    """The tuned layers among the head's routers."""
    trained: set[str]
    """Tasks that were trained on."""


@dataclass(frozen=True)
class Judgement:
    """What an evaluation says of the test questions."""

    metric: str
    """The measure that answers are judged by."""
    verdicts: tuple[np.ndarray, np.ndarray]
    """By it, of base and tuned."""
    figures: dict[str, Any]
    guards: dict[str, Any]
    pinned: dict[str, Any] = field(default_factory=dict)
    """What the pin holds beside rows and prompts."""


def judge_free(asked: Asking, base: Scores, tuned: Scores, texts: Texts | None) -> Judgement:
    """The test questions without choices by every measure, from what is stored, as any reader has it. Raises StorageError."""
    config, path = asked.setup.config, asked.stage.path / RESULTS
    write_free_results(path, asked.prompts, base, tuned, asked.columns, config.extraction.success, texts)
    found = read_free(path)
    verdicts = found.values("base")[found.configured], found.values("tuned")[found.configured]
    figures = _figures(found, asked.trained, config.questions.held_out_tasks)
    # Other accepted answers are another judge.
    accepted = {} if texts is None else {"accepted": fingerprint(texts.accepted)}
    pinned = {**success_settings(config), **accepted}
    return Judgement(found.configured, verdicts, figures, _guards(asked.questions, asked.prompts), pinned)


def _figures(found: FreeJudged, trained: set[str], held_out: Sequence[str]) -> dict[str, Any]:
    """The test questions by every measure, the answers' perplexity; where tasks are `held_out`, also by group."""
    base, tuned = found.values("base"), found.values("tuned")
    groups = None
    if held_out:
        groups = by_group(base, tuned, found.tasks, trained, held_out, found.configured, likelihood="gold_logp")
    return {
        **({} if groups is None else {"held_out": groups}),
        "measures": {
            "configured": found.configured,
            "coincide": False,
            "figures": {name: one.plain() for name, one in pair_measures(base, tuned, found.tasks).items()},
        },
        "shares": {},
        "free": {
            "tokens": int(found.tokens.sum()),
            **({"written": found.written()} if found.ended else {}),
            "perplexity": {which: found.perplexity(which) for which in ("base", "tuned")},
        },
    }


def _guards(questions: Stage, prompts: Prompts) -> dict[str, Any]:
    """Findings that a reader of the table must know. A free answer has no level of chance."""

    def asked(split: str) -> Iterator[Text]:
        rows = iterate_rows(questions.path / TABLE, ["question", "context"], prompts.splits.mask([split]))
        # The same words about another passage are another question.
        return ((question, [context or ""]) for question, context in rows)

    return {
        "identical_scores": False,
        "at_chance": [],
        "below_chance": [],
        **shortened(prompts),
        "test_questions_in_training": overlap(asked("train"), asked("test")),
    }


def shortened(prompts: Prompts) -> dict[str, Any]:
    """{truncated, too_many_truncated}: how many prompts were shortened, and whether so many say something of the figures."""
    truncated = int(prompts.truncated.sum())
    return {"truncated": truncated, "too_many_truncated": truncated > TRUNCATED_LIMIT * len(prompts)}
