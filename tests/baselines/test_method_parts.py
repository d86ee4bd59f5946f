"""Work at single questions in planned parts: the bits of one process, whoever does which part; labels stay where they belong."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from roma_ray.baselines.bench import HIDDEN, Bench, open_bench
from roma_ray.baselines.contract import NOTHING, Method
from roma_ray.baselines.method_parts import PARTS, all_parts, do_part, given, missing_parts, plan_parts
from roma_ray.baselines.method_registry import METHODS
from roma_ray.baselines.method_runs import MethodsWork, method_stage, read_failure, run_method
from roma_ray.baselines.oracle import optimise
from roma_ray.engine.answers import ANSWERS, Answers
from roma_ray.errors import ArtifactError, TrainingError
from roma_ray.store.artifacts import Stage, file_digest

SHARED = [name for name, method in METHODS.items() if method.works_on]
ANSWERING = [name for name in SHARED if METHODS[name].works_on == "test"]


def small(bench: Bench, tokens: int = 160) -> Bench:
    """The bench with small batches, so that there are several parts."""
    return dataclasses.replace(bench, data=dataclasses.replace(bench.data, batch_tokens=tokens))


def equal(one: Answers, two: Answers) -> None:
    assert (one.rows, one.scores, one.aims) == (two.rows, two.scores, two.aims)
    assert (one.routing_NLE is None) == (two.routing_NLE is None)
    if one.routing_NLE is not None and two.routing_NLE is not None:
        assert one.routing_NLE.dtype == two.routing_NLE.dtype
        np.testing.assert_array_equal(one.routing_NLE, two.routing_NLE)


def test_what_is_shared_out() -> None:
    assert SHARED == ["icl", "c3po", "c3po_kernel", "oracle_tuning", "oracle", "oracle_control"]


@pytest.mark.parametrize("name", ANSWERING)
def test_parts_give_the_answers_of_one_call(name: str, bench: Bench, tmp_path: Path) -> None:
    bench, method, stage = small(bench), METHODS[name], Stage(tmp_path, "baselines", {})
    parts = plan_parts(stage, method, bench)
    assert len(parts) > 2
    assert sorted(row for part in parts for row in part) == bench.rows["test"]
    # The last part first, each by a bench that knows nothing of the others.
    for part in reversed(range(len(parts))):
        do_part(stage, method, dataclasses.replace(bench), 0, part)
    assert missing_parts(stage, len(parts)) == []
    found, seconds = all_parts(stage, method, bench, 0)
    equal(found, method.predict(given(bench, method), NOTHING, bench.rows["test"], 0))
    assert seconds > 0


def test_oracle_tuning_learns_of_parts_what_one_loop_finds(bench: Bench, tmp_path: Path) -> None:
    bench, method, stage = small(bench), METHODS["oracle_tuning"], Stage(tmp_path, "baselines", {})
    expected = torch.zeros_like(bench.data.routing_NLE)
    for batch in bench.batches(bench.rows["train"]):
        aims = [bench.data.prompts[row].answer for row in batch]
        expected[batch] = optimise(bench, batch, aims, bench.config.oracle).routing_QLE
    found, _ = all_parts(stage, method, bench, 0)
    assert len(plan_parts(stage, method, bench)) > 2
    assert torch.equal(method.learned(bench, found)["routing"], expected)
    assert torch.equal(method.prepare(bench, 0)["routing"], expected)


@pytest.mark.parametrize("name", SHARED)
def test_labels_reach_no_part_of_a_method_that_must_not_see_them(
    name: str, letter: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Bench] = []
    work = type(METHODS[name]).work

    def looking(self: Method, bench: Bench, rows: Sequence[int], seed: int) -> Answers:
        seen.append(bench)
        return work(self, bench, rows, seed)

    monkeypatch.setattr(type(METHODS[name]), "work", looking)
    stage = Stage(tmp_path, "baselines", {})
    plan_parts(stage, METHODS[name], letter)
    do_part(stage, METHODS[name], letter, 0, 0)
    (bench,) = seen
    hidden = {bench.data.prompts[row].answer == HIDDEN for row in letter.rows["test"]}
    assert hidden == {name not in ("oracle", "oracle_control")}
    assert HIDDEN not in {bench.data.prompts[row].answer for row in letter.rows["train"]}


def fresh(bench: Bench, name: str, seed: int) -> tuple[Bench, Stage]:
    """The bench with small batches and a seed that no other test uses, and a method's stage with it."""
    config = bench.setup.config.model_copy(update={"seed": seed})
    bench = small(dataclasses.replace(bench, setup=dataclasses.replace(bench.setup, config=config)))
    return bench, method_stage(bench.setup, bench.stages, name, seed)


