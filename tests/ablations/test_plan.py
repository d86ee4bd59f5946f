"""What trials share: one extraction for all cuts and token rules, and the price of the rest."""

from __future__ import annotations

import shutil
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from roma_ray.ablations.plan import Plan, cost, count_questions, describe, make_plan
from roma_ray.ablations.space import load_space
from roma_ray.ablations.sweep import FAILED, open_sweep, prepare_shared
from roma_ray.ablations.sweep_command import dry_run
from roma_ray.engine import hub
from roma_ray.engine.question_table import TABLE
from roma_ray.errors import ConfigError
from roma_ray.store.artifacts import write_text
from tests.tiny import save_tiny, tiny_moe
from tests.world import make_questions

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model with OLMoE's sixteen layers, tiny ones, and some questions."""
    root = tmp_path_factory.mktemp("plan")
    save_tiny(tiny_moe("olmoe", num_hidden_layers=16), root / "model")
    make_questions(root / "questions.jsonl", 12)
    return {
        "storage": str(root / "storage"),
        "device": "cpu",
        "model": {"path": str(root / "model")},
        "questions": {"sources": [{"path": str(root / "questions.jsonl")}]},
        "embedding": {"model": "no-such-model"},
    }


def planned(base: dict[str, Any], tmp_path: Path, **content: Any) -> Plan:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump({"base": base, **content}, sort_keys=False))
    return make_plan(load_space(path))


def test_the_paper_s_ablations_share_one_extraction(base: dict[str, Any], tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "configs" / "ablations.yaml").read_text())
    plan = planned({**base, "routing": {"layers": "L5"}}, tmp_path, one_at_a_time=content["one_at_a_time"])
    assert len(plan.trials) == 35
    assert {planned.setup.cut for planned in plan.trials} == {0, 5, 7, 11, 14, 15}
    counts = {name: len(plan.stages(name)) for name in ("questions", "extract", "embed", "neighbors", "evaluate")}
    # Neighborhoods: three radii, random, k = 1, 3, 5, and the four smaller training sets.
    assert counts == {"questions": 1, "extract": 1, "embed": 1, "neighbors": 11, "evaluate": 35}
    setup = plan.trials[0].setup
    assert setup.cuts == (0, 5, 7, 11, 14, 15)
    assert set(setup.token_rules) == {"First1", "Middle1", "Last1", "First3", "Middle3", "Last3"}
    text = "\n".join(describe(plan))
    assert "35 trials" in text
    assert "cuts: 0, 5, 7, 11, 14, 15 of 16 layers" in text
    assert "extract 1 (0 complete)" in text


def test_cost_counts_heads_and_fractions(base: dict[str, Any], tmp_path: Path) -> None:
    """Against the formula by hand: 3 passes a training question and epoch, a validation an epoch, the test questions once.

    Four of the file's twelve rows are declared as test: of the other eight one is held out for validation.
    """
    settings = {"set": {"routing.layers": "L4", "finetune.epochs": 2}}
    plan = planned(base, tmp_path, **settings)
    found = cost(plan, count_questions(plan))
    assert found.extraction == 1
    assert found.trials == pytest.approx(4 / 16 * (2 * (3 * 7 / 12 + 1 / 12) + 4 / 12))
    assert found.seconds is None
    assert "questions of questions.jsonl: 7 train, 1 validation, 4 test" in describe(plan)
    plan = planned(base, tmp_path, set={**settings["set"], "questions.fraction": 0.5})
    half = cost(plan, count_questions(plan))
    assert half.trials == pytest.approx(4 / 16 * (2 * (3 * 3.5 / 12 + 1 / 12) + 4 / 12))


def test_splits_of_the_hub_s_data_sets_are_said_to_be_unknown(base: dict[str, Any], tmp_path: Path) -> None:
    plan = planned({**base, "questions": {"sources": [{"dataset": "sciq"}]}}, tmp_path, set={"routing.layers": "L4"})
    known = count_questions(plan)
    assert set(known.values()) == {None}
    assert cost(plan, known).trials == pytest.approx(4 / 16 * (3 * (3 * 0.7 + 0.1) + 0.2))
    assert "splits that data sets of the hub declare" in describe(plan)[-1]


