"""Neighborhoods on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import TABLE, read_prompts
from roma_ray.engine.setup import resolve
from roma_ray.errors import NeighborError
from roma_ray.figures.report_words import notes
from roma_ray.manifold.neighbors import Neighborhoods
from roma_ray.runs.pipeline import Run, run
from roma_ray.stages import neighborhoods
from roma_ray.stages.neighborhoods import NEIGHBORS, answered_rightly, read_neighborhoods, usable_rows
from roma_ray.store.artifacts import Stage, Store
from tests.making import made, with_settings

FOUND = Neighborhoods(
    offsets=torch.tensor([0, 2, 2, 2, 3]),
    indices=torch.tensor([1, 3, 0]),
    similarities=torch.tensor([0.9, 0.8, 0.7], dtype=torch.float64),
    weights=torch.tensor([0.6, 0.4, 1.0], dtype=torch.float64),
    queried=torch.tensor([True, False, True, True]),
)


def test_what_is_written_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Store(tmp_path).stage("neighbors", {}, {}, 1)
    stage.path.mkdir(parents=True)
    neighborhoods._write(stage, FOUND)
    read = neighborhoods.read_neighborhoods(stage, 4)
    for name in ("offsets", "indices", "similarities", "weights", "queried"):
        assert torch.equal(getattr(read, name), getattr(FOUND, name)), name
    monkeypatch.setattr(neighborhoods, "_MOST_PAIRS", 2)
    with pytest.raises(NeighborError, match="3 pairs of neighbors are more"):
        neighborhoods._write(stage, FOUND)


@pytest.mark.parametrize("method", ["task", "shuffled", "self"])
def test_controls_leave_failed_questions_out(letter_run: Run, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    usual = read_neighborhoods(letter_run.stages["neighbors"], 60)
    correct = answered_rightly(letter_run.setup, letter_run.stages)
    failed = [int((usual.queried & right).nonzero()[0]) for right in (correct, ~correct)]

    def usable(extraction: Stage) -> torch.Tensor:
        mask = usable_rows(extraction)
        mask[failed] = False
        return mask

    monkeypatch.setattr(neighborhoods, "usable_rows", usable)
    stage = made(NEIGHBORS, with_settings(letter_run.setup, "neighbors", method=method, k=2))
    found = read_neighborhoods(stage, 60)
    assert not found.queried[failed].any()
    assert not torch.isin(found.indices, torch.tensor(failed)).any()
    assert found.queried.sum() == usual.queried.sum() - 2
    if method != "task":
        assert found.sizes[found.queried].tolist() == [2 if method == "shuffled" else 1] * int(found.queried.sum())
        return
    tasks = [p.task for p in read_prompts(letter_run.stages["questions"].path / TABLE)]
    successes = (found.queried & correct).nonzero()[:, 0].tolist()
    for row in found.queried.nonzero()[:, 0].tolist():
        able = [other for other in successes if other != row and tasks[other] == tasks[row]]
        own = found.of(row)[0].tolist()
        assert set(own) <= set(able)
        assert len(own) == min(2, len(able))


def test_a_pull_to_the_own_base_routing_is_told_as_what_it_is(letter_run: Run, tmp_path: Path) -> None:
    settings = letter_run.setup.config.model_copy(update={"storage": str(tmp_path)})
    setup = with_settings(dataclasses.replace(letter_run.setup, config=settings), "neighbors", method="self")
    done = run(resolve(setup.config), Silence(), until="evaluate")
    found = read_neighborhoods(done.stages["neighbors"], 60)
    assert torch.equal(found.indices, found.queried.nonzero()[:, 0])
    # It begins at distance 0, of which there is no share.
    assert done.summary["diagnostics"]["manifold_distance"] == {"train": None, "test": None}
    told = " ".join(notes(done.summary, setup.config.finetune.regularizer))
    assert "began as rounding noise" in told
    assert "was idle" not in told
    assert done.summary["epochs"][-1]["manifold_loss"] > 0
