"""Readers of question files: every line becomes a `Question` or a `Rejected` with the reason; none is dropped.

Files are read as a stream, a bounded line or batch at a time, in the order of the sources and of their lines.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from roma_ray.assets import assets_path
from roma_ray.borders.text import printable
from roma_ray.config.schema import QuestionSource
from roma_ray.errors import ConfigError, QuestionError
from roma_ray.questions.dataset_registry import Loader, load_dataset
from roma_ray.questions.jsonl import jsonl_rows
from roma_ray.questions.parquet import parquet_rows
from roma_ray.questions.records import Question, Rejected
from roma_ray.questions.shapes import questions_of
from roma_ray.store.files import file_digest, local_place

if TYPE_CHECKING:
    from roma_ray.questions.seen_ids import SeenIds

logger = logging.getLogger(__name__)

ASSETS = "assets:"
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
PARQUET_SUFFIXES = (".parquet", ".pq")
SHOWN_REASONS = 3


def read_questions(
    sources: Sequence[QuestionSource], *, seed: int = 0, loader: Loader | None = None, free: bool = False
) -> tuple[list[Question], list[Rejected]]:
    """All questions of the sources, in file order with unique ids, and all rows that were set aside.

    `seed` draws the samples of hub datasets; `loader` replaces the hub (see `registry.load_dataset`). `free`: rows have no choices
    (`free_records`).

    Raises:
        QuestionError: a file cannot be read or gives no question; the message holds the first reasons.
        ConfigError: no source, or an unknown dataset name.
    """
    questions: list[Question] = []
    rejected: list[Rejected] = []
    for item in iter_questions(sources, seed=seed, loader=loader, free=free):
        if isinstance(item, Question):
            questions.append(item)
        else:
            rejected.append(item)
    return questions, rejected


def iter_questions(
    sources: Sequence[QuestionSource], *, seed: int = 0, loader: Loader | None = None, free: bool = False
) -> Iterator[Question | Rejected]:
    """The same rows as `read_questions`, as a stream: only the ids seen so far are kept in memory, as digests."""
    for _, rows in iter_sources(sources, seed=seed, loader=loader, free=free):
        yield from rows


def iter_sources(
    sources: Sequence[QuestionSource], *, seed: int = 0, loader: Loader | None = None, free: bool = False
) -> Iterator[tuple[str, Iterator[Question | Rejected]]]:
    """Each source's short name and its rows, which are to be read before the next source's."""
    if not sources:
        raise ConfigError("questions.sources is empty: name at least one file or dataset")
    names = display_names([source.path for source in sources])
    seen = _no_ids_yet()
    for source, name in zip(sources, names, strict=True):
        rows = _open(source, name, seed, loader, free)
        yield source.dataset or name, _usable(_limited(_without_duplicates(rows, seen), source), source.dataset or name)


def declared_parts(sources: Sequence[QuestionSource], *, free: bool = False) -> Iterator[tuple[str, str]]:
    """(task, split) of what the sources surely declare, read without the hub and without a word about bad rows.

    Raises QuestionError where a file cannot be read.
    """
    names = display_names([source.path for source in sources])
    seen = _no_ids_yet()
    certain = True
    for source, name in zip(sources, names, strict=True):
        if source.rows_split == "test":
            yield source.task or name, "test"  # a source without one good row is refused
        if source.path is None:
            # Its rows are training rows; of which tasks, and which later rows its ids set aside, only the hub knows.
            certain = False
            if source.rows_split in (None, "train"):
                yield f"\0{name}", "train"
            continue
        for row in _limited(_without_duplicates(_open(source, name, 0, None, free), seen), source):
            if isinstance(row, Question) and (certain or row.split == "train"):
                yield row.task, row.split


def asset(name: str) -> Path:
    """The path of a file that ships with the package.

    Raises:
        QuestionError: there is no such file.
    """
    folder = assets_path()
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
        held = ", ".join(sorted(f"questions/{p.name}" for p in (folder / "questions").glob("*"))) or "no question file"
        raise QuestionError(f"no file '{printable(name)}' ships with roma-ray (its assets hold {held})")
    return path


def _open(
    source: QuestionSource, name: str, seed: int, loader: Loader | None, free: bool
) -> Iterator[Question | Rejected]:
    """The source's rows, before duplicates are looked for and before a file's limit."""
    if source.path is None:
        assert source.dataset is not None
        return load_dataset(
            source.dataset,
            task=source.task,
            split=source.rows_split,
            limit=source.limit,
            seed=seed,
            loader=loader,
            subset=source.subset,
            part=source.part,
            columns=source.columns,
            free=free,
        )
    path = question_file(source.path)
    suffix = _suffix(path)
    stem = path.name[: -len(suffix)] or path.name
    parquet = suffix in PARQUET_SUFFIXES
    return questions_of(
        parquet_rows(path, name=name, columns=source.columns, free=free) if parquet else jsonl_rows(path, name=name),
        name=printable(name),
        ids=f"{name}:",
        task=source.task,
        default_task=stem,
        split=source.split,
        columns=source.columns,
        free=free,
    )


def question_file(name: str) -> Path:
    """The absolute path of a question file; `assets:NAME` is one that ships with the package. Nothing is read.

    Raises:
        QuestionError: there is none, it is a folder or the like, or its name says no known form.
    """
    path = asset(name.removeprefix(ASSETS)) if name.startswith(ASSETS) else _file(name)
    if not _suffix(path):
        raise QuestionError(f"question file '{printable(name)}' must be a .jsonl, .jsonl.gz or .parquet file")
    return path.absolute()


def _suffix(path: Path) -> str:
    lower = path.name.lower()
    return next((s for s in JSONL_SUFFIXES + PARQUET_SUFFIXES if lower.endswith(s)), "")


def _file(name: str) -> Path:
    try:
        path = local_place(name)
        exists, folder, regular = path.exists(), path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:
        raise QuestionError(f"question file '{printable(name)}' cannot be read: {error}") from error
    if not exists:
        raise QuestionError(
            f"question file '{printable(name)}' does not exist (looked for {printable(str(path.absolute()), 300)})"
        )
    if not regular:
        what = "a folder" if folder else "not a regular file"
        raise QuestionError(f"question file '{printable(name)}' is {what}: name a .jsonl or .parquet file")
    return path


def _no_ids_yet() -> SeenIds:
    # Its numpy is more than who only looks at file names has use for.
    from roma_ray.questions.seen_ids import SeenIds

    return SeenIds()


def _without_duplicates(rows: Iterator[Question | Rejected], seen: SeenIds) -> Iterator[Question | Rejected]:
    """Rows whose id came before, in whatever source, become rejected."""
    for row in rows:
        if isinstance(row, Question):
            if first := seen.first_use(row.id):
                file, line = first
                reason = f"duplicate id: it was first used in {file}, line {line}"
                yield Rejected(row.file, row.line, printable(row.id), reason)
                continue
            seen.add(row.id, row.file, row.line)
        yield row


def _limited(rows: Iterator[Question | Rejected], source: QuestionSource) -> Iterator[Question | Rejected]:
    """Stop at the file's limit of good rows; of a data set a sample was drawn."""
    good = 0
    for row in rows:
        yield row
        good += isinstance(row, Question)
        if source.path is not None and good == source.limit:
            break


