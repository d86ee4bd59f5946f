"""The questions stage: read, split, encode, set bad rows aside."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from roma_ray.config.free_form import ANSWER, FREE
from roma_ray.config.schema import Config, QuestionsConfig, QuestionSource
from roma_ray.engine.identity import data_seed, is_free, prompt_settings
from roma_ray.engine.progress import Progress
from roma_ray.engine.question_table import TABLE, read_table
from roma_ray.engine.runners import Runners
from roma_ray.engine.setup import Setup
from roma_ray.engine.steps import Facts, Step
from roma_ray.engine.work import Job
from roma_ray.errors import ArtifactError, ConfigError, QuestionError
from roma_ray.questions.asked import REJECTED, AskedQuestions
from roma_ray.questions.counts import SourceCount, count_sources, describe_sources
from roma_ray.questions.held_out import check_held_out, parts_in_force
from roma_ray.questions.labels import Labels
from roma_ray.questions.readers import content_digest, declared_parts, display_names, iter_sources, question_file
from roma_ray.questions.splits import Drawn, divided_splits, drawn_parts, drawn_splits, nested_places
from roma_ray.stages.encoding import ENCODING, encoded
from roma_ray.stages.question_writer import QuestionWriter
from roma_ray.store.artifacts import MANIFEST, Stage, Store, fingerprint, read_manifest
from roma_ray.store.files import listed, remove_folder
from roma_ray.store.tables import PART_ROWS, in_parts, write_parts

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
    """Read and encode all questions, once. Raises QuestionError, ConfigError, ModelError, StorageError."""
    setup, stage = job.setup, job.stage
    config = setup.config
    asked = read_sources(config.questions, data_seed(config))
    parts = split_questions(config.questions, asked, data_seed(config))
    _check_texts(config, asked.forms)
    tables = encoded(job, asked, parts, runners.encode, progress)
    with QuestionWriter(asked, free=is_free(config)) as writer:
        try:
            writer.write(stage.path / TABLE, tables, config.questions.held_out_tasks)
        except QuestionError:
            # Other sources, or other settings of these, are another stage.
            remove_folder(stage.path / ENCODING)
            raise
        faults = writer.faults.table()
        write_parts(stage.path / FAULTS, REJECTED, in_parts(faults))
    remove_folder(stage.path / ENCODING)
    if len(faults):
        # As many as have one reason, the first reason first of equals.
        common = sorted(pc.value_counts(faults.column("reason")).to_pylist(), key=lambda one: -one["counts"])[:3]
        shown = ", ".join(f"{one['counts']} x {one['values']}" for one in common)
        progress.say(f"{len(faults)} row(s) set aside ({shown}); see {stage.path / FAULTS}")
    return {
        "questions": writer.rows,
        "rejected": len(faults),
        "truncated": writer.truncated,
        "splits": dict(writer.splits),
        "tasks": sorted({task for task, _ in writer.task_splits}),
        "sources": [count.facts() for count in count_sources(asked, parts, writer.used_N)],
        "drawn": asdict(
            drawn_from(setup.store, config.questions.sources, stage.identity["settings"]["sources"], is_free(config))
        ),
    }


def read_sources(config: QuestionsConfig, seed: int) -> AskedQuestions:
    """Each source's questions as they are declared, and the rows set aside. Raises QuestionError, ConfigError, StorageError."""
    free = config.prompt.format == FREE
    return AskedQuestions(iter_sources([_resolved(source) for source in config.sources], seed=seed, free=free))


def split_questions(config: QuestionsConfig, asked: AskedQuestions, seed: int) -> np.ndarray:
    """Each question's part, as its place in `splits.PARTS`. Raises QuestionError, ConfigError."""
    if config.splits is not None:
        return divided_splits(asked.declared, config.splits.model_dump(), seed=seed)
    return drawn_splits(
        asked.declared,
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
    asked = read_sources(config, seed)
    return count_sources(asked, split_questions(config, asked, seed))


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


def training_rows(table: pa.Table, fraction: float, seed: int, held_out: Sequence[str] = ()) -> np.ndarray:
    """Row numbers of the training questions in use, none of a held-out task: a nested prefix of one seeded permutation."""
    tasks, splits = Labels(), Labels()
    splits.extend(table.column("split"))
    training = splits.mask(["train"])
    if held_out:
        tasks.extend(table.column("task"))
        training &= ~tasks.mask(held_out)
    rows = np.flatnonzero(training)
    return rows[nested_places(_ids(table, rows), len(rows), fraction, seed)]


def _ids(table: pa.Table, rows: np.ndarray) -> Iterator[str]:
    for start in range(0, len(rows), PART_ROWS):
        yield from table.column("id").take(pa.array(rows[start : start + PART_ROWS])).to_pylist()


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
        table = read_table(job.stage.path / TABLE, ["task", "split"])
        asked = table.group_by(["task", "split"]).aggregate([]).to_pylist()
        check_held_out(held_out, [(row["task"], row["split"]) for row in asked])


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
