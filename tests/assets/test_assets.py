"""The embedded default: what ships is what the script makes, nothing of the suite was pretrained on, and it works."""

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
from transformers import AutoModelForCausalLM, AutoTokenizer

from roma_ray.assets import assets_path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs"))

from demo_assets import assemble, corpus, facts, items, measure, pretrain, vocabulary

Question = dict[str, Any]


@cache
def shipped() -> dict[str, list[Question]]:
    folder = assets_path() / "questions"
    return {split: [json.loads(x) for x in (folder / f"{split}.jsonl").open()] for split in ("train", "test")}


@cache
def recipe() -> pretrain.Recipe:
    return pretrain.Recipe(**json.loads((assets_path() / "recipe.json").read_text()))


@cache
def suite() -> list[tuple[str, items.Item]]:
    return corpus.suite(recipe().seed, assemble.COUNTS)


@cache
def loaded() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(assets_path() / "model", dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(assets_path() / "model")


def test_the_files_are_what_the_script_makes() -> None:
    for name, text in assemble.suite_files(recipe().seed).items():
        assert (assets_path() / "questions" / name).read_text(encoding="utf-8") == text


def test_size_of_the_suite() -> None:
    rows = shipped()
    tasks = {row["task"] for row in rows["train"]}
    assert len(tasks) >= 8
    assert tasks == {row["task"] for row in rows["test"]}
    assert len(rows["train"]) >= 2000
    assert len(rows["test"]) >= 800
    assert {len(row["choices"]) for row in rows["train"]} == {4}
    ids = [row["id"] for split in rows.values() for row in split]
    assert len(set(ids)) == len(ids)


def test_every_question_is_well_formed() -> None:
    for split, rows in shipped().items():
        for row in rows:
            assert row["split"] == split
            assert row["question"].strip()
            assert len(set(row["choices"])) == len(row["choices"]) >= 2
            assert all(row["choices"])
            assert 0 <= items.LETTERS.index(row["answer"]) < len(row["choices"])


def test_the_right_letter_is_not_a_constant() -> None:
    letters = Counter(row["answer"] for row in shipped()["train"] if len(row["choices"]) == 4)
    assert min(letters[x] for x in "ABCD") > 0.2 * sum(letters.values())


def test_no_question_is_in_both_splits() -> None:
    keys = {split: {(i.task, i.key) for s, i in suite() if s == split} for split in ("train", "test")}
    assert not keys["train"] & keys["test"]


def test_pretraining_text_holds_no_suite_question() -> None:
    steps = range(0, recipe().steps, 12)
    assert corpus.overlap(recipe().seed, steps, recipe().workers, recipe().documents, [i for _, i in suite()]) == []


def test_the_overlap_check_finds_a_pretraining_question() -> None:
    known = next(made[0] for made, _ in corpus.stream(recipe().seed, 3, 1, 32) if made)
    for item in (known, replace(known, key=("other",)), replace(known, question="other")):
        assert corpus.overlap(recipe().seed, range(5), 2, 32, [item])
    clean = replace(known, key=("other",), question="other")
    assert not corpus.overlap(recipe().seed, range(5), 2, 32, [clean])


def test_no_pretraining_text_holds_a_suite_prompt() -> None:
    """Read as text, not as records: neither prompt of any suite question is a part of a document."""
    prompts = {p for _, i in suite() for p in (items.cloze_prompt(i), items.letter_prompt(i))}
    for step in range(0, recipe().steps, 60):
        for _, pieces in corpus.stream(recipe().seed, step, 0, recipe().documents):
            text = "".join(part for part, _ in pieces)
            asked = {f"Question: {rest.partition(chr(10))[0]}\nAnswer:" for rest in text.split("Question: ")[1:]}
            assert not asked & prompts


def test_no_suite_question_lies_on_the_pretraining_side() -> None:
    for split, item in suite():
        assert items.place(item.task, *item.key) == split


def test_model_is_a_small_stock_olmoe() -> None:
    model, _ = loaded()
    assert type(model).__name__ == "OlmoeForCausalLM"
    assert type(model).__module__.startswith("transformers.")
    assert 2e6 <= sum(p.numel() for p in model.parameters()) <= 6e6
    assert model.config.num_hidden_layers >= 10
    assert model.config.num_experts >= 16
    weights = assets_path() / "model" / "model.safetensors"
    assert weights.stat().st_size <= 12e6
    with safe_open(weights, "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118


@pytest.mark.parametrize("text", ["Grüße, 世界 🙂\tx\n\n y", "What is 12+7?\nA. nineteen", "\x00\x7f  two  spaces"])
def test_tokenizer_takes_any_text(text: str) -> None:
    _, tokenizer = loaded()
    ids = tokenizer(text, add_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_tokens_of_the_prompts() -> None:
    _, tokenizer = loaded()
    assert all(len(tokenizer.encode(f" {letter}")) == 1 for letter in items.LETTERS)
    prompts = [f"{items.INSTRUCTION}\n\n{items.letter_prompt(item)}" for _, item in suite()]
    lengths = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    assert sum(lengths) / len(lengths) < 60
    assert max(lengths) < 90
    whole = tokenizer.encode(f"{prompts[0]} B")
    assert whole[:-1] == tokenizer.encode(prompts[0])


def test_base_accuracy_leaves_something_to_route() -> None:
    model, tokenizer = loaded()
    model.set_experts_implementation("grouped_mm")
    scores = measure.cloze_scores(model, tokenizer, suite()[::3])
    train, test = scores.accuracy("train"), scores.accuracy("test")
    assert 0.4 < train < 0.9
    assert abs(train - test) < 0.1
    assert sum(0.35 <= scores.accuracy("train", task) <= 0.9 for task in facts.TASKS) >= 6
    load = measure.letter_scores(model, tokenizer, suite()[::12]).load
    assert load is not None
    assert int((load == 0).sum()) < 0.2 * load.numel()


def test_a_killed_run_continues_to_the_same_bits(tmp_path: Path) -> None:
    tiny = pretrain.Recipe(workers=1, documents=2, steps=4, warmup=2, save_every=2)
    tokenizer = vocabulary.train_tokenizer(tiny.seed, tiny.vocabulary, documents=50)
    vocabulary.save_tokenizer(tokenizer, tmp_path / "tokenizer")
    whole, _ = pretrain.pretrain(tiny, tmp_path / "tokenizer", tmp_path / "whole")
    cut = tmp_path / "cut"
    cut.mkdir()

    class Killed(Exception):
        pass

    def die(_line: str) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "REPORT_EVERY", 3)
        with pytest.raises(Killed):
            pretrain.train_worker(0, tiny, str(tmp_path / "tokenizer"), str(cut), die)
    assert torch.load(cut / "checkpoint.pt", weights_only=True)["step"] == 2
    again, _ = pretrain.pretrain(tiny, tmp_path / "tokenizer", cut)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_another_recipe_never_continues_a_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(ValueError, match="other settings"):
        pretrain.pretrain(pretrain.Recipe(steps=1, workers=1), tmp_path, tmp_path)
