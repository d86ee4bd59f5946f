"""The map "when does it help?": its space file, the worlds that it varies, and what its page says of given answers."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from roma_ray.ablations.space import Space, load_space
from roma_ray.baselines.dense_backprop import DenseBackprop
from roma_ray.config.loading import load_config
from roma_ray.config.schema import Config
from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import read_table
from roma_ray.engine.setup import resolve
from roma_ray.errors import UnmovedError
from roma_ray.evaluation.equivalence import findings
from roma_ray.evaluation.results_file import RESULTS
from roma_ray.evaluation.statistics import pair
from roma_ray.runs.pipeline import locate
from tests.baselines.conftest import BASELINES
from tests.world import make_world

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "jobs"))

import map_planted_worlds as planted_map  # noqa: E402
from map_planted_worlds import DENSE, MARGIN, ROMA, TASK, Answered  # noqa: E402
from planted_world import variants  # noqa: E402


@pytest.fixture(scope="module")
def space() -> Space:
    return load_space(ROOT / "configs" / "map.yaml")


def test_every_level_is_a_trial_of_its_own(space: Space) -> None:
    names = [planted_map.level_name(trial) for trial in space.trials]
    levels = sum(len(list(factor.changes())) for factor in space.file.one_at_a_time.values())
    assert len(set(names)) == len(names) == 1 + levels
    assert names[0] == "centre"
    assert not [name for name in names if name.count(":") > 1], "two levels are one trial"


def test_the_centre_is_the_embedded_default_s_configuration(space: Space) -> None:
    default, centre = load_config().model_dump(mode="json"), space.centre.model_dump(mode="json")
    differing = {section for section in default if default[section] != centre[section]}
    assert differing == {"name", "model", "questions", "finetune", "evaluation"}
    assert default["finetune"] | {"micro_batch_size": 32} == centre["finetune"]
    sources = centre["questions"]["sources"]
    assert default["questions"] | {"seed": 0, "sources": sources} == centre["questions"]
    assert default["model"] | {"path": "planted/model"} == centre["model"]


def test_every_folder_of_the_space_is_made(space: Space) -> None:
    models = {str(Path(trial.config.model.path or "").parent) for trial in space.trials}
    assert models == set(variants.MODELS)
    sources = {Path(source.path or "").parts[0] for t in space.trials for source in t.config.questions.sources}
    assert sources == {variants.WORLD, *variants.CHOICES}
    tests = {str(trial.config.questions.sources[1].path) for trial in space.trials}
    assert len(tests) == 1, "every level is judged on the same test questions"


def test_what_the_issue_names_is_varied(space: Space) -> None:
    varied = {setting for trial in space.trials for setting in trial.settings}
    assert varied >= {
        *("questions.fraction", "neighbors.k", "routing.tokens", "routing.layers", "model.path"),
        *("finetune.regularizer.gradient_ratio", "finetune.regularizer.distance", "questions.sources"),
    }


def test_paths_are_a_world_s_own(space: Space, tmp_path: Path) -> None:
    trial = next(trial for trial in space.trials if trial.name.startswith("choices"))
    config = planted_map.placed(trial.config, tmp_path / "seed-7", tmp_path / "storage")
    assert config.model.path == str(tmp_path / "seed-7" / "planted" / "model")
    assert config.questions.sources[0].path == str(tmp_path / "seed-7" / "planted-choices-2" / "train.jsonl")
    assert config.storage == str(tmp_path / "storage")
    assert config.finetune == trial.config.finetune


def test_what_does_not_act_without_the_term_is_not_varied(space: Space) -> None:
    left = {
        planted_map.level_name(trial)
        for trial in space.trials
        if planted_map.without_term(trial.config, space.centre) != space.centre
    }
    assert {name.partition(":")[0] for name in left} == {
        *("labels", "layers", "length of the gates", "experts a token", "choices")
    }


ROW = {"id": "pet-train-0", "task": "pet", "question": "?", "choices": ["goat", "dog", "cat", "camel"], "answer": "B"}


@pytest.mark.parametrize(("count", "choices"), [(2, ["goat", "dog"]), (3, ["goat", "dog", "cat"]), (4, ROW["choices"])])
def test_choices_are_left_out(count: int, choices: list[str]) -> None:
    assert variants.with_choices(ROW, count) == {**ROW, "choices": choices}
    assert ROW["choices"] == ["goat", "dog", "cat", "camel"]


def test_a_right_answer_keeps_its_letter_s_meaning() -> None:
    found = variants.with_choices({**ROW, "answer": "D"}, 2)
    assert (found["choices"], found["answer"]) == (["goat", "camel"], "B")


def answers(lost: int, won: int) -> Answered:
    """A world of 3,000 questions of which RoMA loses and wins so many that lambda = 0 answers rightly, or not."""
    before = np.arange(3000) % 2 == 0
    after = before.copy()
    after[np.flatnonzero(before)[:lost]] = False
    after[np.flatnonzero(~before)[:won]] = True
    facts = {"sure": 0.25, f"sure, {ROMA}": 0.5, "successes": 0.6, "lambda": 4.5}
    return Answered(before, dict.fromkeys((TASK, DENSE), before) | {ROMA: after}, {}, facts)


CHANGES = {"adds": (60, 180), "harms": (180, 60), "equals": (30, 30), "not resolved": (130, 150)}


def test_the_page_says_where_it_adds_equals_harms() -> None:
    levels = {kind: [answers(*changes), answers(*changes)] for kind, changes in CHANGES.items()}
    lines = planted_map.page(levels, MARGIN)
    rows = {kind: next(line for line in lines if line.startswith(f"| {kind} |")) for kind in CHANGES}
    assert rows["adds"].endswith("| adds |")
    assert rows["harms"].endswith("| harms |")
    assert rows["equals"].endswith("| equals it within 1.5 points |")
    assert "questions would" in rows["not resolved"]
    for kind in CHANGES:
        assert f"- {kind}: {kind}" in lines
    worlds = levels["adds"]
    gain = pair(np.concatenate([w.base for w in worlds]), np.concatenate([w.right[ROMA] for w in worlds]))
    assert f"| +{100 * gain.difference:.1f} ± {100 * gain.difference_stderr:.1f} |" in rows["adds"]


def test_what_was_not_trained_is_told() -> None:
    world = answers(60, 180)
    world = Answered(world.base, world.right, {TASK: "no gradient but noise"}, world.facts)
    lines = planted_map.page({"one": [world]}, MARGIN)
    assert "| one | " in lines[2]
    assert "| not trained | " in lines[2]
    assert lines[2].endswith("| adds (the task loss trains nothing) |")
    assert lines[-1] == "- one, lambda = 0: not trained. no gradient but noise"
    assert "| one | 60 | 4.5 | 0.25 |  | 0.50 |" in lines


def test_a_small_difference_is_said_to_be_small() -> None:
    before = np.random.default_rng(0).random(60_000) < 0.5
    after = before.copy()
    after[np.flatnonzero(~before)[:300]] = True
    found = findings({0: pair(before, after)}, MARGIN)[0]
    assert planted_map.words(found) == "adds, by less than 1.5 points"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A tiny model and few questions."""
    config = make_world(tmp_path_factory.mktemp("tiny"), baselines=BASELINES)
    finetune = config.finetune.model_copy(update={"epochs": 1, "learning_rate": 0.01})
    return config.model_copy(update={"finetune": finetune})