def test_other_words_for_the_same_layers_are_one_trial(base: dict[str, Any], tmp_path: Path) -> None:
    one = {"layers": {"levels": {"L2": {"routing.layers": "L2"}, "14, 15": {"routing.layers": [14, 15]}}}}
    plan = planned(base, tmp_path, one_at_a_time=one)
    assert len(plan.trials) == 2
    assert plan.trials[1].trial.factors == (("layers", "L2"), ("layers", "14, 15"))
    assert "1 more are the same" in describe(plan)[0]


def test_what_optuna_may_draw_is_extracted_beforehand(base: dict[str, Any], tmp_path: Path) -> None:
    sample = {"routing.layers": {"choice": ["L1", "L3"]}, "finetune.learning_rate": {"log_uniform": [1e-5, 1e-2]}}
    plan = planned(base, tmp_path, sample=sample, samples=3, search="optuna", set={"routing.layers": "L2"})
    assert len(plan.trials) == 1
    assert plan.trials[0].setup.cuts == (13, 14, 15)
    with pytest.raises(ConfigError, match="decides what is extracted"):
        planned(base, tmp_path, sample={"questions.test_fraction": {"uniform": [0.1, 0.3]}}, samples=3, search="optuna")


def test_a_dry_run_without_the_model_checks_what_it_can(base: dict[str, Any], tmp_path: Path) -> None:
    """Names always; layers where the model's config.json is here, though its weights are not."""

    def dry(model: Path, *layers: str | list[int]) -> list[str]:
        one = {"layers": {"setting": "routing.layers", "values": list(layers)}}
        path = tmp_path / "space.yaml"
        path.write_text(yaml.safe_dump({"base": {**base, "model": {"path": str(model)}}, "one_at_a_time": one}))
        return dry_run(load_space(path))

    absent, bare = tmp_path / "absent", tmp_path / "bare"
    bare.mkdir()
    shutil.copy(Path(base["model"]["path"]) / "config.json", bare)
    assert "only their names were checked" in dry(absent, "F2", "F20", [14, 15])[-1]
    for wrong in ("X5", "F2F3", [3, 3], [-1]):
        with pytest.raises(ConfigError, match="layers"):
            dry(absent, wrong)
    assert "not known without the model:" in dry(bare, "F2", [14, 15])[-1]
    for wrong in ("F20", "F9L9", [3, 16]):
        with pytest.raises(ConfigError, match=r"layers=.*(MoE layers)"):
            dry(bare, "F2", wrong)


def test_layers_that_the_model_lacks_are_told_with_their_trial(base: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"layers=F20: .*16 MoE layers"):
        planned(base, tmp_path, one_at_a_time={"layers": {"setting": "routing.layers", "values": ["F20"]}})


def test_a_dry_run_does_not_wait_for_a_hub_that_is_away(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What needs no model is told at once and without the hub client's own tries; an answer of any kind is one to go on with."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    space = load_space(ROOT / "configs" / "ablations.yaml", [f"storage={tmp_path}"])
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        thread = Thread(target=server.handle_request)
        thread.start()
        hub.check_model("nobody/nothing")
        thread.join()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delattr("roma_ray.ablations.sweep_command.make_plan")
    told = dry_run(space)
    assert told[0].startswith("ablations: 35 trials")
    assert "not known without the model: allenai/OLMoE" in told[2]
    assert "does not answer" in told[2]
    assert "Retrying" not in "".join(capfd.readouterr())


def test_damaged_work_of_an_earlier_run_is_refused(base: dict[str, Any], tmp_path: Path) -> None:
    """Trials read what they share without looking again, so the sweep looks once: the trials on it fail, by name."""
    base = {**base, "storage": str(tmp_path / "storage")}
    plan = planned(base, tmp_path, one_at_a_time={"rate": {"setting": "finetune.learning_rate", "values": [0.1]}})
    stage = plan.trials[0].stages["questions"]
    damaged = stage.path / TABLE
    write_text(damaged, "what the stage wrote")
    stage.finish(facts={}, seconds=0.0)
    damaged.write_text("what the stage wrotf")
    sweep = open_sweep(plan)
    prepare_shared(sweep)
    assert [state.state for state in sweep.states.values()] == [FAILED, FAILED]
    assert all(f"{damaged} is not what was written" in str(state.error) for state in sweep.states.values())