@pytest.mark.parametrize("name", ["oracle_control", "oracle_tuning"])
def test_a_method_finds_what_others_did_and_does_the_rest(
    name: str, letter: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As workers share it: a plan, some parts, a kill, then the method itself; and its files are those of one process."""
    bench, stage = fresh(letter, name, 11)
    run_method(bench, name, 11)
    known = {file: fact["sha256"] for file, fact in stage.manifest()["files"].items()}
    stage.discard()
    work = MethodsWork(bench.setup, bench.stages, (name,), 1)
    planned = work.plan(bench, 0, 0)
    assert planned.rows > 2
    assert not planned.errors
    assert work.part(bench, 0, 0, 1).rows > 0
    done: list[int] = []
    real = do_part

    def dying(*arguments: Any) -> None:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(arguments[-1])
        real(*arguments)

    monkeypatch.setattr("roma_ray.baselines.method_parts.do_part", dying)
    with pytest.raises(KeyboardInterrupt):
        run_method(bench, name, 11)
    assert done == [0]
    monkeypatch.undo()
    assert work.plan(bench, 0, 0).rows == planned.rows - 2
    assert work.run(bench, 0).errors == 0
    files = {file: fact["sha256"] for file, fact in stage.manifest()["files"].items()}
    # Trials tell how many seconds they took.
    assert files.keys() == known.keys()
    assert files[ANSWERS] == known[ANSWERS]
    assert not (stage.path / PARTS).exists()
    # Complete: nothing is planned any more.
    assert work.plan(bench, 0, 0).rows == 0


def test_a_part_that_fails_is_named(letter: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, stage = fresh(letter, "c3po", 12)
    work = MethodsWork(bench.setup, bench.stages, ("c3po",), 1)
    assert work.plan(bench, 0, 0).rows > 2

    def fails(*_: Any) -> Any:
        raise TrainingError("the loss is not finite")

    with monkeypatch.context() as patch:
        patch.setattr(type(METHODS["c3po"]), "work", fails)
        assert work.part(bench, 0, 0, 0).errors == 1
    failure = read_failure(stage)
    assert failure is not None
    assert failure["text"] == "the loss is not finite"
    assert work.run(bench, 0).errors == 0
    assert read_failure(stage) is None


def test_damaged_parts_are_refused(letter: Bench, tmp_path: Path) -> None:
    bench, method, stage = small(letter), METHODS["oracle"], Stage(tmp_path, "baselines", {})
    all_parts(stage, method, bench, 0)
    first, second = (tmp_path / PARTS / f"{n:06d}.parquet" for n in (0, 1))
    second.write_bytes(first.read_bytes())
    assert file_digest(first) == file_digest(second)
    with pytest.raises(ArtifactError, match="do not hold each question once"):
        all_parts(stage, method, bench, 0)
    (tmp_path / PARTS / "plan.json").write_text("[1]")
    with pytest.raises(ArtifactError, match=r"plan.json cannot be read"):
        all_parts(stage, method, bench, 0)


def test_workers_open_the_bench_for_themselves(letter: Bench, tmp_path: Path) -> None:
    method, stage = METHODS["c3po_kernel"], Stage(tmp_path, "baselines", {})
    count = len(plan_parts(stage, method, letter))
    do_part(stage, method, open_bench(letter.setup, letter.stages), 0, 0)
    found, _ = all_parts(stage, method, letter, 0)
    assert missing_parts(stage, count) == []
    equal(found, method.predict(given(letter, method), NOTHING, letter.rows["test"], 0))


def test_what_is_kept_of_one_bench_is_not_another_ones(letter: Bench) -> None:
    """What was kept may hold answers, or be of other questions."""
    bench = small(letter)
    blind = bench.blinded()
    assert bench.blinded() is blind
    assert [b.once("name", lambda value=n: value) for n, b in enumerate((bench, bench, blind))] == [0, 0, 2]
    other = dataclasses.replace(bench, data=dataclasses.replace(bench.data, prompts=bench.data.prompts[::-1]))
    assert [p.id for p in other.blinded().data.prompts] == [p.id for p in other.data.prompts]
