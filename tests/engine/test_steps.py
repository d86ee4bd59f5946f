"""The frame that every stage is made in, on steps that compute nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from roma_ray.engine.progress import Silence
from roma_ray.engine.runners import LOCAL, Runners
from roma_ray.engine.steps import Step, complete, locate, make, order
from roma_ray.engine.work import Job
from roma_ray.errors import ArtifactError
from roma_ray.store.artifacts import Stage, Store, noted_devices, write_text

calls: list[str] = []


@pytest.fixture(autouse=True)
def _forget() -> None:
    calls.clear()


def write(job: Job, runners: Runners, progress: Any) -> dict[str, Any]:
    calls.append(job.name)
    write_text(job.stage.path / "out.txt", " ".join(sorted(job.stages)))
    return {"made_of": len(job.stages)}


def step(name: str, *inputs: Step, **more: Any) -> Step:
    return Step(name, 1, inputs, lambda setup: {"of": name}, write, **more)


FIRST = step("first")
LEFT, RIGHT = step("left", FIRST), step("right", FIRST)
LAST = step("last", LEFT, RIGHT, device="cpu")


@pytest.fixture
def setup(tmp_path: Path) -> Any:
    return SimpleNamespace(store=Store(tmp_path), model=SimpleNamespace(device="cpu"))


def test_the_last_step_holds_the_order_and_every_place(setup: Any) -> None:
    assert [each.name for each in order(LAST)] == ["first", "left", "right", "last"]
    stages = locate(LAST, setup)
    assert list(stages) == ["first", "left", "right", "last"]
    assert stages["last"].identity == {
        "stage": "last",
        "version": 1,
        "settings": {"of": "last"},
        "inputs": {name: stages[name].fingerprint for name in ("left", "right")},
    }
    assert not list(setup.store.root.iterdir()), "locating changes nothing on disk"
    known = setup.store.stage("first", {"another": 1}, {}, 1)
    assert locate(LAST, setup, {"first": known})["left"].identity["inputs"] == {"first": known.fingerprint}


def test_a_walk_fills_what_is_not_complete_and_verifies_the_rest(setup: Any) -> None:
    stages = locate(LAST, setup)
    for again in (4, 0):
        calls.clear()
        for each in order(LAST):
            complete(each, each.job(setup, stages), LOCAL, Silence())
        assert len(calls) == again
    last = stages["last"].manifest()
    assert last["facts"] == {"made_of": 3}
    assert (stages["last"].path / "out.txt").read_text() == "first left right"
    assert noted_devices(stages["last"].path), "of a stage of one process the frame notes the device"
    assert not noted_devices(stages["first"].path)
    (stages["left"].path / "out.txt").write_text("damaged")
    with pytest.raises(ArtifactError, match="is not what was written"):
        complete(LEFT, LEFT.job(setup, stages), LOCAL, Silence())
    assert complete(LEFT, LEFT.job(setup, stages), LOCAL, Silence(), verify=False).complete


def test_what_a_step_does_not_accept_is_not_used(setup: Any) -> None:
    def refuse(job: Job, runners: Runners) -> None:
        raise ArtifactError("too many failures")

    strict = step("first", accept=refuse)
    job = strict.job(setup, {})
    complete(strict, job, LOCAL, Silence())
    with pytest.raises(ArtifactError, match="too many failures"):
        complete(strict, job, LOCAL, Silence())


def test_a_stage_of_one_process_is_called_where_the_device_is(setup: Any) -> None:
    called = []

    def elsewhere(name: str, function: Any, *arguments: Any, progress: Any) -> Any:
        called.append(name)
        return function(*arguments, progress=progress)

    stages = locate(LAST, setup)
    runners = Runners(call=elsewhere)
    for each in order(LAST):
        complete(each, each.job(setup, stages), runners, Silence())
        complete(each, each.job(setup, stages), runners, Silence())
    assert called == ["last"]


def test_other_inputs_are_part_of_the_identity_and_of_the_job(setup: Any) -> None:
    other = setup.store.stage("other", {}, {}, 1)
    with_other = step("last", LEFT, others=lambda setup, stages: {"more": other})
    stages = locate(with_other, setup)
    assert stages["last"].identity["inputs"]["more"] == other.fingerprint
    assert with_other.job(setup, stages).stages["more"] is other


def test_no_facts_leave_a_stage_unfinished_and_a_faster_process_is_believed(
    setup: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = setup.store.stage("sweep", {}, {}, 1)
    assert not make(stage, lambda: None).complete
    make(stage, lambda: {"n": 1})
    assert stage.manifest()["facts"] == {"n": 1}
    # Between the look at the manifest and the lock another process has finished it.
    monkeypatch.setattr(Stage, "reusable", property(lambda stage: False))
    make(stage, lambda: {"n": 2})
    assert stage.manifest()["facts"] == {"n": 1}
