"""An evaluation's answers, asked for: what is not there yet is answered by this process or by workers, then gathered in row order.

So no number of workers changes a bit on a CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from roma_ray.engine.cache import prefix_of
from roma_ray.engine.progress import Meter, Progress
from roma_ray.engine.question_table import TABLE
from roma_ray.engine.runners import Runners
from roma_ray.engine.scoring import Scores
from roma_ray.engine.success import accepted_answers
from roma_ray.engine.work import Executor, Job, Report, Work, one_by_one
from roma_ray.evaluation.free_results import Texts
from roma_ray.evaluation.guards import check_not_identical
from roma_ray.questions.prompts import Prompt
from roma_ray.stages.answer_work import (
    SECTIONS,
    Answerer,
    AnswerWork,
    Part,
    number,
    plan_scores,
    plan_texts,
    section_of,
)
from roma_ray.stages.base_scores import base_scores, base_stage, scoring


@dataclass(frozen=True)
class Evaluated:
    """What both models answered."""

    base: Scores
    """Of validation and test questions."""
    tuned: Scores
    trained: Scores | None
    texts: Texts | None
    routers: list[int]
    """The layers of the head's routers, in their order in routing rows."""
    top_k: int


def answer(
    job: Job, runners: Runners, progress: Progress, prompts: Sequence[Prompt], rows: Mapping[str, Sequence[int]]
) -> Evaluated:
    """The answers to the questions `rows` of each section (`SECTIONS`); the base's are kept for all that start from it.

    Raises GuardError, also where both models answer alike to the bit, CheckpointError, CacheError, ModelError, WorkerError.
    """
    kept = base_stage(job.setup, job.stages["extract"])
    plans = _plans(job, prompts, rows)
    tokens = {section: sum(part.size for part in plans[section]) for section in SECTIONS if section != "texts"}
    meter_of = progress.meter("evaluate", sum(tokens.values()), "tokens", tokens["base"] * kept.complete)
    with contextlib.ExitStack() as opened, meter_of as meter:
        passing: _Passing | None = None
        scored: Scores | None = None

        def begin(base: Path, sections: Sequence[str]) -> _Passing:
            work = AnswerWork(job.setup, job.stages, job.stage, str(base))
            execute = opened.enter_context(_executor(work, runners, prompts))
            return _Passing(work, {section: plans[section] for section in sections}, execute, meter)

        def score_base(folder: Path) -> Scores:
            nonlocal passing, scored
            if scored is None:
                passing = begin(folder, SECTIONS)
                scored = passing.scores("base", rows["base"])
            return scored

        base = base_scores(kept, rows["base"], score_base, elsewhere=job.stage.path)
        job.stage.note_makers(of=kept)
        passing = passing or begin(kept.path, SECTIONS[1:])
        tuned = passing.scores("tuned", rows["tuned"])
        check_not_identical(base.of(rows["tuned"]).scores, tuned.scores)
        trained = passing.scores("trained", rows["trained"]) if rows["trained"] else None
        texts = _texts(job, passing, rows["texts"], progress) if rows["texts"] else None
        passing.end()
        shape = passing.work.shape("tuned")
    return Evaluated(base, tuned, trained, texts, shape["routers"], shape["top_k"])


def _texts(job: Job, passing: _Passing, rows: Sequence[int], progress: Progress) -> Texts:
    """What both models wrote to some questions, beside the accepted answers."""
    with progress.meter("write", len(rows), "questions", passing.done("texts")) as meter:
        passing.wait("texts", meter)
    every = accepted_answers(job.stages["questions"].path / TABLE)
    return Texts([every[row] for row in rows], passing.work.texts(rows, len(passing.plans["texts"])))


def _plans(job: Job, prompts: Sequence[Prompt], rows: Mapping[str, Sequence[int]]) -> dict[str, list[Part]]:
    """The parts of every section."""
    prefix, batch_tokens = prefix_of(job.stages["extract"].path), scoring(job.setup)["batch_tokens"]
    plans = {
        section: plan_scores(prompts, rows[section], prefix, batch_tokens) if rows[section] else []
        for section in SECTIONS
        if section != "texts"
    }
    return {**plans, "texts": plan_texts(prompts, rows["texts"], job.setup.config.extraction.success.generation_batch)}


@contextlib.contextmanager
def _executor(work: AnswerWork, runners: Runners, prompts: Sequence[Prompt]) -> Iterator[Executor]:
    """The runner's, or this process with a head that is lent for as long as the block runs."""
    if runners.evaluate is not None:
        yield runners.evaluate
        return
    with runners.heads.lend(work.model, work.setup.cut) as head:
        answerer = Answerer(work, head, prompts)

        def here(work: Work, batches: Sequence[int]) -> Iterator[Report]:
            yield from one_by_one(answerer, batches)

        yield here


class _Passing:
    """Sections on their way through one executor, in their order: the parts of them that are not done yet."""

    def __init__(self, work: AnswerWork, plans: Mapping[str, list[Part]], execute: Executor, meter: Meter) -> None:
        self.work, self.meter = work, meter
        self.plans = {section: work.planned(section, parts) for section, parts in plans.items() if parts}
        self.waiting = {section: work.missing(section, parts) for section, parts in self.plans.items()}
        for section in {*self.waiting} - {"texts"}:
            meter.advance(self.done(section))
        self.reports = execute(
            work, [number(section, part) for section, parts in self.waiting.items() for part in parts]
        )

    def done(self, section: str) -> int:
        """What of a section is done, in its own unit."""
        waiting = set(self.waiting[section])
        return sum(part.size for n, part in enumerate(self.plans[section]) if n not in waiting)

    def wait(self, section: str, meter: Meter) -> None:
        """Until a section is done; what is reported of others meanwhile counts for them. Raises what the executor raises."""
        while self.waiting[section]:
            report = next(self.reports)
            other, part = section_of(report.batch)
            self.waiting[other].remove(part)
            # Texts that come before their time count as done when it begins.
            if other != "texts" or section == "texts":
                meter.advance(self.plans[other][part].size, seconds=report.seconds)

    def scores(self, section: str, rows: Sequence[int]) -> Scores:
        """A section's scores in the order of `rows`, once it is done."""
        self.wait(section, self.meter)
        return self.work.scores(section, rows, len(self.plans[section]))

    def end(self) -> None:
        """Let the executor end, once every section is done."""
        assert not any(self.waiting.values())
        assert next(self.reports, None) is None
