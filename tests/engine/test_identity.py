"""Identities hold exactly what acts: a setting without effect redoes no work, one with an effect redoes what it changes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from roma_ray.config.loading import apply_override, parse_config
from roma_ray.config.schema import Config
from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import TABLE, read_table
from roma_ray.engine.setup import resolve
from roma_ray.engine.steps import locate
from roma_ray.errors import RomaError
from roma_ray.questions.records import Question
from roma_ray.questions.splits import assign_splits, drawn_parts
from roma_ray.runs.pipeline import run
from roma_ray.stages.finetuning import ADAPTER, epochs_of
from roma_ray.stages.neighborhoods import PAIRS
from roma_ray.stages.paired_evaluation import EVALUATE
from roma_ray.stages.preparation import training_rows
from tests.world import make_world

CLOZE = "questions.prompt.format=cloze"
SPLITS_SET = "questions.splits={train: 0.6, validation: 0.2, test: 0.2}"
WITHOUT_EFFECT = [
    (["neighbors.method=knn"], "neighbors.epsilon=0.7"),
    (["neighbors.method=random"], "neighbors.epsilon=0.7"),
    (["neighbors.method=epsilon"], "neighbors.k=7"),
    (["neighbors.method=epsilon"], "neighbors.exact_up_to=7"),
    (["neighbors.method=random"], "neighbors.exact_up_to=7"),
    *((["neighbors.method=task"], f"neighbors.{setting}") for setting in ("epsilon=0.7", "exact_up_to=7")),
    (["neighbors.similarity=cosine"], "neighbors.sigma=0.7"),
    (["neighbors.method=shuffled"], "neighbors.epsilon=0.7"),
    *((["neighbors.method=self"], f"neighbors.{s}") for s in ("k=7", "sigma=0.7", "similarity=cosine", "epsilon=0.7")),
    ([], "neighbors.backend=torch"),
    ([CLOZE], "questions.prompt.instruction=Choose."),
    ([], "questions.prompt.cloze_score=raw"),
    ([], "questions.test_fraction=0.5"),
    *(([SPLITS_SET], f"questions.{name}_fraction=0.3") for name in ("validation", "test")),
    ([CLOZE], "finetune.task_loss=vocabulary"),
    ([], "finetune.regularizer.gradient_ratio=0.7"),
    *(
        (["finetune.regularizer.weight=0"], f"finetune.regularizer.{setting}")
        for setting in ("warmup_fraction=0.7", "warmup_steps=7", "anneal=linear")
    ),
    (["finetune.regularizer.kind=none"], "finetune.regularizer.weight=7"),
    (["finetune.regularizer.kind=none"], "finetune.regularizer.warmup_fraction=0.7"),
    (["finetune.regularizer.kind=none"], "finetune.regularizer.anneal=linear"),
    *(([], f"finetune.{section}anneal_floor=0.5") for section in ("", "regularizer.", "task_schedule.")),
    *(
        ([f"finetune.{section}warmup_steps=7"], f"finetune.{section}warmup_fraction=0.7")
        for section in ("", "regularizer.", "task_schedule.")
    ),
    (["finetune.regularizer.kind=none"], "finetune.regularizer.refresh=true"),
    (["finetune.regularizer.kind=l2"], "finetune.regularizer.refresh=true"),
    (["finetune.regularizer.kind=l2"], "finetune.regularizer.distance=kl"),
    (["finetune.regularizer.kind=l2"], "finetune.regularizer.positions=sum"),
    *(([], f"finetune.regularizer.{s}") for s in ("prior=task", "entropy_sign=lower", "entropy_target=0.5")),
    (["finetune.regularizer.kind=entropy"], "finetune.regularizer.prior=task"),
    (["finetune.regularizer.distance=kl"], "finetune.regularizer.gradient_ratio=0.7"),
    (["finetune.epochs=1"], "finetune.regularizer.refresh=true"),
    (["finetune.epochs=1"], "finetune.select=best_validation"),
    ([], "finetune.decay_to=base"),
    ([], "finetune.logits.anneal=cosine"),
    *(([], f"finetune.guard.{setting}") for setting in ("action=none", "least_entropy=0.3")),
    # Nothing is halved, so it warns.
    *(
        ([setting], "finetune.guard.action=halve")
        for setting in ("finetune.epochs=1", "finetune.regularizer.kind=none", "finetune.regularizer.weight=0")
    ),
    (["finetune.epochs=1", "finetune.guard.action=stop"], "finetune.guard.most_gradient=3"),
    ([], "finetune.checkpoint_steps=7"),
    *(([], f"finetune.{setting}") for setting in ("chain=2", "chain=auto", "chain_activations=recompute")),
    (["finetune.chain=2"], "finetune.chain_activations=recompute"),
    (["extraction.cache=false"], "extraction.activation_dtype=bfloat16"),
    ([], "extraction.activation_dtype=float32"),
    ([], "extraction.memory_gb=1"),
    *(([], f"extraction.chain={slices}") for slices in ("2", "auto")),
    ([], "model.dtype=float32"),
    ([], "model.experts_backend=eager"),
    ([], "routing.layers=[4, 5]"),
    (["seed=3"], "questions.seed=3"),
    (["questions.held_out_tasks=[pick, copy]"], "questions.held_out_tasks=[copy, pick, copy]"),
    ([], "evaluation.batch_tokens=77"),
    ([], "baselines.micro_batch_size=7"),
    ([], "name=another"),
]
QUESTIONS = ["questions", "extract", "embed", "neighbors", "finetune", "evaluate"]
NEAR = ["neighbors", "finetune", "evaluate"]
TUNED = ["finetune", "evaluate"]
WITH_EFFECT = [
    ([], "neighbors.k=7", NEAR),
    ([], "neighbors.sigma=0.7", NEAR),
    ([], "neighbors.similarity=cosine", NEAR),
    # Random neighbors are weighed by their similarity like all others.
    (["neighbors.method=random"], "neighbors.sigma=0.7", NEAR),
    (["neighbors.method=random"], "neighbors.similarity=cosine", NEAR),
    (["neighbors.method=epsilon"], "neighbors.epsilon=0.7", NEAR),
    (["neighbors.method=epsilon", "neighbors.epsilon=0.7"], "neighbors.sigma=0.7", NEAR),
    ([], "neighbors.exact_up_to=7", NEAR),
    *(([], f"neighbors.method={method}", NEAR) for method in ("random", "task", "shuffled", "self")),
    *((["neighbors.method=task", "questions.seed=0"], setting, NEAR) for setting in ("neighbors.k=7", "seed=3")),
    (["neighbors.method=task"], "neighbors.sigma=0.7", NEAR),
    (["neighbors.method=shuffled"], "neighbors.k=7", NEAR),
    (["neighbors.method=shuffled", "questions.seed=0"], "seed=3", NEAR),
    (["neighbors.method=self", "questions.seed=0"], "seed=3", TUNED),
    ([], "questions.fraction=0.5", NEAR),
    ([], "questions.prompt.instruction=Choose.", QUESTIONS),
    ([CLOZE], "questions.prompt.cloze_score=raw", ["extract", *NEAR]),
    ([], "questions.validation_fraction=0.3", QUESTIONS),
    ([], "questions.seed=3", QUESTIONS),
    ([], "questions.held_out_tasks=[copy]", NEAR),
    (["questions.held_out_tasks=[copy]"], "questions.held_out_tasks=[pick]", NEAR),
    ([], SPLITS_SET, QUESTIONS),
    ([SPLITS_SET], "questions.splits={train: 0.7, validation: 0.15, test: 0.15}", QUESTIONS),
    ([SPLITS_SET], "questions.seed=3", QUESTIONS),
    ([], "finetune.task_loss=vocabulary", TUNED),
    (["finetune.weight_decay=0.1"], "finetune.decay_to=base", TUNED),
    *(([], f"finetune.logits.{setting}", TUNED) for setting in ("dropout=0.1", "temperature=0.5")),
    (["finetune.logits.temperature=0.5"], "finetune.logits.anneal=cosine", TUNED),
    *(([], f"finetune.guard.action={action}", TUNED) for action in ("halve", "stop")),
    (["finetune.guard.action=stop"], "finetune.guard.least_entropy=0.3", TUNED),
    (["finetune.regularizer.kind=none"], "finetune.guard.action=stop", TUNED),
    (["finetune.regularizer.weight=auto"], "finetune.regularizer.gradient_ratio=0.7", TUNED),
    *(
        (context, f"finetune.{section}{setting}", TUNED)
        for section in ("", "regularizer.", "task_schedule.")
        for context, setting in [
            *(([], setting) for setting in ("warmup_fraction=0.7", "warmup_steps=7", "anneal=cosine")),
            ([f"finetune.{section}anneal=cosine"], "anneal_floor=0.5"),
            ([f"finetune.{section}anneal=cosine"], "anneal=linear"),
        ]
    ),
    (["finetune.regularizer.kind=l2"], "finetune.regularizer.weight=7", TUNED),
    ([], "finetune.regularizer.refresh=true", TUNED),
    ([], "finetune.regularizer.distance=kl", TUNED),
    ([], "finetune.regularizer.positions=sum", TUNED),
    ([], "finetune.regularizer.kind=base", TUNED),
    (["finetune.regularizer.kind=prior"], "finetune.regularizer.prior=task", TUNED),
    *(
        (["finetune.regularizer.kind=entropy"], f"finetune.regularizer.entropy_{s}", TUNED)
        for s in ("sign=lower", "target=0.5")
    ),
    # Its own term still reads them, in the curves.
    (["finetune.regularizer.weight=0"], "finetune.regularizer.refresh=true", TUNED),
    ([], "finetune.select=best_validation", TUNED),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Test rows are declared, validation rows are drawn."""
    return make_world(tmp_path_factory.mktemp("identity"))


