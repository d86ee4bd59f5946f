"""Who is judged is resolved as training resolves it: one rule, one commit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from roma_ray.benchmarks.judged_model import resolve_subject
from roma_ray.config.loading import parse_config
from roma_ray.engine import setup as resolution
from roma_ray.engine.model_spec import model_facts_of
from roma_ray.engine.setup import resolve
from roma_ray.moe import snapshot
from tests.tiny import save_tiny, tiny_moe

COMMITS = ("1" * 40, "2" * 40)


@pytest.fixture
def branch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub whose branch `main` points at the last commit of the list that is returned."""
    save_tiny(tiny_moe("olmoe"), tmp_path / "repository")
    head = [COMMITS[0]]

    def download(repo: str, name: str, *, revision: str | None = None) -> str:
        cache = tmp_path / "cache" / "snapshots" / (revision if revision in COMMITS else head[-1])
        cache.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tmp_path / "repository" / name, cache / name)
        return str(cache / name)

    monkeypatch.setattr(snapshot, "hf_hub_download", download)
    return head


def test_a_hub_model_is_judged_at_the_commit_that_its_branch_points_to(tmp_path: Path, branch: list[str]) -> None:
    config = parse_config(
        {
            "storage": str(tmp_path / "storage"),
            "device": "cpu",
            "model": {"path": "lab/moving"},
            "questions": {"sources": [{"path": "q.jsonl"}]},
        }
    )
    found = []
    for commit in COMMITS:
        branch.append(commit)
        # Another process, later.
        resolution._stored.cache_clear()
        model_facts_of.cache_clear()
        subject, trained = resolve_subject(config, adapter=None), resolve(config)
        assert subject.model == trained.model
        assert subject.model_identity == trained.model_identity
        assert subject.model.revision == commit
        found.append(subject.identity())
    assert found[0] != found[1], "answers of the older commit would be reused"
