"""The questions stage: read, split, encode, set bad rows aside."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from roma_ray.config.free_form import ANSWER, FREE
from roma_ray.config.schema import Config, QuestionsConfig, QuestionSource
from roma_ray.engine.identity import data_seed, is_free, prompt_settings
from roma_ray.engine.progress import Progress
from roma_ray.engine.question_table import FREE_QUESTIONS, REJECTED, TABLE, read_table, write_table
from roma_ray.engine.question_table import QUESTIONS as COLUMNS
from roma_ray.engine.runners import Runners
from roma_ray.engine.setup import Setup
from roma_ray.engine.steps import Facts, Step
from roma_ray.engine.tokenizer import load_tokenizer
from roma_ray.engine.work import Job
from roma_ray.errors import ArtifactError, ConfigError, QuestionError
from roma_ray.questions.counts import SourceCount, count_sources, describe_sources
from roma_ray.questions.free_prompts import prompt_builder
from roma_ray.questions.held_out import check_held_out, parts_in_force
from roma_ray.questions.prompts import Prompt, build_prompts
from roma_ray.questions.readers import content_digest, declared_parts, display_names, iter_sources, question_file
from roma_ray.questions.records import Question, Rejected
from roma_ray.questions.splits import Drawn, assign_splits, drawn_parts, split_by_task
from roma_ray.store.artifacts import MANIFEST, Stage, Store, fingerprint, read_manifest
from roma_ray.store.files import listed

VERSION = 2
FAULTS = "rejected.parquet"


def questions_settings(setup: Setup) -> dict[str, Any]:
    """What decides the encoded questions. Files count by content, so an edited file is another stage.

    Which parts are drawn by seed must be known: of new files this takes reading them. Raises QuestionError.
    """
    chosen = setup.config.questions
    sources = _sources(chosen.sources)
    drawn = drawn_from(setup.store, chosen.sources, sources, is_free(setup.config))
    by_fraction = chosen.splits is None
    return {
        "sources": sources,
        "prompt": prompt_settings(chosen.prompt),
        "validation_fraction": chosen.validation_fraction if by_fraction and drawn.validation else None,
        "test_fraction": chosen.test_fraction if by_fraction and drawn.test else None,
        **({} if chosen.splits is None else {"splits": chosen.splits.model_dump()}),
        "seed": data_seed(setup.config)
        if not by_fraction or drawn.test or drawn.validation or any(source.dataset for source in chosen.sources)
        else None,
        "tokenizer": setup.model_identity,
    }


def drawn_from(
    store: Store, sources: Sequence[QuestionSource], identities: Sequence[dict[str, Any]], free: bool = False
) -> Drawn:
    """Which parts are drawn by seed from these sources: as a finished stage of the same sources tells, else read from the files."""
    return _drawn(store.root, tuple(_resolved(source) for source in sources), fingerprint(list(identities)), free)


@lru_cache
def _drawn(storage: Path, sources: tuple[QuestionSource, ...], content: str, free: bool) -> Drawn:
    for manifest in listed(storage, f"questions/*/{MANIFEST}"):
        with contextlib.suppress(ArtifactError, KeyError, TypeError):
            known = read_manifest(manifest.parent)
            identity = known["identity"]
            settings = identity["settings"]
            if (
                identity["version"] == VERSION
                and fingerprint(settings["sources"]) == content
                and (settings["prompt"]["format"] == FREE) == free
            ):
                return Drawn(**known["facts"]["drawn"])
    return drawn_parts(declared_parts(sources, free=free))


def prepare(job: Job, runners: Runners, progress: Progress) -> Facts:
    """Read and encode all questions, once. Raises QuestionError, ConfigError, ModelError."""
    setup, stage = job.setup, job.stage
    config = setup.config
    read, rejected = read_sources(config.questions, data_seed(config))
    questions = split_questions(config.questions, read, data_seed(config))
    builder = prompt_builder(load_tokenizer(setup.model.path, setup.model.revision), config.questions.prompt)
    prompts, too_long = build_prompts(questions, builder)
    rejected = [*rejected, *too_long]
    if not prompts:
        reasons = "; ".join(sorted({r.reason for r in rejected})[:3])
        raise QuestionError(f"no question can be used: {reasons}")
    _check_splits(prompts)
    check_held_out(config.questions.held_out_tasks, [(p.task, p.split) for p in prompts])
    _check_texts(config, {q.form for q in questions})
    _write(stage, questions, prompts, rejected, free=is_free(config))
    if rejected:
        common = Counter(r.reason for r in rejected).most_common(3)
        shown = ", ".join(f"{count} x {reason}" for reason, count in common)
        progress.say(f"{len(rejected)} row(s) set aside ({shown}); see {stage.path / FAULTS}")
    return {
        "questions": len(prompts),
        "rejected": len(rejected),
        "truncated": sum(p.truncated for p in prompts),
        "splits": dict(Counter(p.split for p in prompts)),
        "tasks": sorted({p.task for p in prompts}),
        "sources": [c.facts() for c in count_sources(read, {p.id: p.split for p in prompts})],
        "drawn": asdict(
            drawn_from(setup.store, config.questions.sources, stage.identity["settings"]["sources"], is_free(config))
        ),
    }


def read_sources(config: QuestionsConfig, seed: int) -> tuple[list[tuple[str, list[Question]]], list[Rejected]]:
    """Each source's name with its questions as they are declared, and the rows set aside. Raises QuestionError, ConfigError."""
    read: list[tuple[str, list[Question]]] = []
    rejected: list[Rejected] = []
    free = config.prompt.format == FREE
    for name, rows in iter_sources([_resolved(source) for source in config.sources], seed=seed, free=free):
        questions: list[Question] = []
        for row in rows:
            if isinstance(row, Question):
                questions.append(row)
            else:
                rejected.append(row)
        read.append((name, questions))
    return read, rejected


