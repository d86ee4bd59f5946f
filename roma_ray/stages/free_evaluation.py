"""What the evaluation says of free-form questions: every measure of both models' answers, paired, and the guards' findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from roma_ray.benchmarks.scorers import Routers
from roma_ray.engine.generation import Decoder, Written, begun_batches, rules_for
from roma_ray.engine.identity import success_settings
from roma_ray.engine.progress import Progress
from roma_ray.engine.question_table import TABLE, read_table
from roma_ray.engine.scoring import Scores
from roma_ray.engine.setup import Setup
from roma_ray.engine.success import accepted_answers
from roma_ray.engine.tokenizer import load_tokenizer
from roma_ray.evaluation.free_results import FreeJudged, Texts, read_free, write_free_results
from roma_ray.evaluation.guards import TRUNCATED_LIMIT, overlap
from roma_ray.evaluation.measures import pair_measures
from roma_ray.evaluation.results_file import RESULTS
from roma_ray.evaluation.transfer import by_group
from roma_ray.moe.head_chain import Chain
from roma_ray.moe.slices import Slice
from roma_ray.questions.prompts import Prompt
from roma_ray.store.artifacts import Stage, fingerprint


def write_texts(
    setup: Setup,
    head: Slice | Chain,
    adapter: Path,
    questions: Stage,
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    progress: Progress,
) -> Texts | None:
    """What base and tuned routers write to some questions; the layers below the head run each prompt once for both. None where
    success needs no written answers. The head is left with the base's routers.

    Raises ModelError, CheckpointError, GuardError.
    """
    success, model = setup.config.extraction.success, setup.model
    if not success.writes:
        return None
    assert isinstance(head, Slice), "a configuration that divides the head has no written answers"
    tokenizer = load_tokenizer(model.path, model.revision)
    below = [model.load(0, setup.cut, with_lm_head=False)] if setup.cut else []
    decoder = Decoder([*below, head], tokenizer, rules_for(model, tokenizer, prompts, success))
    routers = Routers(head, str(adapter))
    found: dict[str, dict[int, Written]] = {"base": {}, "tuned": {}}
    asked = [prompts[row] for row in rows]
    with progress.meter("write", len(rows), "questions") as meter:
        for numbers, begun in begun_batches(decoder, asked, success.generation_batch):
            for name, answers in found.items():
                routers.put(name)
                answers.update(zip(numbers, decoder.write(begun), strict=True))
            meter.advance(len(numbers))
    routers.put("base")
    every = accepted_answers(questions.path / TABLE)
    written = {name: [answers[n] for n in range(len(rows))] for name, answers in found.items()}
    return Texts([every[row] for row in rows], written)


@dataclass(frozen=True)
class Asking:
    """What was asked of both models, and where what is found goes."""

    setup: Setup
    stage: Stage
    questions: Stage
    prompts: Sequence[Prompt]
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


def _guards(questions: Stage, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Findings that a reader of the table must know. A free answer has no level of chance."""
    table = read_table(questions.path / TABLE, ["question", "context"]).to_pylist()
    parts: dict[str, list[tuple[str, list[str]]]] = {"train": [], "test": []}
    for asked, prompt in zip(table, prompts, strict=True):
        # The same words about another passage are another question.
        parts.setdefault(prompt.split, []).append((asked["question"], [asked["context"] or ""]))
    truncated = sum(p.truncated for p in prompts)
    return {
        "identical_scores": False,
        "at_chance": [],
        "below_chance": [],
        "truncated": truncated,
        "too_many_truncated": truncated > TRUNCATED_LIMIT * len(prompts),
        "test_questions_in_training": overlap(parts["train"], parts["test"]),
    }
