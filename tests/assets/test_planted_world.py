"""The planted world: what it asks was never asked, experts are what they were trained as, and a seed gives the same bits."""

import json
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from roma_ray.assets import assets_path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs"))

from planted_world import assemble, branches, corpus, dense, facts, merge, room, vocabulary
from planted_world.recipe import Recipe

QUICK = replace(
    Recipe(),
    people=40,
    public=15,
    vocabulary=1024,
    seed_steps=6,
    branch_steps=3,
    seed_batch=16,
    branch_batch=16,
    gate_people=5,
)


@cache
def texts() -> corpus.Corpus:
    return assemble.corpus_of(QUICK)


@cache
def tokenizer():  # type: ignore[no-untyped-def]
    return vocabulary.train_tokenizer(texts(), QUICK.vocabulary)


@cache
def public() -> Qwen3ForCausalLM:
    return dense.train_dense(QUICK, tokenizer(), texts().public)


@cache
def merged_with_one_domain():  # type: ignore[no-untyped-def]
    """A model whose every domain expert is the one trained on the first domain, with that domain's cached states."""
    cached = branches.cache_states(QUICK, public(), tokenizer(), texts().domain(facts.TASKS[0]))
    expert = branches.train_expert(QUICK, public(), cached, 3)
    gates_LEH = torch.randn(QUICK.sparse, 9, QUICK.width, generator=torch.Generator().manual_seed(1))
    model = merge.merge(QUICK, public(), [branches.ffns(public(), QUICK.dense), *[expert] * 8], gates_LEH)
    return model, cached, expert


@pytest.mark.parametrize("recipe", [QUICK, Recipe()], ids=["quick", "whole"])
def test_no_question_of_the_suite_is_in_the_pretraining_text(recipe: Recipe) -> None:
    world = assemble.corpus_of(recipe)
    told = [*world.public, *(d for task in facts.TASKS for d in world.domain(task))]
    leads = {d.lead for d in told}
    known = {(d.task, d.name) for d in told if d.phrasing is None}
    assert any(d.phrasing == 3 for d in told)
    for item in world.suite:
        assert corpus.prompt(item.question) not in leads
        assert (item.task, item.name) in known
        assert item.choices[item.answer] == world.world.value(item.task, item.name)


def test_no_fact_is_asked_in_both_files() -> None:
    places = {(item.task, item.name): item.split for item in texts().suite}
    assert len(places) == len(texts().suite)
    assert set(places.values()) == {"train", "test"}


