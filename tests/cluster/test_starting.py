"""What is said while workers start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from roma_ray.cluster import starting as module
from roma_ray.cluster.live import LiveReader, LiveWriter
from roma_ray.cluster.starting import IMPORTS, MODEL, READY, WAITING, Roll, Starting, in_words
from roma_ray.config.schema import Config
from roma_ray.runs.pipeline import STEPS, Run, told
from roma_ray.tracking.run_records import stage_metrics
from tests.cluster.test_worth import Unstarted


def test_a_stage_that_waits_says_for_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 15 s, then more and more seldom, until a worker has done something."""
    assert module._FIRST_SECONDS < 15
    monkeypatch.setattr(module, "_FIRST_SECONDS", 0.01)
    said: list[str] = []
    enough: list[Callable[[], None]] = []

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            enough[0]()

    with Starting("extract", lambda: in_words(Counter(), 2), say) as begun:
        enough.append(begun.over)
        begun._thread.join(60)
    assert len(said) == 2
    assert "extract: starting workers" in said[0]
    assert "2 of 2 wait for a node" in said[0]


def test_how_far_workers_are() -> None:
    assert in_words(Counter([IMPORTS, WAITING, WAITING]), 3) == (
        "1 import their libraries, 2 of 3 wait for a node with room, or for their process to start"
    )
    assert in_words(Counter([MODEL, IMPORTS]), 2) == "1 import their libraries, 1 load the model"
    assert in_words(Counter([MODEL, READY]), 2) == "1 load the model, 1 are at work"


def test_workers_say_on_the_storage_how_far_they_are(tmp_path: Path) -> None:
    first, second = Roll(tmp_path), Roll(tmp_path)
    first.note(IMPORTS)
    second.note(IMPORTS)
    second.note(READY)
    assert Roll(tmp_path).stands(2) == "1 import their libraries, 1 are at work"


def test_how_far_training_is(tmp_path: Path) -> None:
    """Another run's lines do not count; a worker that is up loads the model; the first step ends the start."""
    LiveWriter.note_up(tmp_path, "another")
    reader = LiveReader(tmp_path, "mine", lambda record: None, lambda count, note: None)
    reader.poll()
    assert "wait for nodes" in reader.stands
    LiveWriter.note_up(tmp_path, "mine")
    writer = LiveWriter(tmp_path, "mine", 0)
    reader.poll()
    assert "load the model" in reader.stands
    assert reader.first is None
    writer.last = 0.0
    writer.advance(8, "")
    reader.poll()
    assert reader.first is not None


def test_run_says_where_local_is_faster(world: Config) -> None:
    cluster = Unstarted(world, elsewhere=True)
    cluster.compare("extract", 100.0, 20.0, 90.0)
    assert cluster.said == []
    cluster.compare("embed", 25.0, 20.0, 4.0)
    cluster.compare("finetune", 55.0, 40.0, 8.0)
    (said,) = cluster.said
    assert "embed took 25 s on Ray, 20 s of them until its workers had started" in said
    assert "one process about 4 s" in said
    assert "roma-ray local" in said


def test_a_run_tells_what_its_stages_took_to_start(local_run: Run) -> None:
    """On screen, in the summary and thereby in trackers; a stage that loads nothing has no start."""
    seconds = local_run.summary["starting_seconds"]
    assert set(seconds["extract"]) == set(seconds["embed"]) == {"model", "first_batch"}
    assert set(seconds["finetune"]) == {"model", "first_step"}
    assert seconds["neighbors"] == {}
    (line, *_) = told(STEPS["extract"], local_run.stages["extract"], "done")
    assert " s to start: model " in line
    assert ", first batch " in line
    assert "start" not in told(STEPS["neighbors"], local_run.stages["neighbors"], "done")[0].partition("  ")[0]
    names = {metric.key for metric in stage_metrics(local_run.stages["extract"])}
    assert {"starting/model", "starting/first_batch"} <= names
