"""`roma-ray explain`: what is complete, what differs from the most alike in the storage, and what a run would cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from roma_ray.cli.commands import main
from roma_ray.engine.progress import Silence
from roma_ray.engine.setup import Setup, resolve
from roma_ray.runs import explaining
from roma_ray.runs.explaining import (
    ABSENT,
    BEGUN,
    BESIDE,
    COMPLETE,
    DAMAGED,
    RELEASED,
    StageReport,
    described,
    differences,
    explain,
)
from roma_ray.runs.pipeline import STEPS, Run, run
from roma_ray.store.artifacts import MANIFEST
from tests.making import with_settings
from tests.world import make_world


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = make_world(tmp_path_factory.mktemp("explain"), count=30)
    return run(resolve(config.model_copy(update={"name": "a run"})), Silence(), until="report")


@pytest.fixture
def copied(finished: Run, tmp_path: Path) -> Setup:
    """The same run in a storage that a test may harm."""
    shutil.copytree(finished.setup.store.root, tmp_path / "storage")
    return resolve(finished.setup.config.model_copy(update={"storage": str(tmp_path / "storage")}))


def states(told: list[StageReport]) -> dict[str, str]:
    return {one.stage.name: one.state for one in told}


def text(told: list[StageReport]) -> str:
    """The lines as one, however they are wrapped."""
    return " ".join(" ".join(described(told)).split())


def test_of_an_empty_storage_nothing_is_known(finished: Run, tmp_path: Path) -> None:
    setup = resolve(finished.setup.config.model_copy(update={"storage": str(tmp_path)}))
    told = explain(setup)
    assert states(told) == dict.fromkeys(STEPS, ABSENT)
    assert all(one.nearest is None and one.seconds is None for one in told)
    assert "not known: questions, extract, embed, neighbors, finetune, evaluate, report" in text(told)
    assert list(tmp_path.iterdir()) == [], "asking leaves nothing behind"


def test_a_finished_run_is_all_complete(finished: Run) -> None:
    told = explain(finished.setup)
    assert states(told) == dict.fromkeys(STEPS, COMPLETE)
    assert described(told)[-1] == "all complete: a run does nothing again"


def test_the_training_beside_it_is_told_too(finished: Run) -> None:
    told = explain(with_settings(finished.setup, "evaluation", task_loss_alone=True))
    beside = [one for one in told if one.note.startswith(BESIDE)]
    assert [(one.stage.name, one.state) for one in beside] == [("finetune", ABSENT), ("evaluate", ABSENT)]
    assert told[-1].stage.name == "report"
    assert f"a run does 2 of {len(STEPS) + 2} stages" in text(told)


def test_a_setting_is_named_where_it_acts_and_the_stages_after_by_their_inputs(finished: Run) -> None:
    there = finished.setup.config.neighbors.k
    told = {one.stage.name: one for one in explain(with_settings(finished.setup, "neighbors", k=there + 4))}
    assert [name for name, one in told.items() if one.state == COMPLETE] == ["questions", "extract", "embed"]
    near = told["neighbors"]
    assert near.differences == (f"neighbors.k: {there + 4} (there {there})",)
    assert near.nearest == finished.stages["neighbors"].fingerprint
    manifest = finished.stages["neighbors"].manifest()
    assert (near.seconds, near.bytes) == (manifest["seconds"], sum(f["bytes"] for f in manifest["files"].values()))
    assert told["finetune"].differences == ("made of another neighbors",)
    assert told["evaluate"].differences == ("made of another finetune",)


def test_the_nearest_is_the_one_that_differs_least(copied: Setup) -> None:
    nearer = with_settings(copied, "finetune", learning_rate=0.5)
    run(nearer, Silence(), until="finetune")
    asked = with_settings(nearer, "finetune", learning_rate=0.5, batch_size=5)
    told = {one.stage.name: one for one in explain(asked)}["finetune"]
    assert told.nearest == {one.stage.name: one for one in explain(nearer)}["finetune"].stage.fingerprint
    assert told.differences == (f"finetune.batch_size: 5 (there {copied.config.finetune.batch_size})",)


def test_an_edited_file_is_named(copied: Setup, tmp_path: Path) -> None:
    (source,) = copied.config.questions.sources
    lines = Path(str(source.path)).read_text().splitlines(keepends=True)
    (tmp_path / "edited").mkdir()
    edited = tmp_path / "edited" / Path(str(source.path)).name
    edited.write_text("".join(lines[:-1]))
    changed = with_settings(copied, "questions", sources=(source.model_copy(update={"path": str(edited)}),))
    told = {one.stage.name: one for one in explain(changed)}
    assert told["questions"].differences == (f"questions.sources.0.path: the content of {edited.name} is another",)
    assert told["extract"].differences == ("made of another questions",)


def test_a_raised_version_is_named(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    step = STEPS["finetune"]
    object.__setattr__(step, "version", step.version + 1)
    try:
        told = {one.stage.name: one for one in explain(finished.setup)}
    finally:
        object.__setattr__(step, "version", step.version - 1)
    assert told["finetune"].differences == (f"version {step.version + 1} of this stage (there {step.version})",)
    assert told["neighbors"].state == COMPLETE


def test_a_damaged_manifest_stops_a_run_and_is_nobodys_nearest(copied: Setup) -> None:
    stage = explain(copied)[3].stage
    (stage.path / MANIFEST).write_text((stage.path / MANIFEST).read_text().replace("seconds", "secunds"))
    told = explain(copied)
    assert states(told) == {**dict.fromkeys(STEPS, COMPLETE), "neighbors": DAMAGED}
    assert "is not what was written" in told[3].note
    assert described(told)[-1] == "damaged: neighbors; a run stops there until its folder is removed"
    other = explain(with_settings(copied, "neighbors", k=9))[3]
    assert (other.state, other.nearest) == (ABSENT, None)


def test_a_begun_stage_and_a_removed_cache_are_told(copied: Setup) -> None:
    told = explain(copied)
    extraction, tuned = told[1].stage, told[4].stage
    size = sum(fact["bytes"] for fact in extraction.manifest()["files"].values())
    extraction.release([name for name in extraction.manifest()["files"] if name.endswith(".safetensors")])
    assert explain(copied)[1].state == COMPLETE, "nobody reads the cache"
    (tuned.path / MANIFEST).unlink()
    told = explain(copied)
    assert (told[1].state, told[4].state) == (RELEASED, BEGUN)
    assert told[1].bytes == size
    assert text(told).endswith("as the nearest ones took (not known: finetune)")


def test_the_lines_fit_and_hold_no_markup(finished: Run) -> None:
    stage = finished.stages["questions"]
    there = json.loads(json.dumps(stage.identity))
    there["settings"]["prompt"]["format"] = "[red]\x1b[31m" + "long " * 60
    (difference,) = differences(there, stage.identity, "questions")
    lines = described([StageReport(stage, ABSENT, "0" * 16, (difference,), 3.0, 4_000_000)])
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in "".join(lines)
    assert "[red]" in "".join(lines)
    assert "again: about 3 s and 4.0 MB" in lines[-2]


def test_the_command_explains_a_run_of_the_storage_by_name(finished: Run) -> None:
    storage = str(finished.setup.store.root)
    asked = CliRunner().invoke(main, ["explain", "a run", "--storage", storage, "--set", "neighbors.k=2"])
    assert asked.exit_code == 0, asked.output
    assert "neighbors.k: 2 (there" in asked.output
    assert "finetune" in asked.output
    both = CliRunner().invoke(main, ["explain", "a run", "--config", "x.yaml", "--storage", storage])
    assert both.exit_code == 2


def test_names_are_those_of_configurations() -> None:
    assert explaining.name_of("k", "neighbors") == "neighbors.k"
    assert explaining.name_of("batch_tokens", "extract") == "extraction.batch_tokens"
    assert explaining.name_of("seed", "finetune") == "seed"
    assert explaining.name_of("prompt.max_tokens", "questions") == "questions.prompt.max_tokens"
    assert explaining.name_of("regularizer.weight", "finetune") == "finetune.regularizer.weight"
