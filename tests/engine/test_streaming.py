"""Slice streaming: the same files as the whole model gives, whatever is held at once, and after a stop in the middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from roma_ray.engine.progress import Silence
from roma_ray.engine.runners import Runners
from roma_ray.engine.setup import Setup, resolve
from roma_ray.engine.streaming import STREAM, plan_chain
from roma_ray.engine.work import serial
from roma_ray.errors import ModelError, StorageError
from roma_ray.moe.whole import model_sizes
from roma_ray.runs.pipeline import Run, run
from roma_ray.stages.extraction import EXTRACT
from roma_ray.stages.preparation import QUESTIONS
from roma_ray.store.artifacts import file_digest
from tests.making import made
from tests.moe.test_fitting import edit
from tests.progress import Told
from tests.tiny import EAGER
from tests.world import make_world


def limited(run: Run, storage: Path, **extraction: Any) -> Setup:
    config = run.setup.config
    changed = config.extraction.model_copy(update=extraction)
    return resolve(config.model_copy(update={"extraction": changed, "storage": str(storage)}))


def extracted(name: str, request: pytest.FixtureRequest, folder: Path) -> Run:
    """A run of olmoe that the tests share, or a family's extraction of its own."""
    if name.endswith("_run"):
        shared: Run = request.getfixturevalue(name)
        return shared
    attention = "eager" if name in EAGER else "sdpa"
    world = make_world(folder, name, count=30, model={"attention": attention})
    return run(resolve(world), Silence(), until="extract")


@pytest.mark.parametrize(
    ("name", "layers_at_once", "slices"),
    [
        ("letter_run", 1, 6),
        ("cloze_run", 4, 2),
        # Recurrent layers, a dense first layer, sliding windows with sinks, a language model of a multimodal one.
        ("granitemoehybrid", 1, 6),
        ("qwen3_next", 1, 6),
        ("deepseek", 1, 6),
        ("gpt_oss", 1, 6),
        ("gemma4", 1, 6),
    ],
)
def test_a_chain_of_slices_gives_the_whole_models_files(
    name: str, layers_at_once: int, slices: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run = extracted(name, request, tmp_path / "whole")
    limit = layers_at_once * largest_gb(run.setup.model.path)
    setup = limited(run, tmp_path / "streamed", memory_gb=limit)
    made(QUESTIONS, setup)
    chain = plan_chain(setup.model, limit)
    assert len(chain) == slices
    assert [start for start, _ in chain[1:]] == [stop for _, stop in chain[:-1]]
    opened: list[tuple[int, int]] = []

    def stopping(work: Any, batches: Any) -> Any:
        opened.append((work.start, work.stop))
        if len(opened) == 2:
            yield from serial(work, batches[:1])
            raise KeyboardInterrupt
        yield from serial(work, batches)

    first, second = Told(), Told()
    with pytest.raises(KeyboardInterrupt):
        made(EXTRACT, setup, Runners(extract=stopping), first)
    opened.clear()
    left: list[int] = []

    def counting(work: Any, batches: Any) -> Any:
        opened.append((work.start, work.stop))
        left.append(len(batches))
        yield from serial(work, batches)

    stage = made(EXTRACT, setup, Runners(extract=counting), second)
    # Each slice counts by its layers, also those that the first attempt had done.
    tokens, _, begun = second.meters["extract"]
    assert begun == pytest.approx(sum(first.counted))
    assert begun + sum(second.counted) == pytest.approx(tokens)
    total = stage.manifest()["facts"]["batches"]
    assert total > 1
    assert opened == chain
    assert left == [0, total - 1, *[total] * (len(chain) - 2)]
    assert not (stage.path / STREAM).exists()
    expected = run.stages["extract"]
    assert stage.fingerprint == expected.fingerprint
    for file in sorted((expected.path / "batches").iterdir()):
        assert file_digest(file) == file_digest(stage.path / "batches" / file.name), file.name


def largest_gb(path: str) -> float:
    """What one layer of the tiny model takes at most in fp32; the ends count with the embeddings and with `lm_head`."""
    sizes = model_sizes(path)
    return max(*sizes.layers, sizes.layers[0] + sizes.embedding, sizes.layers[-1] + sizes.head) * 4 / 1e9


def test_a_limit_that_holds_no_layer_and_a_storage_without_room_are_refused(
    letter_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = limited(letter_run, tmp_path / "a", memory_gb=1e-6)
    made(QUESTIONS, setup)
    with pytest.raises(ModelError, match="holds no single layer"):
        made(EXTRACT, setup)

    monkeypatch.setattr("roma_ray.stages.extraction.free_bytes", lambda folder: 1000)
    setup = limited(letter_run, tmp_path / "b")
    made(QUESTIONS, setup)
    with pytest.raises(StorageError, match=r"extraction\.cache=false"):
        made(EXTRACT, setup)
    without = limited(letter_run, tmp_path / "b", cache=False)
    stage = made(EXTRACT, without)
    assert not list((stage.path / "batches").glob("*.safetensors"))


def test_a_tensor_of_the_last_layers_is_missed_before_the_first_slice_works(tmp_path: Path) -> None:
    setup = resolve(make_world(tmp_path, count=12, extraction={"memory_gb": 1e-4}))
    edit(setup.model.path, lambda tensors: tensors.pop("model.norm.weight"))

    def working(work: Any, batches: Any) -> Any:
        raise AssertionError("a slice was loaded")

    made(QUESTIONS, setup)
    with pytest.raises(ModelError, match=r"model.norm.weight is missing"):
        made(EXTRACT, setup, Runners(extract=working))