def test_question_files_hold_the_suite() -> None:
    rows = [json.loads(line) for text in assemble.question_files(texts().suite).values() for line in text.splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == len(texts().suite)
    right = {(row["question"], row["choices"]["ABCD".index(row["answer"])]) for row in rows}
    assert right == {(item.question, item.choices[item.answer]) for item in texts().suite}


def test_cached_states_give_the_whole_model_s_logits() -> None:
    documents = texts().domain("pet")
    cached = branches.cache_states(QUICK, public(), tokenizer(), documents)
    late = branches.late_layers(QUICK, public())
    index = torch.arange(0, len(documents), 5)
    with torch.no_grad():
        found_BV = branches.last_token_logits(late, cached, index)
        for n, logits_V in zip(index.tolist(), found_BV, strict=True):
            ids = torch.tensor([tokenizer().encode(documents[n].lead)])
            torch.testing.assert_close(logits_V, public()(input_ids=ids).logits[0, -1], rtol=1e-4, atol=1e-4)


def test_an_expert_trains_and_nothing_else_does() -> None:
    before = {name: tensor.clone() for name, tensor in public().state_dict().items()}
    _, _, expert = merged_with_one_domain()
    assert all(torch.equal(before[name], tensor) for name, tensor in public().state_dict().items())
    for own, trained in zip(branches.ffns(public(), QUICK.dense), expert, strict=True):
        assert all(not torch.equal(own[name], trained[name]) for name in branches.FFN)


def test_the_merged_model_with_a_forced_expert_is_the_branch() -> None:
    """Public before the last token, the domain's expert at it: that is how the branch was trained."""
    model, cached, expert = merged_with_one_domain()
    late = branches.late_layers(QUICK, public())
    for layer, weights in zip(late.model.layers, expert, strict=True):
        for name, tensor in weights.items():
            getattr(layer.mlp, name).weight.data.copy_(tensor)
    documents = texts().domain(facts.TASKS[0])
    items = [
        corpus.Item("train", d.task, d.name, d.phrasing, d.lead[10:-8], (d.value[1:], *wrong), 0)
        for d in documents
        if d.phrasing is not None
        for wrong in [tuple(v for v in facts.ATTRIBUTES[d.task].values if v != d.value[1:])[:3]]
    ]
    asked = room.asked(tokenizer(), items)
    forced_NS = room.forcings(asked)["public expert before the last token, domain expert at it"]
    index = torch.tensor([n for n, d in enumerate(documents) if d.phrasing is not None])
    with torch.no_grad():
        logits_NV = branches.last_token_logits(late, cached, index)
    right_N = logits_NV.gather(1, asked.choices_NC).argmax(1) == asked.answer_N
    assert torch.equal(room.right_answers(model, asked, forced_NS), right_N)
    assert not torch.equal(room.right_answers(model, asked, forced_NS), room.right_answers(model, asked, forced_NS * 0))


def test_gates_are_centred_means_of_told_and_plainly_asked_documents() -> None:
    documents = [texts().domain(task) for task in ("pet", "job", "home")]
    cached = [branches.cache_states(QUICK, public(), tokenizer(), d) for d in documents]
    found_LEH = merge.prototypes(QUICK, cached, documents)
    people = texts().world.names[: QUICK.gate_people]
    means = []
    for states, texts_of_domain in zip(cached, documents, strict=True):
        rows = [n for n, d in enumerate(texts_of_domain) if d.name in people and d.phrasing in (None, 0)]
        means.append(sum(states.inputs_LNH[:, n] for n in rows) / len(rows))
    centre_LH = sum(means) / 3
    for expert in range(3):
        row_LH = means[expert] - centre_LH
        wanted_LH = QUICK.gate_norm * row_LH / row_LH.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(found_LEH[:, expert], wanted_LH, rtol=1e-4, atol=1e-4)


def test_where_an_attribute_is_read() -> None:
    tokens = tokenizer()
    for task, attribute in facts.ATTRIBUTES.items():
        for phrasing, question in enumerate(attribute.questions):
            at = room.read_at(tokens, task, phrasing)
            ids = tokens.encode(corpus.prompt(question.replace("{}", "X")))
            same = [
                name
                for name, other in facts.ATTRIBUTES.items()
                for text in other.questions
                if tokens.encode(corpus.prompt(text.replace("{}", "X")))[: at + 1] == ids[: at + 1]
            ]
            assert set(same) == {task}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folders = [tmp_path_factory.mktemp("world") for _ in range(2)]
    for folder in folders:
        assemble.build(folder, QUICK)
    return folders[0], folders[1]


def test_a_seed_gives_the_same_bits(built: tuple[Path, Path]) -> None:
    first, second = built
    names = [str(path.relative_to(first)) for path in sorted(first.rglob("*")) if path.is_file()]
    assert {"model/model.safetensors", "room.json", "README.md", "questions/test.jsonl"} <= set(names)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


@pytest.mark.parametrize("changes", [{"top_k": 1}, {"gate_norm": 4.0}], ids=["top-k", "gates"])
def test_the_weights_of_another_top_k_or_length_of_gates_serve(
    built: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Trained anew or taken over: the same files."""
    single = replace(QUICK, **changes)
    assemble.build(tmp_path / "taken", single, built[0])
    assemble.build(tmp_path / "trained", single)
    for name in ("model/model.safetensors", "model/config.json", "room.json", "README.md"):
        assert (tmp_path / "taken" / name).read_bytes() == (tmp_path / "trained" / name).read_bytes()
    weights = [(folder / "model/model.safetensors").read_bytes() for folder in (tmp_path / "taken", built[0])]
    assert (weights[0] == weights[1]) == ("gate_norm" not in changes)
    with pytest.raises(ValueError, match="another world"):
        assemble.build(tmp_path / "refused", replace(single, seed=1), built[0])


def test_another_seed_is_another_world() -> None:
    other = assemble.corpus_of(replace(QUICK, seed=1))
    assert set(other.world.names) != set(texts().world.names)
    assert not {item.question for item in other.suite} >= {item.question for item in texts().suite}


def test_the_model_is_a_stock_one(built: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(built[0] / "model")
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert model.dtype == torch.bfloat16
    assert model.config.norm_topk_prob
    assert model.config.num_experts_per_tok == QUICK.top_k


@pytest.mark.parametrize(("folder", "top_k"), [(".", 2), ("control", 1)])
def test_the_shipped_worlds_are_what_the_script_makes(folder: str, top_k: int) -> None:
    """Their questions and facts to the letter; the weights take minutes, and are told of in their README."""
    shipped = assets_path() / folder
    recipe = Recipe(**json.loads((shipped / "recipe.json").read_text()))
    assert recipe == Recipe(seed=0, top_k=top_k)
    for name, text in assemble.question_files(assemble.corpus_of(recipe).suite).items():
        assert (shipped / "questions" / name).read_text(encoding="utf-8") == text
    config = json.loads((shipped / "model" / "config.json").read_text())
    assert (config["num_experts_per_tok"], config["norm_topk_prob"]) == (top_k, True)
    room = json.loads((shipped / "room.json").read_text())
    assert room["test"]["domain expert at the last token"]["room"] >= 10
    assert 40 <= room["test"]["own routing"]["accuracy"] <= 65


def test_both_shipped_worlds_have_the_same_weights() -> None:
    """They differ in how many experts a token takes."""
    weights = [assets_path() / folder / "model" / "model.safetensors" for folder in (".", "control")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert weights[0].stat().st_size <= 10e6
    with safe_open(weights[0], "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118


def test_the_suite_is_well_formed() -> None:
    rows = [
        json.loads(line)
        for split in ("train", "test")
        for line in (assets_path() / "questions" / f"{split}.jsonl").read_text().splitlines()
    ]
    assert all(len(set(row["choices"])) == 4 and all(row["choices"]) and row["question"].strip() for row in rows)
    letters = Counter(row["answer"] for row in rows)
    assert min(letters[x] for x in "ABCD") > 0.2 * len(rows)


@pytest.mark.parametrize("text", ["Grüße, 世界 🙂\tx\n\n y", "What is 12+7?\nA. nineteen", "\x00\x7f  two  spaces"])
def test_tokenizer_takes_any_text(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets_path() / "model")
    ids = tokenizer(text, add_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
