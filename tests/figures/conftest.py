"""One small finished run, shared by the tests of figures and report."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from roma_ray.engine.progress import Silence
from roma_ray.engine.setup import resolve
from roma_ray.runs.pipeline import Run, run
from tests.world import WORDS, make_world

HOSTILE = '<script>alert("x")</script>|`$\\_{}`*'


def add_questions(path: Path, task: str, count: int) -> None:
    rng = random.Random(5)
    with open(path, "a") as stream:
        for number in range(count):
            choices = rng.sample(WORDS, 3)
            row = {
                "id": f"h{number}",
                "task": task,
                "question": f"Say {choices[0]} {number}",
                "choices": choices,
                "answer": 0,
            }
            stream.write(json.dumps({**row, "split": "test" if number % 2 else "train"}) + "\n")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run to its end, one of whose tasks has a name made to break pages, tables and figures."""
    root = tmp_path_factory.mktemp("reported")
    config = make_world(root, name="first & <b>last</b>")
    add_questions(root / "questions.jsonl", HOSTILE, 16)
    return run(resolve(config), Silence(), until="report")
