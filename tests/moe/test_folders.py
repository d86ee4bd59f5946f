"""Files that no reader may open: a pipe that never ends, a link to itself, a folder in a file's place."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from roma_ray.config.schema import ModelConfig
from roma_ray.engine.setup import model_identity
from roma_ray.errors import CheckpointError, ModelError, RomaError
from roma_ray.moe.adapters import read_adapter
from roma_ray.moe.inspection import inspect
from roma_ray.moe.reference import read_reference
from roma_ray.moe.slices import load_slice, model_facts
from tests.moe.test_adapters import tuned_adapter
from tests.tiny import save_tiny, tiny_moe


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """What opens a pipe waits for ever: end it, and the test with it."""

    def late(*_: object) -> None:
        raise AssertionError("a reader waits for a pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def spoil(path: Path, how: str) -> None:
    path.unlink(missing_ok=True)
    if how == "pipe":
        os.mkfifo(path)
    elif how == "self-link":
        path.symlink_to(path.name)
    elif how == "dead link":
        path.symlink_to("nowhere")
    elif how == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


WAYS = ("pipe", "self-link", "dead link", "device", "folder")


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", ["roma.json", "adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_s_files(tmp_path: Path, name: str, how: str) -> None:
    path = save_tiny(tiny_moe("olmoe", num_hidden_layers=4), tmp_path / "base")
    tuned_adapter(path, tmp_path / "adapter", torch.float32, 3)
    spoil(tmp_path / "adapter" / name, how)
    for read in (read_adapter, inspect):
        with pytest.raises(CheckpointError, match=rf"{name} is (no regular file|a link that leads nowhere)"):
            read(tmp_path / "adapter")


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_model_s_files(tmp_path: Path, name: str, how: str) -> None:
    path = save_tiny(tiny_moe("olmoe", num_hidden_layers=4), tmp_path / "base")
    spoil(Path(path) / name, how)
    readers = (
        model_facts,
        inspect,
        lambda model: load_slice(model, dtype=torch.float32, with_lm_head=True),
        lambda model: model_identity(ModelConfig(path=model), model),
    )
    for read in readers:
        with pytest.raises(RomaError, match=rf"{name} is (no regular file|a link that leads nowhere)"):
            read(path)


@pytest.mark.parametrize("how", WAYS[:-1])
def test_single_files(tmp_path: Path, how: str) -> None:
    for name, readers in (("router_ft.pt", (read_reference, inspect)), ("routing.json", (inspect,))):
        spoil(tmp_path / name, how)
        for read in readers:
            with pytest.raises(CheckpointError, match=r"is (no regular file|a link that leads nowhere)"):
                read(tmp_path / name)


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    """A hub's cache is made of links."""
    path = Path(save_tiny(tiny_moe("olmoe", num_hidden_layers=4), tmp_path / "base"))
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in path.iterdir():
        (linked / file.name).symlink_to(file)
    assert model_facts(str(linked)) == model_facts(str(path))
    (linked / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has neither model\.safetensors"):
        load_slice(str(linked), dtype=torch.float32, with_lm_head=True)
