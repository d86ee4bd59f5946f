"""The configuration: defaults, refusals with the nearest name, overrides, round trip, and the shipped files."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from roma_ray.config.loading import apply_override, load_config, parse_config
from roma_ray.config.schema import Config
from roma_ray.errors import ConfigError
from roma_ray.manifold.neighbors import find_neighbors
from roma_ray.questions.dataset_registry import REGISTRY

ROOT = Path(__file__).parents[2]
# Space files, which hold no model, have tests of their own.
SHIPPED = sorted(p for p in (ROOT / "configs").glob("*.yaml") if "\nmodel:" in p.read_text())
# One stands for a kind of routing and two for an invented world, not for a model of the paper.
PAPERS = [path for path in SHIPPED if path.stem not in ("switch_style", "planted")]
MINIMAL: dict[str, Any] = {"model": {"path": "m"}, "questions": {"sources": [{"path": "q.jsonl"}]}}


def minimal(**sections: Any) -> dict[str, Any]:
    return {**MINIMAL, **sections}


def refused(data: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(data)
    return str(caught.value)


def test_the_embedded_configuration_loads() -> None:
    config = load_config()
    assert config.model.path == "assets:model"
    assert config.routing.layers == "L5"
    assert config.neighbors.k == 3


def test_the_papers_and_the_references_values_are_the_defaults() -> None:
    config = parse_config(MINIMAL)
    assert (config.routing.layers, config.routing.tokens) == ("L5", "Last1")
    assert (config.neighbors.method, config.neighbors.k, config.neighbors.similarity) == ("knn", 3, "gaussian")
    tuning = config.finetune
    assert (tuning.epochs, tuning.batch_size, tuning.learning_rate) == (3, 32, 7e-5)
    assert (tuning.regularizer.kind, tuning.regularizer.weight) == ("manifold", 0.8)
    assert tuning.weight_decay == 0
    assert tuning.select == "last"


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads_with_the_papers_settings(path: Path) -> None:
    config = load_config(path)
    assert (config.routing.layers, config.routing.tokens, config.neighbors.k) == ("L5", "Last1", 3)
    assert (config.neighbors.method, config.neighbors.similarity) == ("knn", "gaussian")
    assert config.neighbors.sigma != 0.4, "the reference's sigma belongs to (1 - cos)^2"
    assert (config.finetune.regularizer.weight, config.finetune.learning_rate) == (0.8, 7e-5)
    assert (config.finetune.epochs, config.finetune.batch_size) == (3, 32)
    assert config.model.dtype == "bfloat16"


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_every_shipped_configuration_asks_the_papers_training_sets(path: Path) -> None:
    config = load_config(path)
    named = [source.dataset for source in config.questions.sources]
    on_the_hub = [name for name, dataset in REGISTRY.items() if dataset.parts]
    assert sorted(map(str, named)) == sorted(on_the_hub)
    assert all(source.limit is None for source in config.questions.sources), "the registry's counts are the paper's"
    assert sum(REGISTRY[str(name)].count for name in named) == 46_000
    assert "path: knowref.jsonl" in path.read_text(), "the eighth set is a file: the configuration says how to add it"
    assert sum(dataset.count for dataset in REGISTRY.values()) == 49_000


def test_there_is_a_configuration_for_each_model() -> None:
    models = {load_config(path).model.path for path in PAPERS}
    assert models == {
        "allenai/OLMoE-1B-7B-0125-Instruct",
        "Qwen/Qwen3-30B-A3B",
        "deepseek-ai/DeepSeek-V2-Lite-Chat",
        "deepseek-ai/deepseek-moe-16b-chat",
    }


@pytest.mark.parametrize(
    ("data", "wrong", "nearest"),
    [
        (minimal(finetun={}), "finetun", "finetune"),
        (minimal(finetune={"learning_rat": 1}), "finetune.learning_rat", "learning_rate"),
        (minimal(finetune={"regularizer": {"wieght": 1}}), "finetune.regularizer.wieght", "weight"),
        (
            {"model": {"path": "m"}, "questions": {"sources": [{"paht": "q.jsonl"}]}},
            "questions.sources.0.paht",
            "path",
        ),
        (minimal(questions={**MINIMAL["questions"], "promt": {}}), "questions.promt", "prompt"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_valid_name(
    data: dict[str, Any], wrong: str, nearest: str
) -> None:
    message = refused(data)
    assert f"{wrong}: unknown setting" in message
    assert f"did you mean `{nearest}`?" in message


def test_an_unknown_setting_that_is_near_to_none_lists_those_that_are_known() -> None:
    message = refused(minimal(neighbors={"zzzzzz": 1}))
    assert "known: method, k, epsilon, similarity, sigma, backend" in message


def test_all_faults_are_told_at_once() -> None:
    message = refused({"model": {}, "questions": {"sources": []}, "threads": 0, "colour": 1})
    assert "4 setting(s)" in message
    for name in ("model.path", "questions.sources", "threads", "colour"):
        assert name in message


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("finetune.epochs=0", "finetune.epochs"),
        ("finetune.epochs=many", "finetune.epochs"),
        ("finetune.epochs=1.5", "finetune.epochs"),
        ("finetune.learning_rate=-1", "finetune.learning_rate"),
        ("finetune.learning_rate=.nan", "finetune.learning_rate"),
        ("finetune.regularizer.weight=-0.1", "finetune.regularizer.weight"),
        ("finetune.regularizer.weight=.inf", "finetune.regularizer.weight"),
        ("finetune.regularizer.weight=automatic", "finetune.regularizer.weight"),
        ("questions.validation_fraction=0", "questions.validation_fraction"),
        ("questions.fraction=1.1", "questions.fraction"),
        (
            "questions.splits={train: 0.7, validation: 0.1, test: 0.1}",
            "questions.splits: train 0.7 + validation 0.1 + test 0.1 = 0.9",
        ),
        ("questions.splits={train: 0.7, validation: 0.3, test: 0}", "questions.splits.test"),
        ("questions.splits={train: 0.7, validation: 0.3}", "questions.splits.test"),
        ("questions.splits={train: 0.7, dev: 0.3}", "questions.splits.dev: unknown setting"),
        ("neighbors.k=0", "neighbors.k"),
        ("neighbors.sigma=0", "neighbors.sigma"),
        ("device=tpu", "device"),
        ("model.dtype=int8", "model.dtype"),
        ("model.path=", "model.path"),
        ("questions.prompt.format=essay", "questions.prompt.format"),
        ("model=5", "model"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        load_config(overrides=[override])


def test_a_source_has_exactly_one_origin() -> None:
    for source in ({}, {"path": "q.jsonl", "dataset": "sciq"}):
        message = refused({"model": {"path": "m"}, "questions": {"sources": [source]}})
        assert "exactly one of `path` and `dataset`" in message


@pytest.mark.parametrize("epsilon", [-0.5, 0.0, 1.5])
@pytest.mark.parametrize("similarity", ["cosine", "gaussian"])
def test_the_configuration_and_the_search_refuse_the_same_epsilons(epsilon: float, similarity: Any) -> None:
    """Before anything is paid for, and by one rule."""
    with pytest.raises(ConfigError) as searched:
        find_neighbors(
            torch.eye(4),
            torch.ones(4, dtype=torch.bool),
            training_N=torch.ones(4, dtype=torch.bool),
            ids=list("abcd"),
            text_keys=list("abcd"),
            method="epsilon",
            epsilon=epsilon,
            similarity=similarity,
            sigma=0.5,
        )
    message = refused(minimal(neighbors={"method": "epsilon", "epsilon": epsilon, "similarity": similarity}))
    assert str(searched.value) in message
    assert "neighbors.epsilon" in message


@pytest.mark.parametrize("text", ["7e-5", "7.0e-5", "0.00007"])
def test_numbers_may_be_written_as_people_write_them(text: str) -> None:
    # YAML 1.1 reads 7e-5 as a text.
    assert load_config(overrides=[f"finetune.learning_rate={text}"]).finetune.learning_rate == 7e-5


@pytest.mark.parametrize(("text", "value"), [("8e-1", 0.8), ("0", 0.0), ("30", 30.0), ("auto", "auto")])
def test_the_regularizers_weight_is_a_number_or_auto(text: str, value: float | str) -> None:
    weight = load_config(overrides=[f"finetune.regularizer.weight={text}"]).finetune.regularizer.weight
    assert weight == value
    assert isinstance(weight, str) == isinstance(value, str)


def test_overrides_apply_in_order_and_read_yaml() -> None:
    config = load_config(overrides=["routing.layers=L3", "routing.layers=[7, 9]", "model.revision=null", "seed=5"])
    assert config.routing.layers == (7, 9)
    assert config.model.revision is None
    assert config.seed == 5


def test_an_override_replaces_sources_as_a_whole() -> None:
    config = load_config(overrides=["questions.sources=[{path: mine.jsonl, limit: 5}]"])
    assert [(s.path, s.limit) for s in config.questions.sources] == [("mine.jsonl", 5)]


@pytest.mark.parametrize(
    "override", ["finetune.epochs", "=1", ".epochs=1", "finetune..epochs=1", "", "seed=[1", "seed={"]
)
def test_a_malformed_override_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_config(overrides=[override])


@pytest.mark.parametrize("override", ["questions.sources.0.limit=5", "model.path.x=1"])
def test_an_override_below_something_that_is_no_section_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="is not a section"):
        load_config(overrides=[override])


def test_an_override_makes_the_sections_it_needs() -> None:
    data: dict[str, Any] = {}
    apply_override(data, "finetune.regularizer.kind=l2")
    assert data == {"finetune": {"regularizer": {"kind": "l2"}}}


def test_configurations_are_frozen() -> None:
    config = load_config()
    with pytest.raises(ValidationError):
        config.finetune.epochs = 9  # type: ignore[misc]


@pytest.mark.parametrize("path", [None, *SHIPPED], ids=lambda path: path.stem if path else "embedded")
def test_the_resolved_configuration_loads_again_to_the_same(path: Path | None, tmp_path: Path) -> None:
    config = load_config(path, ["finetune.regularizer.weight=auto", "routing.layers=[11, 12]"])
    saved = tmp_path / "resolved.yaml"
    saved.write_text(config.to_yaml())
    assert load_config(saved) == config
    assert set(yaml.safe_load(saved.read_text())) == set(Config.model_fields), "every default is written out"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "must hold settings"),
        (b"- a\n- b\n", "must hold settings"),
        (b"just text", "must hold settings"),
        (b"a: [1\n", "not valid YAML"),
        (b"a: b: c\n", "not valid YAML"),
        (b"\xff\xfe\x00", "cannot read"),
        (b"a: \x00\n", "not valid YAML"),
        (b"when: 2026-99-99\n", "not valid YAML"),
        (b"[" * 5000, "not valid YAML"),
        (b"model: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
    ids=["empty", "list", "text", "unclosed", "nested", "utf-16", "nul", "bad date", "deep", "python tag"],
)
def test_a_file_that_is_no_configuration_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_config(path)
    assert "broken.yaml" in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot read the configuration"):
            load_config(path)


_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just([]), st.just({})
)
_names = st.one_of(st.sampled_from(sorted(Config.model_fields)), st.text(min_size=1, max_size=8))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(_names, st.one_of(_scalars, st.dictionaries(_names, _scalars, max_size=3)), max_size=5))
def test_any_data_is_a_configuration_or_a_readable_refusal(data: dict[str, Any]) -> None:
    # Whatever else is raised fails the test.
    with contextlib.suppress(ConfigError):
        config = parse_config({**MINIMAL, **data})
        assert parse_config(config.model_dump(mode="json")) == config


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_any_override_text_is_applied_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):
        load_config(overrides=[text])


def _documented(model: type[BaseModel]) -> list[str]:
    missing = []
    for name, field in model.model_fields.items():
        nested = [c for c in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(c, type)]
        sections = [c for c in nested if issubclass(c, BaseModel)]
        for section in sections:
            missing += _documented(section)
        # A plain on/off or numeric setting whose name is the field's standard term may stand without a sentence.
        if not sections and not field.description and name not in PLAIN:
            missing.append(f"{model.__name__}.{name}")
    return missing


PLAIN = {"seed", "batch_size", "epochs", "learning_rate", "clip_norm", "similarity", "kind"}


def test_every_setting_is_documented() -> None:
    assert _documented(Config) == []


@pytest.mark.parametrize(
    ("file", "text", "name"),
    [
        ("olmoe.yaml", "model: {path: allenai/OLMoE-1B-7B-0125-Instruct}", "olmoe"),
        ("trial.yaml", "model: {path: allenai/OLMoE-1B-7B-0125-Instruct}", "trial (OLMoE-1B-7B-0125-Instruct)"),
        ("mine.yaml", "model: {path: assets:model}", "mine"),
        ("mine.yaml", "{name: chosen, model: {path: assets:model}}", "chosen"),
        ("be\x1bll.yaml", "model: {path: a/b}", "be\N{REPLACEMENT CHARACTER}ll (b)"),
    ],
)
def test_a_run_without_a_name_has_its_files_and_its_models(file: str, text: str, name: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(f"{text}\n", encoding="utf-8")
    assert load_config(tmp_path / file, ["questions.sources=[{path: x.jsonl}]"]).name == name


def test_the_embedded_default_has_a_name_until_another_model_is_taken() -> None:
    assert load_config().name == "embedded default"
    assert load_config(None, ["model.path=org/other"]).name == "embedded default (other)"
    assert load_config(None, ["name=mine"]).name == "mine"
