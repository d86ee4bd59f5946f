"""What a sweep keeps of finished work, and finds again: extractions, trials, draws. Without Ray."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from roma_ray.ablations.plan import Planned, describe, make_plan
from roma_ray.ablations.sweep import DONE, FAILED, RUNNING, WAITING, State, _note, drawn, open_sweep, prepare_shared
from roma_ray.ablations.trial import TrialWork, here
from roma_ray.config.schema import Config
from roma_ray.runs.pipeline import Run
from roma_ray.store.artifacts import MANIFEST, file_digest
from tests.cluster.test_sweeps_on_ray import WEIGHTS, space_of

LAYERS = {"layers": {"setting": "routing.layers", "values": ["F2"]}}
DRAWS = {
    "sample": {"routing.layers": {"choice": ["L2", "F2"]}, "finetune.learning_rate": {"log_uniform": [1e-4, 0.1]}},
    "samples": 2,
    "search": "optuna",
}


def train(each: Planned) -> None:
    here(TrialWork(each.trial.id, each.setup, each.stages), lambda record: None)


def test_a_level_added_later_leaves_finished_trials_alone(local_run: Run, world: Config, tmp_path: Path) -> None:
    """Their fingerprints stay, whatever else is extracted; what finished extractions lack is extracted, and no more."""
    storage = tmp_path / "storage"

    def planned(*layers: str, tokens: Sequence[str] = ()) -> dict[str, Planned]:
        factors = {
            "layers": {"setting": "routing.layers", "values": list(layers)},
            "tokens": {"setting": "routing.tokens", "values": list(tokens) or ["Last1"]},
        }
        plan = make_plan(space_of(world, tmp_path, one_at_a_time=factors), "cpu")
        prepare_shared(open_sweep(plan))
        return {each.trial.name: each for each in plan.trials}

    first = planned("F2")
    assert first["centre"].setup.cuts == first["layers=F2"].setup.cuts == (0, 4)
    train(first["centre"])
    # A single run's extraction, here an older one, serves trials too, but none that is finished on another.
    shutil.copytree(Path(world.storage) / "extract", storage / "extract", dirs_exist_ok=True)
    copied = {path.parent.name for path in Path(world.storage).glob(f"extract/*/{MANIFEST}")}
    more = planned("F2", "M1", tokens=["First1"])
    for name, each in first.items():
        assert {k: s.fingerprint for k, s in more[name].stages.items()} == {
            k: s.fingerprint for k, s in each.stages.items()
        }
    assert more["centre"].complete
    assert not more["layers=F2"].complete
    new = {more["layers=M1"].setup.cut, 4}
    assert {more[name].setup.cuts for name in ("layers=M1", "tokens=First1")} == {tuple(sorted(new))}
    assert more["tokens=First1"].setup.token_rules == ("First1", "Last1")
    extractions = {path.parent.name for path in storage.glob(f"extract/*/{MANIFEST}")}
    assert local_run.stages["extract"].fingerprint in copied
    assert extractions == copied | {
        first["centre"].stages["extract"].fingerprint,
        more["layers=M1"].stages["extract"].fingerprint,
    }

    # Where no trial has begun, a single run's results are the sweep's.
    shutil.rmtree(storage)
    shutil.copytree(world.storage, storage)
    centre = planned("F2")["centre"]
    assert centre.complete
    assert centre.stages["evaluate"].path.name == local_run.stages["evaluate"].fingerprint


@pytest.fixture
def storage(world: Config, local_run: Run, tmp_path: Path) -> Path:
    """A copy of one with a finished run."""
    return Path(shutil.copytree(world.storage, tmp_path / "storage"))


def test_what_optuna_may_draw_is_extracted_beside_a_finished_run(world: Config, storage: Path, tmp_path: Path) -> None:
    plan = make_plan(space_of(world, tmp_path, **DRAWS), "cpu")
    assert plan.trials[0].complete
    assert "1 to extract" in describe(plan)[-1]
    prepare_shared(open_sweep(plan))
    far = drawn(plan, {"routing.layers": "F2", "finetune.learning_rate": 0.01})
    assert not far.complete
    train(far)
    assert far.complete
    assert "nothing is left to do, beside what optuna chooses" in describe(make_plan(plan.space, "cpu"))[-1]


def test_a_finished_draw_stays_finished_when_a_run_of_its_layers_ends(
    world: Config, local_run: Run, tmp_path: Path
) -> None:
    space = space_of(world, tmp_path, set={"routing.layers": "M1"}, **DRAWS)
    plan = make_plan(space, "cpu")
    sweep = open_sweep(plan)
    prepare_shared(sweep)
    values = {"routing.layers": "L2", "finetune.learning_rate": 0.01}
    drew = drawn(plan, values)
    train(drew)
    sweep.stage.path.mkdir(parents=True)
    _note(sweep.stage, State(drew, RUNNING, values=values))
    shutil.copytree(world.storage, tmp_path / "storage", dirs_exist_ok=True)
    again = make_plan(space, "cpu")
    assert drawn(again, values).setup.cuts != drew.setup.cuts
    state = open_sweep(again).states[drew.trial.id]
    assert state.state == DONE
    assert state.planned.stages["evaluate"].fingerprint == drew.stages["evaluate"].fingerprint


def test_a_damaged_trial_fails_alone_and_is_done_again_once_removed(
    world: Config, storage: Path, tmp_path: Path
) -> None:
    plan = make_plan(space_of(world, tmp_path, one_at_a_time=LAYERS), "cpu")
    centre, other = plan.trials
    weights = centre.stages["finetune"].path / WEIGHTS
    good, digest = weights.read_bytes(), file_digest(weights)
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    states = open_sweep(plan).states
    assert [states[each.trial.id].state for each in (centre, other)] == [FAILED, WAITING]
    assert str(weights) in states[centre.trial.id].error
    shutil.rmtree(centre.stages["finetune"].path)
    sweep = open_sweep(plan)
    assert sweep.states[centre.trial.id].state == WAITING
    train(centre)
    assert open_sweep(plan).states[centre.trial.id].state == DONE
    assert file_digest(weights) == digest


def test_finished_trials_outlive_their_extraction(world: Config, local_run: Run, tmp_path: Path) -> None:
    plan = make_plan(space_of(world, tmp_path, one_at_a_time=LAYERS), "cpu")
    prepare_shared(open_sweep(plan))
    centre = plan.trials[0]
    train(centre)
    shutil.rmtree(tmp_path / "storage" / "extract")
    more = {"layers": {"setting": "routing.layers", "values": ["F2", "M1"]}}
    again = make_plan(space_of(world, tmp_path, one_at_a_time=more), "cpu").trials
    assert [each.complete for each in again] == [True, False, False]
    assert again[0].stages["evaluate"].fingerprint == centre.stages["evaluate"].fingerprint
