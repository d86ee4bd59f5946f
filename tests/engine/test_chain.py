"""A chain of slices handed from one to the next: how layers are divided, and the same files as the whole model gives."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roma_ray.config.schema import Config
from roma_ray.engine.chain import Flat, Handed, balanced, layer_parameters, links_of
from roma_ray.engine.extractor import Batches, ExtractWork
from roma_ray.engine.runners import Runners
from roma_ray.engine.setup import resolve
from roma_ray.engine.work import Executor, Report
from roma_ray.runs.pipeline import Run
from roma_ray.stages.extraction import EXTRACT
from roma_ray.stages.preparation import QUESTIONS
from roma_ray.store.artifacts import Stage, file_digest
from tests.free_world import free_world, gsm8k
from tests.making import made, with_settings
from tests.progress import Told
from tests.tiny import EAGER
from tests.world import make_world


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.data())
def test_the_largest_slice_is_as_small_as_can_be(sizes: list[int], data: st.DataObject) -> None:
    """Against every division there is."""
    slices = data.draw(st.integers(1, len(sizes)))
    ranges = balanced(sizes, slices)
    assert len(ranges) == slices
    assert [n for start, stop in ranges for n in range(start, stop)] == list(range(len(sizes)))
    every = (
        list(zip((0, *inner), (*inner, len(sizes)), strict=True))
        for inner in itertools.combinations(range(1, len(sizes)), slices - 1)
    )
    assert largest(sizes, ranges) == min(largest(sizes, other) for other in every)


def largest(sizes: Sequence[int], ranges: Sequence[tuple[int, int]]) -> int:
    return max(sum(sizes[start:stop]) for start, stop in ranges)


def test_slices_as_large_as_one_another_are_even() -> None:
    """Embeddings as large as four layers: the others still share what is left evenly."""
    assert balanced([9, 1, 1, 1, 1, 1, 1], 3) == [(0, 1), (1, 4), (4, 7)]
    assert balanced([1] * 6, 4) in ([(0, 2), (2, 4), (4, 5), (5, 6)], [(0, 1), (1, 2), (2, 4), (4, 6)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_tensor_is_handed_on_to_the_bit(dtype: torch.dtype) -> None:
    """Also NaN, infinities and what lies between a tensor's rows in memory."""
    tensor = torch.randn(7, 12, generator=torch.Generator().manual_seed(0)).to(dtype)[:, ::2]
    tensor[0, 0], tensor[1, 1] = float("nan"), float("inf")
    got = pickle.loads(pickle.dumps(Flat.of(tensor))).tensor()
    assert (got.dtype, got.shape) == (dtype, tensor.shape)
    assert Flat.of(got).content.tobytes() == Flat.of(tensor).content.tobytes()
    assert torch.equal(got.nan_to_num(), tensor.nan_to_num())


def in_turn(slices: int) -> Executor:
    """A chain in this process, in which each slice gets what the one before handed on as another process would."""

    def execute(work: Any, batches: Sequence[int]) -> Iterator[Report]:
        assert isinstance(work, ExtractWork)
        links = links_of(work, balanced(layer_parameters(work.model), slices))
        chain = [pickle.loads(pickle.dumps(link)).open() for link in links]
        for batch in batches:
            handed: Handed | None = None
            for do in chain:
                handed = do(batch, pickle.loads(pickle.dumps(handed)))
            assert handed is not None
            assert handed.flat_states is None
            yield handed.report

    return execute


def both(config: Config, slices: int, cuts: Sequence[int], rules: Sequence[str], folder: Path) -> tuple[Stage, Stage]:
    """The extraction by the whole model, and by a chain in another storage."""
    stages = []
    for name, chain in (("whole", None), ("chained", slices)):
        changed = config.model_copy(update={"storage": str(folder / name)})
        setup = with_settings(resolve(changed).shared(cuts, rules), "extraction", chain=chain)
        made(QUESTIONS, setup)
        stages.append(made(EXTRACT, setup, Runners(chain=in_turn(slices)) if chain else Runners()))
    return stages[0], stages[1]


def same(whole: Stage, chained: Stage) -> None:
    """Every file to the bit, under one fingerprint."""
    assert chained.fingerprint == whole.fingerprint
    expected, found = whole.manifest()["files"], chained.manifest()["files"]
    differing = [name for name in {*expected, *found} if expected.get(name) != found.get(name)]
    assert differing in ([], ["config.yaml"])
    names = sorted(path.name for path in (whole.path / "batches").iterdir())
    assert names == sorted(path.name for path in (chained.path / "batches").iterdir())
    for name in names:
        assert file_digest(whole.path / "batches" / name) == file_digest(chained.path / "batches" / name), name


@pytest.mark.parametrize("slices", [2, 3])
@pytest.mark.parametrize(
    "family",
    # Shared experts; a dense first layer with shared experts; recurrent layers; sliding windows with sinks; heads and windows by
    # layer, of a multimodal model; embeddings that are the head too.
    ["olmoe", "qwen2_moe", "deepseek_v3", "granitemoehybrid", "gpt_oss", "gemma4", "lfm2_moe"],
)
def test_a_chain_gives_the_whole_models_files(family: str, slices: int, tmp_path: Path) -> None:
    """With several cuts, two of them in one slice, and several token rules."""
    attention = "eager" if family in EAGER else "sdpa"
    config = make_world(tmp_path, family, count=24, model={"attention": attention})
    same(*both(config, slices, [1, 2, 5], ["First3"], tmp_path))


@pytest.mark.parametrize("format", ["cloze", "free"])
def test_continuations_and_free_answers_too(format: str, tmp_path: Path) -> None:
    """Answers of several tokens; without a cache; in bfloat16."""
    if format == "free":
        config = free_world(tmp_path, gsm8k(20), routing={"layers": "L2", "tokens": "Answer"})
    else:
        questions = {"sources": [{"path": str(tmp_path / "questions.jsonl")}], "prompt": {"format": "cloze"}}
        config = make_world(tmp_path, count=18, dtype=torch.bfloat16, questions=questions, extraction={"cache": False})
    same(*both(config, 3, [], [], tmp_path))


def test_a_batch_of_which_no_question_can_run_is_handed_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions with foreign tokens are set aside by a chain as by the whole model: all of one batch, one of another."""
    config = make_world(tmp_path, count=30, extraction={"batch_tokens": 256, "max_failed": 1.0})

    def foreign(batches: Batches, rows: Sequence[int], vocabulary: int) -> dict[int, str]:
        return {row: "foreign" for row in rows if row in (*batches.batches[1], batches.batches[0][0])}

    monkeypatch.setattr(Batches, "foreign_tokens", foreign)
    whole, chained = both(config, 2, [], [], tmp_path)
    assert whole.manifest()["facts"]["errors"] == chained.manifest()["facts"]["errors"] > 2
    same(whole, chained)


def test_one_process_says_that_it_is_no_chain(letter_run: Run, tmp_path: Path) -> None:
    """It holds the whole model, or streams; either way with the same files."""
    expected = letter_run.stages["extract"]
    for limit, words in ((None, "holds the whole model"), (4e-4, "streams slices")):
        changed = letter_run.setup.config.model_copy(update={"storage": str(tmp_path / words.replace(" ", "-"))})
        setup = with_settings(resolve(changed), "extraction", chain=2, memory_gb=limit)
        made(QUESTIONS, setup)
        told = Told()
        same(expected, made(EXTRACT, setup, progress=told))
        assert any("extraction.chain needs the workers of a cluster" in line and words in line for line in told.lines)
