"""The forward pass of a batch against literal one-question-at-a-time computations with the whole stock model."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from roma_ray.engine.forward import choice_scores, lay_out, mean_routing, predict, task_losses
from roma_ray.questions.prompts import Prompt
from tests.tiny import tiny_moe

LETTERS = [
    Prompt("a", "t", "train", (5, 6, 7, 8), ((20,), (21,), (22,)), (1, 1, 1), 1, False),
    Prompt("b", "t", "train", (9, 5), ((20,), (21,)), (1, 1), 0, False),
]
CLOZE = [
    Prompt("c", "t", "train", (5, 6, 7), ((30, 31, 32), (33,)), (9, 3), 0, False),
    Prompt("d", "t", "train", (8, 9, 10, 11, 12), ((34, 35), (36, 37)), (4, 8), 1, False),
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_moe("olmoe", seed=1)


def logits_of(model: PreTrainedModel, prompts: list[Prompt], gold_only: bool = False):
    """Layout, kept tokens, and their logits by the stock model, one path of the tree at a time."""
    layout = lay_out(prompts, gold_only=gold_only)
    packing = layout.packing
    logits = torch.zeros(len(packing), model.config.vocab_size)
    for segment in range(len(packing.segments)):
        path = [t for part in packing.path(segment) for t in packing.span(part)]
        logits[path] = model(packing.ids_T[path][None], use_cache=False).logits[0]
    keep = layout.keep()
    return layout, keep, logits[keep]


def literal_log_likelihood(model: PreTrainedModel, prompt: Prompt, choice: int) -> float:
    ids = torch.tensor([[*prompt.prompt_ids, *prompt.choice_ids[choice]]])
    logp = torch.log_softmax(model(ids, use_cache=False).logits[0].float(), -1)
    start = len(prompt.prompt_ids) - 1
    return sum(logp[start + n, token].item() for n, token in enumerate(prompt.choice_ids[choice]))


@pytest.mark.parametrize("prompts", [LETTERS, CLOZE, LETTERS + CLOZE])
def test_scores_equal_one_question_at_a_time(model: PreTrainedModel, prompts: list[Prompt]) -> None:
    with torch.inference_mode():
        layout, keep, logits = logits_of(model, prompts)
        scores = choice_scores(logits, keep, layout)
        for prompt, row in zip(prompts, scores, strict=True):
            for choice, score in enumerate(row):
                assert score == pytest.approx(literal_log_likelihood(model, prompt, choice), abs=1e-4)


@pytest.mark.parametrize(("prompts", "over"), [(LETTERS, "choices"), (LETTERS, "vocabulary"), (CLOZE, "continuation")])
def test_task_loss_equals_a_literal_loop(model: PreTrainedModel, prompts: list[Prompt], over: str) -> None:
    with torch.inference_mode():
        layout, keep, logits = logits_of(model, prompts, gold_only=over == "continuation")
        found = task_losses(logits, keep, layout, over=over).item()
        if over == "choices":
            rows = torch.tensor([20, 21, 22])
            assert found == task_losses(logits[:, rows], keep, layout, over=over, rows_V=rows).item()
        total = 0.0
        for prompt in prompts:
            gold = literal_log_likelihood(model, prompt, prompt.answer)
            if over == "choices":
                every = [literal_log_likelihood(model, prompt, c) for c in range(len(prompt.choice_ids))]
                total += torch.logsumexp(torch.tensor(every), 0).item() - gold
            else:
                total -= gold / len(prompt.choice_ids[prompt.answer])
        assert found == pytest.approx(total, abs=1e-4)


def test_gold_only_never_lays_out_another_choice() -> None:
    layout = lay_out(CLOZE, gold_only=True)
    assert [s.ids for s in layout.packing.segments] == [(5, 6, 7), (30, 31), (8, 9, 10, 11, 12), (36,)]
    assert layout.score_tokens == (((2, 3, 4),), ((9, 10),))


def test_prompts_are_laid_out_once_after_what_they_share() -> None:
    prompts = [Prompt("f", "t", "train", (5, 6, n, 7), ((1, 2), (3,)), (1, 1), 0, False) for n in (8, 9)]
    layout = lay_out(prompts, prefix=2)
    assert layout.packing.ids_T.tolist() == [5, 6, 8, 7, 1, 9, 7, 1]
    assert layout.packing.positions_T.tolist() == [0, 1, 2, 3, 4, 2, 3, 4]
    assert layout.score_tokens == (((3, 4), (3,)), ((6, 7), (6,)))
    assert layout.routing_positions("First3").tolist() == [[0, 1, 2], [0, 1, 5]]


def test_the_last_token_is_the_last_prompt_token_never_the_continuation() -> None:
    layout = lay_out(CLOZE)
    assert layout.routing_positions("Last1").tolist() == [[2], [9]]
    assert layout.packing.ids_T[[2, 9]].tolist() == [7, 12]


def test_mean_routing_is_the_mean_over_the_chosen_positions() -> None:
    layout = lay_out(LETTERS)
    positions = layout.routing_positions("Last3")
    routing = torch.rand(1, positions.numel(), 2, 4).masked_fill((positions.reshape(1, -1, 1, 1) < 0), 0)
    found = mean_routing(routing, positions)
    for number, length in enumerate((3, 2)):
        kept = [routing[0, 3 * number + p] for p in range(3) if positions[number, p] >= 0]
        assert len(kept) == length
        assert torch.allclose(found[number], torch.stack(kept).mean(0))


def test_prediction_rules() -> None:
    prompt = Prompt("e", "t", "train", (1,), ((1, 2), (3,), (4,)), (10, 2, 2), 0, False)
    assert predict([-5.0, -2.0, -2.0], prompt, "raw") == 1
    assert predict([-5.0, -2.0, -2.0], prompt, "normalized") == 0


UNEQUAL = [
    *LETTERS,
    Prompt("e", "t", "train", (3, 4, 5), ((20,), (21,), (22,)), (1, 1, 1), 2, False),
    Prompt("f", "t", "train", (6,), ((20,), (21,), (22,), (23,), (24,)), (1,) * 5, 4, False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("prompts", "over"), [(UNEQUAL, "choices"), (UNEQUAL, "vocabulary"), (CLOZE, "continuation")])
def test_all_questions_at_once_have_the_bits_of_one_after_another(
    prompts: list[Prompt], over: str, dtype: torch.dtype
) -> None:
    layout = lay_out(prompts, gold_only=over == "continuation")
    keep = layout.keep()
    drawn = torch.randn(len(keep), 40, generator=torch.Generator().manual_seed(3)).mul(5).to(dtype)
    together, apart = drawn.clone().requires_grad_(), drawn.clone().requires_grad_()
    found = task_losses(together, keep, layout, over=over)
    losses = []
    for prompt, question in zip(prompts, layout.score_tokens, strict=True):
        tokens = question[0 if layout.gold_only else prompt.answer]
        logits_PV = apart[[keep.index(token) for token in tokens]].float()
        if over == "choices":
            logits_PV, gold = logits_PV[:, [ids[0] for ids in prompt.choice_ids]], [prompt.answer]
        else:
            gold = list(prompt.choice_ids[prompt.answer])
        losses.append(torch.nn.functional.cross_entropy(logits_PV, torch.tensor(gold)))
    wanted = torch.stack(losses).sum()
    assert torch.equal(found, wanted)
    assert torch.equal(*(torch.autograd.grad(a, b)[0] for a, b in ((found, together), (wanted, apart))))