def _usable(rows: Iterator[Question | Rejected], name: str) -> Iterator[Question | Rejected]:
    """Count what is set aside; refuse a source without one good row."""
    good = bad = 0
    reasons: list[Rejected] = []
    try:
        for row in rows:
            if isinstance(row, Question):
                good += 1
            else:
                bad += 1
                if len(reasons) < SHOWN_REASONS:
                    reasons.append(row)
            yield row
    except QuestionError as error:
        if reasons and not good:
            raise QuestionError(f"{error}\n{_shown(reasons, bad)}") from error
        raise
    if not good:
        if not bad:
            raise QuestionError(f"{name} is empty: it holds no question")
        raise QuestionError(f"{name} holds no usable question: all {bad} rows were set aside.\n{_shown(reasons, bad)}")
    if bad:
        logger.warning(
            "%s: %d questions, %d rows set aside (first: line %d: %s)",
            printable(name, None),
            good,
            bad,
            reasons[0].line,
            reasons[0].reason,
        )


def _shown(reasons: Sequence[Rejected], total: int) -> str:
    lines = [f"  line {row.line}: {row.reason}" for row in reasons]
    if total > len(reasons):
        lines.append(f"  ... and {total - len(reasons)} more")
    return "\n".join(lines)


def display_names(paths: Sequence[str | None]) -> list[str]:
    """For each path its shortest tail that no other path shares: it names the file in messages and default ids.

    The tail, not the whole path, so that the ids are the same on every machine.
    """
    parts = [None if path is None else Path(path.removeprefix(ASSETS)).parts for path in paths]
    different = {p for p in parts if p is not None}
    names = []
    for own in parts:
        length = 1
        while own and length < len(own) and sum(p[-length:] == own[-length:] for p in different) > 1:
            length += 1
        names.append("/".join(own[-length:]).replace("//", "/") if own else "")
    return names


def content_digest(path: Path) -> str:
    """The digest of a question file's bytes. Raises OSError."""
    status = path.stat()
    return _digest(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache
def _digest(path: Path, inode: int, size: int, changed: int) -> str:
    """Cached by path, inode, size and time: a sweep asks for it hundreds of times."""
    return file_digest(path)
