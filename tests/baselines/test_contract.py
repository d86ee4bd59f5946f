"""What holds for every method: one score a choice, no label seen, the bench left as it was, the same bits again."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from roma_ray.baselines.bench import HIDDEN, Bench
from roma_ray.baselines.contract import NOTHING, Fitted, Method
from roma_ray.baselines.method_registry import METHODS
from roma_ray.baselines.names import chosen_methods
from roma_ray.config.loading import load_config
from roma_ray.errors import ConfigError
from roma_ray.moe.masters import frozen_digest

RATE = 0.01


def given_to(method: Method, bench: Bench) -> Bench:
    return bench if method.sees_labels else bench.blinded()


def fitted_on(method: Method, bench: Bench) -> Fitted:
    given = given_to(method, bench)
    return method.fit(given, method.prepare(given, 1), RATE, 1)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_contract(letter: Bench, name: str) -> None:
    method, rows = METHODS[name], letter.rows["test"]
    before = letter.answer(rows).scores
    digests = frozen_digest(letter.head.model), frozen_digest(letter.whole.model)
    fitted = fitted_on(method, letter)
    answers = method.predict(given_to(method, letter), fitted, rows, 1)
    assert answers.rows == rows
    assert [len(s) for s in answers.scores] == [len(letter.data.prompts[row].choice_ids) for row in rows]
    assert np.isfinite(np.concatenate(answers.scores)).all()
    # The bench is as it was.
    assert (frozen_digest(letter.head.model), frozen_digest(letter.whole.model)) == digests
    assert letter.answer(rows).scores == before
    # Again, from the start: the same bits.
    again = fitted_on(method, letter)
    assert fitted.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(fitted.tensors[key], again.tensors[key]) for key in fitted.tensors)
    assert method.predict(given_to(method, letter), again, rows, 1).scores == answers.scores
    # Only the base model answers as the base model.
    assert (answers.scores == before) == (name == "base")
    assert (fitted.trained_parameters > 0) == method.trains


@pytest.mark.parametrize("name", METHODS)
def test_choices_of_several_tokens(cloze: Bench, name: str) -> None:
    method = METHODS[name]
    rows = [row for row in cloze.rows["test"] if max(map(len, cloze.data.prompts[row].choice_ids)) > 1][:5]
    assert rows
    fitted = fitted_on(method, cloze) if method.trains or name in ("c3po_mode", "expert_steering") else NOTHING
    answers = method.predict(given_to(method, cloze), fitted, rows, 1)
    assert [len(s) for s in answers.scores] == [len(cloze.data.prompts[row].choice_ids) for row in rows]
    assert np.isfinite(np.concatenate(answers.scores)).all()


def test_what_a_method_is_given_holds_no_test_label(letter: Bench) -> None:
    hidden = letter.blinded().data.prompts
    assert all((p.answer == HIDDEN) == (p.split == "test") for p in hidden)
    assert [p.split for p in hidden].count("test") == len(letter.rows["test"])
    assert all(p.answer != HIDDEN for p in letter.data.prompts)
    assert {name for name, method in METHODS.items() if method.sees_labels} == {"oracle", "oracle_control"}


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.sees_labels])
def test_test_labels_cannot_reach_a_method(letter: Bench, name: str) -> None:
    """Even on a bench whose test labels were all changed instead of hidden, nothing moves."""
    method = METHODS[name]
    prompts = [
        dataclasses.replace(p, answer=(p.answer + 1) % len(p.choice_ids)) if p.split == "test" else p
        for p in letter.data.prompts
    ]
    other = dataclasses.replace(letter, data=dataclasses.replace(letter.data, prompts=prompts))
    rows = letter.rows["test"][:6]
    found: list[Any] = []
    for bench in (letter, other):
        fitted = method.fit(bench, method.prepare(bench, 1), RATE, 1)
        found.append(method.predict(bench, fitted, rows, 1).scores)
    assert found[0] == found[1]


def test_hidden_labels_are_never_judged(letter: Bench) -> None:
    with pytest.raises(AssertionError, match="hidden"):
        letter.blinded().accuracy(letter.answer(letter.rows["test"]))


def test_every_setting_of_a_method_is_part_of_its_identity() -> None:
    """A changed setting changes the fingerprints of exactly the methods that use it."""
    training = {name for name, method in METHODS.items() if method.trains}
    c3po = {"c3po", "c3po_kernel", "c3po_mode"}
    oracles = {"oracle", "oracle_control", "oracle_tuning"}
    gates = {"router_tuning", "roma", "oracle_tuning", "dense_backprop"}
    cases = {
        "baselines.learning_rates=[0.5]": training,
        "finetune.epochs=7": training,
        "baselines.micro_batch_size=7": training,
        "baselines.shots=7": {"icl"},
        "baselines.virtual_tokens=7": {"prefix_tuning", "prompt_tuning"},
        "baselines.default_decay=0.7": {"dense_backprop"},
        "baselines.oracle.steps=7": oracles,
        "baselines.c3po.core_fraction=0.9": c3po,
        "baselines.c3po.steps=7": {"c3po", "c3po_mode"},
        "baselines.c3po.step_size=7": {"c3po"},
        "baselines.c3po.alphas=[0.5]": {"c3po_kernel"},
        "baselines.c3po.mode_alpha=0.9": {"c3po_mode"},
        "baselines.steering.promoted=[0.5]": {"expert_steering"},
        "baselines.steering.demoted=[0.5]": {"expert_steering"},
        "baselines.steering.margin=0.5": {"expert_steering"},
        "baselines.fragile.confidence=0.5": {"fragile_tokens"},
        "baselines.fragile.samples=5": {"fragile_tokens"},
        "finetune.regularizer.weight=7": {"roma", "oracle_tuning"},
        "finetune.clip_norm=7": training,
        "finetune.regularizer.warmup_fraction=0.7": {"roma", "oracle_tuning"},
        "finetune.regularizer.anneal=linear": {"roma", "oracle_tuning"},
        "finetune.warmup_steps=7": training,
        "finetune.anneal=cosine": training,
        "finetune.task_schedule.warmup_fraction=0.7": gates,
        "finetune.logits.dropout=0.1": gates,
        # Oracle tuning keeps the distance of its title, to targets that are no routing of the model's.
        "finetune.regularizer.distance=kl": {"roma"},
        "finetune.regularizer.positions=sum": {"roma"},
        "finetune.regularizer.refresh=true": {"roma"},
        "neighbors.sigma=7": {"c3po", "c3po_kernel"},
        # Without effect: a fixed lambda, answers by continuations, a grid of rates.
        "finetune.regularizer.gradient_ratio=7": set(),
        "finetune.task_loss=vocabulary": set(),
        "finetune.anneal_floor=0.7": set(),
        # All methods train within one budget.
        "finetune.guard.action=stop": set(),
        "finetune.decay_to=base": set(),
        "finetune.learning_rate=7": set(),
        "baselines.seeds=7": set(),
    }
    fixed = "finetune.regularizer.weight=0.8"
    usual = {name: method.configure(load_config(None, [fixed])) for name, method in METHODS.items()}
    for override, users in cases.items():
        config = load_config(None, [fixed, override])
        changed = {name for name, method in METHODS.items() if method.configure(config) != usual[name]}
        assert changed == users, override


def test_names_of_methods() -> None:
    assert chosen_methods("all") == tuple(METHODS)
    assert chosen_methods("icl, roma") == ("base", "icl", "roma")
    assert chosen_methods("oracle") == ("base", "oracle", "oracle_control")
    with pytest.raises(ConfigError, match="did you mean c3po"):
        chosen_methods("c3p0")
    with pytest.raises(ConfigError, match="no methods"):
        chosen_methods(" ,")
