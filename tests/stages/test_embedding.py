"""The embedding stage's progress."""

from __future__ import annotations

from pathlib import Path

import pytest

from roma_ray.engine.question_table import TABLE, read_table
from roma_ray.engine.setup import resolve
from roma_ray.stages import embedding
from roma_ray.stages.embedding import EMBED, VECTORS, embedding_texts, read_embeddings
from roma_ray.stages.preparation import QUESTIONS
from roma_ray.store import row_order, tables
from roma_ray.store.files import file_digest
from tests.making import made
from tests.progress import Told
from tests.world import make_world


def test_progress_counts_characters_for_the_longest_texts_run_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_ENCODER_BATCHES", 1)
    config = make_world(tmp_path, count=20)
    small = config.embedding.model_copy(update={"batch_size": 8})
    setup = resolve(config.model_copy(update={"embedding": small}))
    questions, told = made(QUESTIONS, setup), Told()
    made(EMBED, setup, progress=told)
    sizes = sorted(map(len, embedding_texts(questions, context=False)), reverse=True)
    assert told.meters["embed"] == (sum(sizes), "characters", 0)
    assert told.counted == [sum(sizes[:8]), sum(sizes[8:16]), sum(sizes[16:])]


@pytest.mark.parametrize("held", [2**28, 100])
def test_texts_are_made_when_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    monkeypatch.setattr(tables, "HELD_BYTES", held)
    questions = made(QUESTIONS, resolve(make_world(tmp_path, count=20)))
    rows = read_table(questions.path / TABLE).to_pylist()
    expected = ["\n".join([row["question"], *row["choices"]]) for row in rows]
    texts = embedding_texts(questions, context=False)
    assert len(texts) == len(expected)
    assert list(texts) == [texts[n] for n in range(len(texts))] == texts[:] == expected
    assert (texts[-1], texts[3:5]) == (expected[-1], expected[3:5])
    with pytest.raises(IndexError):
        texts[len(expected)]


def test_vectors_are_gathered_block_by_block_into_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_ENCODER_BATCHES", 1)
    config = make_world(tmp_path, count=20)
    small = config.embedding.model_copy(update={"batch_size": 8})
    setup = resolve(config.model_copy(update={"embedding": small}))
    made(QUESTIONS, setup)
    stage = made(EMBED, setup)
    whole, rows = file_digest(stage.path / VECTORS), len(read_embeddings(stage))
    monkeypatch.setattr(row_order, "BLOCK_ROWS", 7)
    assert embedding._gather(stage, 3, rows) == read_embeddings(stage).shape[1]
    assert file_digest(stage.path / VECTORS) == whole
