"""Where the encoded questions live."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from roma_ray.config.schema import QuestionSource
from roma_ray.engine.question_table import TABLE, read_prompts
from roma_ray.engine.setup import resolve
from roma_ray.questions import readers
from roma_ray.questions.counts import describe_sources
from roma_ray.stages import preparation
from roma_ray.store.artifacts import file_digest
from tests.making import made
from tests.world import make_world


def test_an_edited_file_is_another_stage_and_one_file_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return file_digest(path)

    monkeypatch.setattr(readers, "file_digest", counted)
    config = make_world(tmp_path, count=30)
    setup = resolve(config)
    first = preparation.QUESTIONS.at(setup, {})
    assert preparation.QUESTIONS.at(setup, {}).fingerprint == first.fingerprint
    assert len(read) == len(config.questions.sources)
    path = config.questions.sources[0].path
    assert path is not None
    lines = Path(path).read_text().splitlines(keepends=True)
    # As long as before.
    Path(path).write_text("".join(reversed(lines)))
    assert preparation.QUESTIONS.at(setup, {}).fingerprint != first.fingerprint


def test_what_each_source_gives_is_counted_and_told(tmp_path: Path) -> None:
    """Rows that are all declared as validation train nothing: said before any work, with the remedy."""
    config = make_world(tmp_path, count=30)
    rows = Path(str(config.questions.sources[0].path)).read_text().splitlines()
    declared = [{**json.loads(row), "id": f"v{n}", "task": "held", "split": "validation"} for n, row in enumerate(rows)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in declared))
    sources = (*config.questions.sources, QuestionSource(path=str(tmp_path / "held.jsonl")))
    setup = resolve(config.model_copy(update={"questions": config.questions.model_copy(update={"sources": sources})}))
    expected = preparation.expected_sources(setup)
    stage = made(preparation.QUESTIONS, setup)
    assert preparation.sources_of(stage) == expected
    assert expected is not None
    splits = Counter(prompt.split for prompt in read_prompts(stage.path / TABLE))
    for part in ("train", "validation", "test"):
        assert sum(getattr(count, part) for count in expected) == splits[part]
    lines = describe_sources(expected)
    assert lines[1] == "questions of held.jsonl: 0 train, 30 validation, 0 test"
    assert len(lines) == 3
    assert "nothing of held.jsonl is trained on" in lines[2]
    assert "set `split: train` on the source" in lines[2]
