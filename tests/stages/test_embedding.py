"""The embedding stage's progress."""

from __future__ import annotations

from pathlib import Path

import pytest

from roma_ray.engine.setup import resolve
from roma_ray.stages import embedding
from roma_ray.stages.embedding import EMBED, embedding_texts
from roma_ray.stages.preparation import QUESTIONS
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