@pytest.fixture(scope="module")
def undeclared(world: Config) -> str:
    """The same questions without a split."""
    return rewritten(world, "undeclared", lambda n: None)


@pytest.fixture(scope="module")
def declared(world: Config) -> str:
    """The same questions with validation rows of both tasks."""
    return rewritten(world, "declared", lambda n: ("train", "validation", "test")[n // 2 % 3])


def rewritten(world: Config, name: str, split: Any) -> str:
    source = Path(str(world.questions.sources[0].path))
    rows = [{**json.loads(line), "split": split(n)} for n, line in enumerate(source.read_text().splitlines())]
    path = source.with_name(f"{name}.jsonl")
    path.write_text("".join(json.dumps({**row, "id": f"{name}{n}"}) + "\n" for n, row in enumerate(rows)))
    return str(path)


def with_settings(config: Config, overrides: Sequence[str]) -> Config:
    data = config.model_dump(mode="json")
    for override in overrides:
        apply_override(data, override)
    return parse_config(data)


def changed(config: Config, context: Sequence[str], setting: str) -> list[str]:
    """The stages that the setting moves to another place."""
    usual = with_settings(config, context)
    before, after = (locate(EVALUATE, resolve(c)) for c in (usual, with_settings(usual, [setting])))
    return [name for name in before if before[name].fingerprint != after[name].fingerprint]


@pytest.mark.parametrize(("context", "setting"), WITHOUT_EFFECT, ids=str)
def test_a_setting_without_effect_moves_no_stage(world: Config, context: list[str], setting: str) -> None:
    assert changed(world, context, setting) == []


@pytest.mark.parametrize(("context", "setting", "stages"), WITH_EFFECT, ids=str)
def test_a_setting_with_an_effect_moves_what_depends_on_it(
    world: Config, context: list[str], setting: str, stages: list[str]
) -> None:
    assert changed(world, context, setting) == stages


def test_fractions_act_where_the_sources_leave_something_to_draw(world: Config, undeclared: str, declared: str) -> None:
    fractions = ("questions.test_fraction=0.3", "questions.validation_fraction=0.3", "questions.seed=3")
    drawn = [f"questions.sources=[{{path: {undeclared}}}]"]
    assert [changed(world, drawn, setting) for setting in fractions] == [QUESTIONS] * 3
    whole = [f"questions.sources=[{{path: {declared}}}]"]
    assert [changed(world, whole, setting) for setting in fractions] == [[]] * 3
    # A source that is the test part; and a limit that ends a file before its test rows.
    told = [f"questions.sources=[{{path: {undeclared}}}, {{path: {declared}, split: test}}]"]
    assert [changed(world, told, setting) for setting in fractions] == [[], QUESTIONS, QUESTIONS]
    cut = [f"questions.sources=[{{path: {declared}, limit: 4}}]"]
    assert [changed(world, cut, setting) for setting in fractions] == [QUESTIONS, [], QUESTIONS]
    # Nothing else is drawn from the data, but the training fraction is.
    assert changed(world, [*whole, "questions.fraction=0.5"], "questions.seed=3") == NEAR


def test_what_a_data_set_declares_is_not_known_without_the_hub(world: Config, declared: str) -> None:
    """Its ids may set a later file's rows aside: where in doubt, what may act stays in the identity."""
    after = [f"questions.sources=[{{dataset: sciq}}, {{path: {declared}}}]"]
    assert changed(world, after, "questions.test_fraction=0.3") == QUESTIONS
    before = [f"questions.sources=[{{path: {declared}}}, {{dataset: sciq}}]"]
    assert changed(world, before, "questions.test_fraction=0.3") == []
    assert changed(world, before, "questions.validation_fraction=0.3") == QUESTIONS
    assert changed(world, before, "questions.seed=3") == QUESTIONS


def test_a_finished_stage_tells_what_is_drawn_from_its_files(
    world: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a large file is not read again by every command."""
    import roma_ray.stages.preparation as module

    config = with_settings(world, [f"storage={tmp_path}"])
    made = run(resolve(config), Silence(), until="questions").stages["questions"]
    assert made.manifest()["facts"]["drawn"] == {"test": False, "validation": True}
    module._drawn.cache_clear()

    def unread(sources: Any) -> Any:
        raise AssertionError("the files were read")

    monkeypatch.setattr(module, "declared_parts", unread)
    assert locate(EVALUATE, resolve(config))["questions"].fingerprint == made.fingerprint
    module._drawn.cache_clear()


SPLITS = ("train", "validation", "test")


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(SPLITS)), min_size=1, max_size=30),
    st.tuples(*[st.sampled_from((0.1, 0.2, 0.4))] * 4),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_what_is_not_drawn_depends_on_no_fraction_and_no_seed(
    rows: list[tuple[str, str]], fractions: tuple[float, ...], seeds: tuple[int, int]
) -> None:
    questions = [Question(f"q{n}", task, "Which?", ("x", "y"), 0, split=split) for n, (task, split) in enumerate(rows)]
    drawn = drawn_parts((q.task, q.split) for q in questions)

    def parts(n: int) -> Any:
        try:
            return assign_splits(
                questions,
                validation_fraction=fractions[0 if drawn.validation else n],
                test_fraction=fractions[2 if drawn.test else n + 2],
                seed=seeds[0 if drawn.test or drawn.validation else n],
            )
        except RomaError as error:
            return type(error)

    assert parts(0) == parts(1)


@pytest.mark.parametrize(
    ("context", "setting"),
    [
        (["finetune.epochs=1"], "finetune.select=best_validation"),
        (["finetune.epochs=1"], "finetune.regularizer.refresh=true"),
        (["finetune.regularizer.kind=l2", "finetune.regularizer.weight=1e-4"], "finetune.regularizer.refresh=true"),
        (["finetune.regularizer.weight=0"], "finetune.regularizer.warmup_fraction=0.7"),
        (["finetune.warmup_steps=2"], "finetune.warmup_fraction=0.7"),
        (["finetune.task_schedule.warmup_steps=2"], "finetune.task_schedule.anneal_floor=0.5"),
        (["finetune.regularizer.kind=none"], "finetune.regularizer.weight=7"),
        ([], "finetune.guard={action: warn, least_entropy: 0.99}"),
        (["finetune.regularizer.weight=0"], "finetune.guard={action: halve, least_entropy: 0.99}"),
    ],
    ids=str,
)
def test_what_the_identity_leaves_out_changes_no_bit(
    world: Config, tmp_path: Path, context: list[str], setting: str
) -> None:
    found = []
    for name, more in (("usual", []), ("other", [setting])):
        config = with_settings(world, [f"storage={tmp_path / name}", *context, *more])
        tuned = run(resolve(config), Silence(), until="finetune").stages["finetune"]
        gates = load_file(tuned.path / ADAPTER / "adapter_model.safetensors")
        found.append((gates, epochs_of(tuned), tuned.manifest()["facts"]))
    assert all(torch.equal(found[0][0][key], found[1][0][key]) for key in found[0][0])
    assert found[0][1:] == found[1][1:]


def test_with_a_seed_for_the_data_the_run_s_own_varies_the_training_alone(world: Config, tmp_path: Path) -> None:
    """Error bars over seeds tell of training, on the same questions and neighbors; random neighbors vary with it."""
    common = [f"storage={tmp_path}", "questions.seed=0", "questions.fraction=0.5"]
    assert changed(world, common, "seed=1") == TUNED
    assert changed(world, [*common, "neighbors.method=random"], "seed=1") == NEAR
    # Without it the run's seed draws all.
    assert changed(world, ["questions.fraction=0.5"], "seed=1") == QUESTIONS

    drawn: dict[int, dict[str, Any]] = {}
    for seed in (0, 1):
        settings = with_settings(world, [*common, "neighbors.method=random", f"seed={seed}"])
        stages = run(resolve(settings), Silence(), until="neighbors").stages
        drawn[seed] = read_table(stages["neighbors"].path / PAIRS, ["row", "neighbors"]).to_pydict()
        table = read_table(stages["questions"].path / TABLE, ["id", "split"])
        first, second = (training_rows(table, 0.5, drew).tolist() for drew in (0, 1))
        assert drawn[seed]["row"] == first != second
    assert drawn[0]["neighbors"] != drawn[1]["neighbors"]
