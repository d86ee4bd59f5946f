"""Two finished tiny runs up to the neighborhoods, and a bench on each: single-token letters, and choices of several tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from roma_ray.baselines.bench import Bench, open_bench
from roma_ray.engine.progress import Silence
from roma_ray.engine.setup import Setup, resolve
from roma_ray.runs.pipeline import run
from tests.world import make_world

BASELINES = {
    "seeds": 1,
    "learning_rates": [0.003, 0.03],
    "micro_batch_size": 4,
    "shots": 2,
    "virtual_tokens": 3,
    "oracle": {"steps": 4},
    "c3po": {"steps": 2, "neighbors": 2},
}


def lengthen_choices(path: Path) -> None:
    """Give each choice a second and some a third word, so that continuations have several tokens."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["choices"] = [f"{c} {'east west' if n else 'north'}" for n, c in enumerate(row["choices"])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepared(root: Path, family: str = "olmoe", **sections: Any) -> tuple[Setup, dict[str, Any]]:
    """A tiny world run up to its neighborhoods."""
    config = make_world(root, family, count=60, baselines=BASELINES, finetune={"epochs": 1}, **sections)
    if "questions" in sections:
        lengthen_choices(root / "questions.jsonl")
    setup = resolve(config, device="cpu")
    return setup, dict(run(setup, Silence(), until="neighbors").stages)


@pytest.fixture(scope="session")
def letter(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return open_bench(*prepared(tmp_path_factory.mktemp("letter-bench")))


@pytest.fixture(scope="session")
def cloze(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("cloze-bench")
    questions = {"sources": [{"path": str(root / "questions.jsonl")}], "prompt": {"format": "cloze"}}
    return open_bench(*prepared(root, questions=questions))


@pytest.fixture(params=["letter", "cloze"])
def bench(request: pytest.FixtureRequest) -> Bench:
    found: Bench = request.getfixturevalue(request.param)
    return found