def split_questions(
    config: QuestionsConfig, read: Sequence[tuple[str, Sequence[Question]]], seed: int
) -> list[Question]:
    """All sources' questions in their order, each with its part. Raises QuestionError, ConfigError."""
    asked = [question for _, questions in read for question in questions]
    if config.splits is not None:
        return split_by_task(asked, config.splits.model_dump(), seed=seed)
    return assign_splits(
        asked,
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        seed=seed,
    )


def expected_sources(setup: Setup) -> tuple[SourceCount, ...] | None:
    """What the sources will give to each part, too long prompts not counted; None where one is read from the hub.

    Raises QuestionError, ConfigError.
    """
    config, seed = setup.config.questions, data_seed(setup.config)
    if any(source.path is None for source in config.sources):
        return None
    read, _ = read_sources(config, seed)
    return count_sources(read, {question.id: question.split for question in split_questions(config, read, seed)})


def sources_of(stage: Stage) -> tuple[SourceCount, ...]:
    """How many questions each source of a finished stage gave to each part; empty for stages of older versions, which kept no counts."""
    return tuple(SourceCount.of(facts) for facts in stage.manifest()["facts"].get("sources", ()))


def _sources(sources: Sequence[QuestionSource]) -> list[dict[str, Any]]:
    """What tells these sources from others: of a file its content and the name that its rows are known by, not its place."""
    resolved = [_resolved(source) for source in sources]
    names = display_names([source.path for source in resolved])
    identities = []
    for source, name in zip(resolved, names, strict=True):
        # Where they are not used they change nothing.
        newer = {"columns"} if source.columns is None else set()
        newer |= {"subset", "part"} if source.path or "/" not in str(source.dataset) else set()
        facts = source.model_dump(mode="json", exclude=newer)
        if source.path is not None:
            facts["path"] = [name, content_digest(Path(source.path))]
        identities.append(facts)
    return identities


def _resolved(source: QuestionSource) -> QuestionSource:
    return source if source.path is None else source.model_copy(update={"path": str(question_file(source.path))})


