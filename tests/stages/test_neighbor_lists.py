"""Neighbors in a large S by planned batches: the answer of one process, whoever does which batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from roma_ray.engine.progress import Silence
from roma_ray.engine.runners import LOCAL, Runners
from roma_ray.engine.setup import Setup
from roma_ray.engine.steps import locate
from roma_ray.engine.work import Job, Report, Work
from roma_ray.errors import ArtifactError
from roma_ray.manifold import inverted
from roma_ray.manifold.inverted import propose
from roma_ray.runs.pipeline import Run
from roma_ray.stages import neighborhoods
from roma_ray.stages.embedding import embedding_texts, text_numbers
from roma_ray.stages.neighbor_lists import LISTS, spread
from roma_ray.stages.neighborhoods import NEIGHBORS, PAIRS, neighbors
from tests.making import with_settings


@pytest.fixture
def job(letter_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A search of sixty questions in several shards and several blocks."""
    monkeypatch.setattr(inverted, "SHARD_ROWS", 7)
    monkeypatch.setattr(neighborhoods, "spread", partial(spread, block=8))
    setup: Setup = with_settings(letter_run.setup, "neighbors", exact_up_to=1, k=2)
    found = NEIGHBORS.job(setup, locate(NEIGHBORS, setup))
    assert found.stage.path != letter_run.stages["neighbors"].path
    return found


@pytest.fixture
def alone(job: Job, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The neighborhoods as `find_neighbors` searches by itself."""
    with monkeypatch.context() as patch:
        patch.setattr(neighborhoods, "spread", lambda *_: propose)
        assert neighbors(job, LOCAL, Silence())["recall"] >= 0.95
    return (job.stage.path / PAIRS).read_bytes()


def two_workers_backwards(work: Work, batches: Sequence[int]) -> Iterator[Report]:
    for part in (batches[::2], batches[1::2]):
        do = work.open()
        yield from (do(batch) for batch in reversed(part))


def test_the_answer_is_that_of_one_process(job: Job, alone: bytes) -> None:
    facts = neighbors(job, Runners(search=two_workers_backwards), Silence())
    assert (job.stage.path / PAIRS).read_bytes() == alone
    assert facts["recall"] >= 0.95
    assert not (job.stage.path / LISTS).exists()
    assert neighbors(job, LOCAL, Silence()) == facts


def test_a_search_that_was_ended_goes_on_with_the_batches_that_are_left(job: Job, alone: bytes) -> None:
    done: list[int] = []

    def ends(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        do = work.open()
        for batch in batches[:3]:
            yield do(batch)
        raise KeyboardInterrupt

    def rest(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        done.extend(batches)
        yield from two_workers_backwards(work, batches)

    with pytest.raises(KeyboardInterrupt):
        neighbors(job, Runners(search=ends), Silence())
    neighbors(job, Runners(search=rest), Silence())
    assert done == list(range(3, done[-1] + 1))
    assert (job.stage.path / PAIRS).read_bytes() == alone


def test_a_damaged_answer_is_named(job: Job) -> None:
    def damages(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        yield from two_workers_backwards(work, batches)
        (job.stage.path / LISTS / "000001.safetensors").write_bytes(b"no tensors")

    with pytest.raises(ArtifactError, match=r"000001\.safetensors cannot be read .* remove .*\.lists and run again"):
        neighbors(job, Runners(search=damages), Silence())


def test_a_few_successes_are_searched_exactly_and_in_one_process(letter_run: Run) -> None:
    def nobody(work: Work, batches: Sequence[int]) -> Iterator[Report]:
        raise AssertionError("no batches are planned")

    setup = with_settings(letter_run.setup, "neighbors", k=4)
    job = NEIGHBORS.job(setup, locate(NEIGHBORS, setup))
    assert neighbors(job, Runners(search=nobody), Silence())["recall"] == 1.0


def test_texts_are_numbered_alike_where_they_are_equal(letter_run: Run) -> None:
    questions = letter_run.stages["questions"]
    texts, numbers = embedding_texts(questions, False), text_numbers(questions, False)
    assert [texts.index(text) for text in texts] == [numbers.tolist().index(number) for number in numbers.tolist()]
    assert int(numbers.max()) + 1 == len(set(texts))
    assert numbers.dtype == torch.int64