def test_every_arm_of_a_level_answers_the_same_questions(few: Config) -> None:
    world = planted_map.answer(few, few, Silence())
    assert set(world.right) == {ROMA, TASK, DENSE, *planted_map.CONTROLS}
    assert not world.untrained
    assert {len(right) for right in world.right.values()} == {len(world.base)} == {20}
    stages = locate(resolve(few))
    rows = read_table(stages["evaluate"].path / RESULTS, ["tuned_routing"]).to_pydict()["tuned_routing"]
    experts = len(rows[0]) // len(resolve(few).layers)
    largest = [max(row[n : n + experts]) for row in rows for n in range(0, len(row), experts)]
    assert world.facts[f"sure, {ROMA}"] == pytest.approx(sum(largest) / len(largest), rel=1e-5)
    assert world.facts["sure"] != world.facts[f"sure, {ROMA}"]
    assert 0 < world.facts["successes"] < 1
    assert world.facts["lambda"] == few.finetune.regularizer.weight
    alone = planted_map.answer(few, few, Silence(), dense=False, controls=False)
    assert set(alone.right) == {ROMA, TASK}


def test_dense_backprop_is_trained_at_the_configured_rate(few: Config) -> None:
    right, reason = planted_map.dense_backprop(few, Silence())
    assert not reason
    assert right is not None
    [manifest] = Path(few.storage or "").glob("baselines/*/manifest.json")
    facts = json.loads(manifest.read_text())["facts"]
    assert list(facts["trials"]) == [f"{few.finetune.learning_rate:g}"]
    assert len(right) == facts["questions"]


def test_why_dense_backprop_was_not_trained_is_told(few: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UnmovedError("nothing to follow")

    monkeypatch.setattr(DenseBackprop, "fit", refuse)
    slower = few.model_copy(update={"finetune": few.finetune.model_copy(update={"learning_rate": 1e-6})})
    assert planted_map.dense_backprop(slower, Silence()) == (None, "UnmovedError: nothing to follow")