def _check_splits(prompts: Sequence[Prompt]) -> None:
    """Training needs all three parts; a missing one is a fault of the sources, told before any work."""
    present = {p.split for p in prompts}
    missing = [name for name in ("train", "validation", "test") if name not in present]
    if missing:
        raise QuestionError(
            f"no usable {' and no '.join(missing)} questions among {len(prompts)}: give more rows, or change "
            "questions.validation_fraction or questions.test_fraction (or questions.splits, where that is set)"
        )


def _check_texts(config: Config, forms: Collection[str]) -> None:
    """A text has no prompt: its routing is that of its tokens, and nobody writes an answer. Raises ConfigError."""
    if "text" not in forms:
        return
    if config.extraction.success.writes:
        raise ConfigError(
            "there are rows of `text`, which have no answer to be written (extraction.success.metric: "
            f"{config.extraction.success.metric}): set extraction.success.metric=likelihood, with a threshold"
        )
    if config.routing.tokens != ANSWER:
        raise ConfigError(
            f"there are rows of `text`, which have no prompt whose tokens (routing.tokens: {config.routing.tokens}) could be read: "
            f"set routing.tokens={ANSWER}"
        )


def _write(
    stage: Stage,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    rejected: Sequence[Rejected],
    *,
    free: bool,
) -> None:
    by_id = {q.id: q for q in questions}
    kept = [by_id[p.id] for p in prompts]
    columns: dict[str, Sequence[Any]] = {
        "row": range(len(prompts)),
        "id": [p.id for p in prompts],
        "task": [p.task for p in prompts],
        "split": [p.split for p in prompts],
        "question": [q.question for q in kept],
        "choices": [q.choices for q in kept],
        "answer": [p.answer for p in prompts],
        "context": [q.context for q in kept],
        "prompt_ids": [p.prompt_ids for p in prompts],
        "choice_ids": [p.choice_ids for p in prompts],
        "choice_chars": [p.choice_chars for p in prompts],
        "truncated": [p.truncated for p in prompts],
    }
    if free:
        columns |= {"form": [q.form for q in kept], "verdict": [q.verdict for q in kept]}
    write_table(stage.path / TABLE, columns, FREE_QUESTIONS if free else COLUMNS)
    faults = {name: [getattr(r, name) for r in rejected] for name in REJECTED.names}
    write_table(stage.path / FAULTS, faults, REJECTED)


def training_rows(table: pa.Table, fraction: float, seed: int, held_out: Sequence[str] = ()) -> list[int]:
    """Row numbers of the training questions in use, none of a held-out task: a nested prefix of one seeded permutation."""
    from roma_ray.questions.splits import nested_fraction

    ids = table.column("id").to_pylist()
    splits = parts_of(table, held_out)
    row_of = {ids[row]: row for row in range(len(ids)) if splits[row] == "train"}
    return sorted(row_of[key] for key in nested_fraction(list(row_of), fraction, seed))


def parts_of(table: pa.Table, held_out: Sequence[str]) -> list[str]:
    """Each question's part where some tasks are held out; the table's columns `split`, and then `task`, tell."""
    if not held_out:
        return list(table.column("split").to_pylist())
    return parts_in_force(zip(*(table.column(name).to_pylist() for name in ("task", "split")), strict=True), held_out)


def _accept(job: Job, runners: Runners) -> None:
    """Finished questions serve whatever is held out, where they have it, and whichever tokens are read.

    Raises ConfigError, QuestionError.
    """
    if is_free(job.setup.config):
        _check_texts(job.setup.config, read_table(job.stage.path / TABLE, ["form"]).column("form").unique().to_pylist())
    held_out = job.setup.config.questions.held_out_tasks
    if held_out:
        rows = read_table(job.stage.path / TABLE, ["task", "split"]).to_pylist()
        check_held_out(held_out, [(row["task"], row["split"]) for row in rows])


QUESTIONS = Step(
    "questions",
    VERSION,
    (),
    questions_settings,
    prepare,
    accept=_accept,
    lines=lambda stage: describe_sources(sources_of(stage)),
    shown=((FAULTS, None),),
)
