"""Many questions are encoded as planned batches: the table of one process, whoever does which batch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from roma_ray.config.loading import load_config
from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import TABLE, read_table
from roma_ray.engine.runners import LOCAL, Runners
from roma_ray.engine.setup import resolve
from roma_ray.engine.steps import Facts, complete
from roma_ray.engine.work import Job, Report, Work, serial
from roma_ray.errors import ConfigError, QuestionError
from roma_ray.stages import encoding
from roma_ray.stages.encoding import ENCODING, EncodeWork
from roma_ray.stages.preparation import FAULTS, QUESTIONS, prepare
from roma_ray.store.files import below, listed
from tests.bucket import Proxy

COUNT = 60


def write(path: Path, *, word: str = "cat", count: int = COUNT) -> None:
    """Rows of which some are no questions, and every seventh has too long a prompt."""
    with open(path, "w") as stream:
        for n in range(count):
            text = "long " * 200 if n % 7 == 3 else f"Which {word} is number {n}?"
            row = {"id": f"q{n}", "task": f"t{n % 3}", "question": text, "choices": ["one", "two"], "answer": n % 2}
            stream.write(json.dumps(row if n % 11 else {"id": f"q{n}"}) + "\n")


def job_in(folder: Path, *settings: str) -> Job:
    source = f"questions.sources=[{{path: {folder / 'q.jsonl'}}}]"
    given = [source, f"storage={folder}", "questions.prompt.max_tokens=120", *settings]
    return QUESTIONS.job(resolve(load_config(None, given), device="cpu"), {})


@pytest.fixture
def job(tmp_path: Path) -> Job:
    write(tmp_path / "q.jsonl")
    return job_in(tmp_path)


def made(job: Job) -> tuple[bytes, bytes]:
    return (job.stage.path / TABLE).read_bytes(), (job.stage.path / FAULTS).read_bytes()


@pytest.fixture
def alone(job: Job) -> tuple[Facts, tuple[bytes, bytes]]:
    """What one process makes of few questions."""
    facts = prepare(job, Runners(encode=nobody), Silence())
    assert facts["rejected"] > COUNT // 11
    assert facts["questions"] > COUNT / 2
    return facts, made(job)


def nobody(work: Work, batches: Sequence[int]) -> Iterator[Report]:
    raise AssertionError("no batches are planned")


def two_workers_backwards(work: Work, batches: Sequence[int]) -> Iterator[Report]:
    for part in (batches[::2], batches[1::2]):
        do = work.open()
        yield from (do(batch) for batch in reversed(part))


@pytest.mark.parametrize("at_once", [1, 2048])
@pytest.mark.parametrize("rows", [7, 16, COUNT])
def test_the_table_is_that_of_one_process(
    job: Job, alone: tuple[Facts, tuple[bytes, bytes]], monkeypatch: pytest.MonkeyPatch, rows: int, at_once: int
) -> None:
    monkeypatch.setattr(encoding, "ROWS", rows)
    monkeypatch.setattr(encoding, "_AT_ONCE", at_once)
    for runners in (Runners(encode=two_workers_backwards), LOCAL):
        (job.stage.path / TABLE).unlink()
        assert prepare(job, runners, Silence()) == alone[0]
        assert made(job) == alone[1]
        assert not (job.stage.path / ENCODING).exists()


def test_what_was_ended_goes_on_with_the_batches_that_are_left(
    job: Job, alone: tuple[Facts, tuple[bytes, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "ROWS", 8)
    done: list[int] = []

    def ends(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        do = work.open()
        for batch in batches[:3]:
            yield do(batch)
        raise KeyboardInterrupt

    def rest(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        assert isinstance(work, EncodeWork)
        done.extend(batches)
        for report in two_workers_backwards(work, batches):
            yield report
            # What lies open for hours looks like what a killed process has left.
            assert {path.name for path in job.stage.path.iterdir()} == {ENCODING, *before}

    before = {path.name for path in job.stage.path.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        prepare(job, Runners(encode=ends), Silence())
    assert prepare(job, Runners(encode=rest), Silence()) == alone[0]
    assert done == list(range(3, done[-1] + 1))
    assert made(job) == alone[1]


def test_a_bucket_gives_the_table_of_a_folder_and_keeps_no_batches(
    job: Job, bucket: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = complete(QUESTIONS, job, LOCAL, Silence()).manifest()
    monkeypatch.setattr(encoding, "ROWS", 8)
    far = job_in(tmp_path, f"storage={bucket.address('encoding')}")

    def ends(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        yield from serial(work, batches[:3])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        complete(QUESTIONS, far, Runners(encode=ends), Silence())
    assert len(listed(far.stage.path / ENCODING, "[!.]*")) == COUNT // 8 + 3
    there = complete(QUESTIONS, far, LOCAL, Silence()).manifest()
    assert (there["files"], there["facts"]) == (here["files"], here["facts"])
    assert not below(far.stage.path / ENCODING)


def test_batches_of_other_questions_are_not_taken_up(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set on a hub may change between two attempts, and is known by its name."""
    monkeypatch.setattr(encoding, "ROWS", 8)

    def ends(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        yield from two_workers_backwards(work, batches[:3])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(job, Runners(encode=ends), Silence())
    write(Path(job.setup.config.questions.sources[0].path or ""), word="dog")
    prepare(job, LOCAL, Silence())
    texts = read_table(job.stage.path / TABLE, ["question"]).column("question").to_pylist()
    assert all("dog" in text for text in texts)


def test_questions_of_which_none_can_be_used_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "ROWS", 8)
    write(tmp_path / "q.jsonl")
    job = job_in(tmp_path, "questions.prompt.max_tokens=16")
    with pytest.raises(QuestionError, match="none of the 54 questions has a usable prompt"):
        complete(QUESTIONS, job, LOCAL, Silence())
    assert not job.stage.path.exists()


def test_batches_are_kept_where_another_setting_of_the_run_makes_the_table_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "ROWS", 8)
    write(tmp_path / "q.jsonl")
    wrong = job_in(tmp_path, "questions.held_out_tasks=[t7]")
    with pytest.raises(ConfigError, match="t7"):
        complete(QUESTIONS, wrong, LOCAL, Silence())
    right = job_in(tmp_path, "questions.held_out_tasks=[t1]")
    assert right.stage.path == wrong.stage.path
    complete(QUESTIONS, right, Runners(encode=no_batches), Silence())


def no_batches(work: Work, batches: Sequence[int]) -> Iterator[Report]:
    assert not batches
    yield from ()


def test_what_the_settings_cannot_do_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "ROWS", 8)
    write(tmp_path / "q.jsonl")
    job = job_in(tmp_path, "questions.prompt.chat_template=true")
    with pytest.raises(ConfigError, match="has no chat template"):
        prepare(job, Runners(encode=nobody), Silence())
    assert not (job.stage.path / ENCODING).exists()
