"""Dense backprop, in-context learning, prefix and prompt tuning do what their names say."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from roma_ray.baselines.bench import Bench
from roma_ray.baselines.dense_backprop import DefaultVectors
from roma_ray.baselines.icl import InContext, demonstrations
from roma_ray.baselines.method_registry import METHODS
from roma_ray.baselines.whole_model import score_padded, score_whole
from roma_ray.moe.masters import frozen_digest
from roma_ray.moe.routers import find_routers
from roma_ray.stages.embedding import embedding_texts
from tests.tiny import FAMILIES, MORE_FAMILIES, VOCABULARY, tiny_moe


def literal_layer(
    hidden_TD: Tensor, router: nn.Module, experts: nn.Module, defaults_ED: Tensor, sigmoid: bool
) -> tuple[Tensor, Tensor]:
    """The documented output, token by token and expert by expert, and which experts were active [T, E]."""
    logits_TE, weights_TK, index_TK = router(hidden_TD)
    scores_TE = logits_TE.float().sigmoid() if sigmoid else logits_TE.float().softmax(-1)
    tokens, width = hidden_TD.shape
    active_TE = torch.zeros(tokens, len(defaults_ED), dtype=torch.bool)
    rows = []
    for t in range(tokens):
        total = torch.zeros(width)
        for k, e in enumerate(index_TK[t].tolist()):
            active_TE[t, e] = True
            alone = experts(hidden_TD[t : t + 1], torch.tensor([[e]]), torch.ones(1, 1))[0]
            total = total + weights_TK[t, k] * alone
        for e in range(len(defaults_ED)):
            if not active_TE[t, e]:
                # Its weight stands to that of any active expert as the scores of both.
                ratio = scores_TE[t, e] / scores_TE[t, index_TK[t, -1]]
                total = total + ratio * weights_TK[t, -1] * defaults_ED[e]
        rows.append(total)
    return torch.stack(rows), active_TE


# As they are; renormalised, by softmax and by division; multiplied; renormalised sigmoids, chosen with a bias.
@pytest.mark.parametrize("family", ["olmoe", "granitemoe", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_the_forward_pass_holds_the_default_vectors_of_inactive_experts(family: str) -> None:
    model = tiny_moe(family, seed=2)
    routers = find_routers(model)[-1:]
    block = model.get_submodule(routers[0].name.rpartition(".")[0])
    vectors = DefaultVectors(model, routers, 0.5)
    generator = torch.Generator().manual_seed(0)
    start_ED = torch.randn(vectors.vectors_ED[routers[0].layer].shape, generator=generator)
    vectors.load({f"default.{routers[0].layer}": start_ED})
    hidden_TD = torch.randn(7, model.config.hidden_size, generator=generator)
    sigmoid = family == "deepseek_v3"
    expected, active_TE = literal_layer(hidden_TD, routers[0].module, block.experts, start_ED, sigmoid)
    with vectors.installed(), torch.no_grad():
        _, weights_TK, index_TK = routers[0].module(hidden_TD)
        given = block.experts(hidden_TD, index_TK, weights_TK)
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-4)
    assert not active_TE.all()
    # Passes without a graph move nothing.
    assert torch.equal(vectors.state()[f"default.{routers[0].layer}"], start_ED)


def test_default_vectors_are_running_averages_of_what_experts_gave() -> None:
    model = tiny_moe("olmoe", seed=2)
    routers = find_routers(model)[-1:]
    layer, block = routers[0].layer, model.get_submodule(routers[0].name.rpartition(".")[0])
    vectors = DefaultVectors(model, routers, 0.75)
    hidden_TD = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    _, weights_TK, index_TK = routers[0].module(hidden_TD)
    with vectors.installed():
        routers[0].module(hidden_TD)
        block.experts(hidden_TD, index_TK, weights_TK)
    for expert in range(routers[0].num_experts):
        tokens = [t for t in range(5) if expert in index_TK[t]]
        given = [block.experts(hidden_TD[t : t + 1], torch.tensor([[expert]]), torch.ones(1, 1))[0] for t in tokens]
        expected = 0.25 * torch.stack(given).mean(0) if given else torch.zeros(model.config.hidden_size)
        torch.testing.assert_close(vectors.vectors_ED[layer][expert], expected, atol=1e-5, rtol=1e-4)


def test_routers_of_inactive_experts_receive_gradient_with_default_vectors_only() -> None:
    """A family whose softmax runs over the chosen logits alone: without default vectors the others hear nothing."""
    model = tiny_moe("granitemoe", seed=4)
    router = find_routers(model)[-1]
    parameter = next(p for p in router.module.parameters() if p.requires_grad)
    ids = torch.randint(3, VOCABULARY, (1, 2), generator=torch.Generator().manual_seed(3))
    chosen: list[Tensor] = []
    handle = router.module.register_forward_hook(lambda _m, _i, output: chosen.append(output[2]))

    def gradient() -> Tensor:
        (found,) = torch.autograd.grad(model(input_ids=ids).logits[0, -1].log_softmax(-1)[5], [parameter])
        return found.abs().sum(-1)

    vectors = DefaultVectors(model, [router], 0.5)
    vectors.load({f"default.{router.layer}": torch.randn(vectors.vectors_ED[router.layer].shape)})
    sparse_E = gradient()
    with vectors.installed():
        dense_E = gradient()
    handle.remove()
    inactive = [e for e in range(router.num_experts) if all(e not in index for index in chosen)]
    assert inactive
    assert not sparse_E[inactive].any()
    assert dense_E.all()


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_every_family_computes_with_default_vectors_and_as_before_without(family: str) -> None:
    model = tiny_moe(family, seed=1)
    routers = find_routers(model)[-2:]
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(3))
    vectors = DefaultVectors(model, routers, 0.9)
    with torch.no_grad():
        usual = model(input_ids=ids).logits
        with vectors.installed():
            zero = model(input_ids=ids).logits
        # Vectors of zero leave the model as it is, to rounding.
        torch.testing.assert_close(zero, usual, atol=1e-4, rtol=1e-3)
    with vectors.installed():
        model(input_ids=ids)
        moved = model(input_ids=ids).logits.detach()
    assert not torch.allclose(moved, usual, atol=1e-4)
    assert torch.equal(model(input_ids=ids).logits.detach(), usual)


def test_demonstrations_leak_nothing(bench: Bench) -> None:
    """Training questions only; never the question itself, nor one whose embedded text is the same."""
    prompts = bench.data.prompts
    texts = embedding_texts(bench.stages["questions"], False)
    rows = [*bench.rows["test"], *bench.rows["validation"], *bench.rows["train"][:10]]
    shots = demonstrations(bench, rows)
    training = set(bench.rows["train"])
    for row, found in zip(rows, shots, strict=True):
        assert len(found) == bench.config.shots
        assert set(found) <= training - {row}
        assert all(texts[n] != texts[row] for n in found)
    built = InContext().prompts(bench, rows)
    for row, found, prompt in zip(rows, shots, built, strict=True):
        own = prompts[row].prompt_ids
        assert prompt.prompt_ids[-len(own) :] == own
        assert prompt.choice_ids == prompts[row].choice_ids
        before = prompt.prompt_ids[: -len(own)]
        # The nearest stands last, with its right choice.
        nearest = prompts[found[0]]
        solved = nearest.prompt_ids + nearest.choice_ids[nearest.answer]
        assert any(before[n : n + len(solved)] == solved for n in range(len(before)))
        assert len(before) > len(solved)
        # Nothing of the question's own choices stands before it by way of its own answer.
        assert own not in [before[n : n + len(own)] for n in range(len(before))]


def test_demonstrations_that_do_not_fit_are_left_out(letter: Bench) -> None:
    row = letter.rows["test"][0]
    full = InContext().prompts(letter, [row])[0]
    questions = letter.setup.config.questions
    tight = questions.prompt.model_copy(update={"max_tokens": len(full.prompt_ids)})
    config = letter.setup.config.model_copy(update={"questions": questions.model_copy(update={"prompt": tight})})
    small = dataclasses.replace(letter, setup=dataclasses.replace(letter.setup, config=config))
    shorter = InContext().prompts(small, [row])[0]
    assert len(letter.data.prompts[row].prompt_ids) < len(shorter.prompt_ids) < len(full.prompt_ids)


@pytest.mark.parametrize("name", ["prefix_tuning", "prompt_tuning"])
def test_soft_prompts_train_positions_and_nothing_of_the_base(letter: Bench, name: str) -> None:
    method = METHODS[name]
    digest = frozen_digest(letter.whole.model)
    names = [key for key, _ in letter.whole.model.named_parameters()]
    fitted = method.fit(letter.blinded(), {}, 0.05, 0)
    assert frozen_digest(letter.whole.model) == digest
    assert [key for key, _ in letter.whole.model.named_parameters()] == names
    config, tokens = letter.whole.model.config, letter.config.virtual_tokens
    head = config.hidden_size // config.num_attention_heads
    width = {
        "prompt_tuning": config.hidden_size,
        "prefix_tuning": 2 * config.num_hidden_layers * config.num_key_value_heads * head,
    }[name]
    assert fitted.trained_parameters == tokens * width
    losses = method.fit(letter.blinded(), {}, 1e-9, 0).facts["task_losses"]
    assert fitted.facts["task_losses"][-1] < losses[-1], "training does better than standing still"
    # The positions are what answers: with others, other scores.
    rows = letter.rows["test"][:4]
    other = dataclasses.replace(fitted, tensors={"positions": fitted.tensors["positions"] + 1})
    assert method.predict(letter, fitted, rows, 0).scores != method.predict(letter, other, rows, 0).scores


def test_the_whole_model_answers_as_the_head_does(bench: Bench) -> None:
    """Packed whole, padded whole, and the head from cached activations: one judge for all kinds of methods."""
    rows = bench.rows["test"]
    prompts = [bench.data.prompts[row] for row in rows]
    for found in (score_whole(bench, prompts), score_padded(bench, bench.whole.model, prompts)):
        for mine, theirs in zip(found, bench.answer(rows).scores, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
