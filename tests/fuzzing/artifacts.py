"""Readers of a run's own artifacts: manifests, tables, activation shards, the training loop's checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import strategies as st

from roma_ray.engine.question_table import QUESTIONS, read_prompts, write_table
from roma_ray.store.artifacts import MANIFEST as STAGE_MANIFEST
from roma_ray.store.artifacts import Store
from tests.fuzzing.damage import damaged, damaged_json
from tests.fuzzing.runner import Target

Opened = tuple[st.SearchStrategy[Any], Callable[[Any], None]]


def manifests(folder: Path) -> Opened:
    """A stage's manifest.json, and the files that it speaks for."""
    stage = Store(folder / "store").stage("extract", {"a": 1}, {"questions": "0" * 16}, 1)
    (stage.path / "batches").mkdir(parents=True)
    content = {"rows.parquet": b"rows" * 9, "batches/000000.parquet": b"batch"}
    for name, data in content.items():
        (stage.path / name).write_bytes(data)
    stage.finish(facts={"rows": 3, "nested": {"a": [1, 2.5]}}, seconds=1.5)
    good = (stage.path / STAGE_MANIFEST).read_bytes()
    value = json.loads(good)
    strategy = st.one_of(
        damaged_json(value).map(lambda d: (STAGE_MANIFEST, d)),
        damaged_json(value).map(lambda d: (STAGE_MANIFEST, d)),
        damaged([content["rows.parquet"]]).map(lambda d: ("rows.parquet", d)),
    )

    def read(named: tuple[str, bytes]) -> None:
        for name, data in {**content, STAGE_MANIFEST: good}.items():
            (stage.path / name).write_bytes(data)
        (stage.path / named[0]).write_bytes(named[1])
        found = stage.manifest()
        stage.verify()
        assert {**found, "digest": value["digest"]} == value, "a changed manifest was believed"
        assert (stage.path / "rows.parquet").read_bytes() == content["rows.parquet"]

    return strategy, read


def tables(folder: Path) -> Opened:
    """A question table as workers read it."""
    path = folder / "questions.parquet"
    columns = {
        "row": [0, 1],
        "id": ["a", "b"],
        "task": ["t", "t"],
        "split": ["train", "test"],
        "question": ["q", "r"],
        "choices": [["x", "y"], ["x", "z"]],
        "answer": [0, 1],
        "context": [None, "c"],
        "prompt_ids": [[1, 2, 3], [4]],
        "choice_ids": [[[5], [6]], [[5], [7]]],
        "choice_chars": [[1, 1], [1, 1]],
        "truncated": [False, True],
    }
    write_table(path, columns, QUESTIONS)
    good, expected = path.read_bytes(), list(read_prompts(path))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"row": [1], "id": [2]}), sink)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        assert list(read_prompts(path)) == expected, "a changed table was believed"

    return damaged([good, good, sink.getvalue().to_pybytes()]), read


def loop_checkpoints(folder: Path) -> Opened:
    """The training loop's checkpoint, which a resumed run takes up."""
    from roma_ray.engine.checkpoint import LoopState, load_checkpoint, save_checkpoint
    from roma_ray.moe.masters import RouterMasters
    from roma_ray.moe.slices import load_slice
    from tests.tiny import save_tiny, tiny_moe

    model = save_tiny(tiny_moe("olmoe", num_hidden_layers=4), folder / "model")
    head = load_slice(model, start=2, dtype=torch.float32, with_lm_head=True)
    masters = RouterMasters(head, [2, 3])
    optimizer = torch.optim.AdamW(masters.parameters(), lr=0.1)
    for parameter in masters.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    gates = masters.state()
    state = LoopState(probe={"ratio": 1.0}, epoch_start=gates, step=3, steps=[[0.1, 0.2, 0.3, 0.4, 0.5]] * 3)
    path = folder / "checkpoint.safetensors"
    save_checkpoint(path, masters, optimizer, state)
    good, start = path.read_bytes(), copy.deepcopy(optimizer.state_dict())

    def read(data: bytes) -> None:
        path.write_bytes(data)
        masters.load(gates)
        optimizer.load_state_dict(copy.deepcopy(start))
        found = load_checkpoint(path, masters, optimizer)
        assert len(found.steps) == found.step
        for tensor in masters.state().values():
            assert bool(torch.isfinite(tensor).all())

    return damaged([good]), read


def activations(folder: Path) -> Opened:
    """An activation shard and the index of its rows."""
    from safetensors.torch import save_file

    from roma_ray.engine.cache import ROWS, ActivationCache
    from roma_ray.engine.extractor import batch_activations

    columns = {"row": [0, 1], "batch": [0, 0], "offset": [0, 3], "tokens": [3, 2], "shard_tokens": [5, 5]}
    write_table(folder / ROWS, columns, pa.schema([(name, pa.int64()) for name in columns]), {"prefix": 0})
    shard = batch_activations(folder, 0, 3)
    shard.parent.mkdir(parents=True)
    hidden = torch.arange(20.0).reshape(5, 4)
    save_file({"hidden": hidden}, shard)
    files = {folder / ROWS: (folder / ROWS).read_bytes(), shard: shard.read_bytes()}

    def read(named: tuple[int, bytes]) -> None:
        for path, data in files.items():
            path.write_bytes(data)
        list(files)[named[0]].write_bytes(named[1])
        cache = ActivationCache(folder, 3)
        assert [cache.states(row).shape for row in range(len(cache.batch))] == [(3, 4), (2, 4)]

    packed = list(files.values())
    return st.one_of(*[damaged([data]).map(lambda d, n=n: (n, d)) for n, data in enumerate(packed)]), read


ARTIFACTS = (
    Target("manifests", manifests, 15),
    Target("question tables", tables, 5),
    Target("loop checkpoints", loop_checkpoints, 5),
    Target("activation shards", activations, 5),
)
