"""Where the encoded questions live."""

from __future__ import annotations

from pathlib import Path

import pytest

from roma_ray.artifacts import file_digest
from roma_ray.engine import prepare
from roma_ray.engine.setup import resolve
from tests.world import make_world


def test_an_edited_file_is_another_stage_and_one_file_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return file_digest(path)

    monkeypatch.setattr(prepare, "file_digest", counted)
    config = make_world(tmp_path, count=30)
    setup = resolve(config)
    first = prepare.questions_stage(setup)
    assert prepare.questions_stage(setup).fingerprint == first.fingerprint
    assert len(read) == len(config.questions.sources)
    path = config.questions.sources[0].path
    assert path is not None
    lines = Path(path).read_text().splitlines(keepends=True)
    # As long as before.
    Path(path).write_text("".join(reversed(lines)))
    assert prepare.questions_stage(setup).fingerprint != first.fingerprint
