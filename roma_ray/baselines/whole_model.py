"""Answers of the whole model, for methods that change what the trunk sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from roma_ray.baselines.bench import Bench
from roma_ray.baselines.head_passes import ChoiceReading, absent_choices, as_lists, summed
from roma_ray.engine.batches import is_letter, plan_batches
from roma_ray.engine.forward import lay_out, own_tokens, shared_prefix
from roma_ray.moe.passes import run_packed
from roma_ray.questions.prompts import Prompt


def score_whole(bench: Bench, prompts: Sequence[Prompt]) -> list[list[float]]:
    """Scores of every choice of any prompts, in their order, in planned batches; what a batch shares is computed once."""
    whole = bench.whole
    found: dict[int, list[float]] = {}
    for batch in plan_batches([own_tokens(p, 0) for p in prompts], bench.data.batch_tokens):
        chosen = [prompts[n] for n in batch]
        layout = lay_out(chosen, prefix=shared_prefix(chosen))
        keep = layout.keep()
        with torch.no_grad():
            out = run_packed(whole, layout.packing, keep=keep)
            likelihoods_QC = ChoiceReading(layout, keep, whole.device)(out.states)
        found.update(zip(batch, as_lists(likelihoods_QC, chosen), strict=True))
        bench.advance(len(batch), "whole model")
    return [found[n] for n in range(len(prompts))]


def padded_likelihoods(model: Any, prompts: Sequence[Prompt], *, before: int = 0, gold_only: bool = False) -> Tensor:
    """Log-likelihood of every choice [Q, C] with graph, from a model that is called as transformers models are.

    One right-padded sequence a choice, or one a question where all choices are single tokens. `gold_only`: of continuations
    only the right one's value is computed, the others are 0. `before` counts positions that the model itself puts before
    each sequence and returns hidden states of.
    """
    sequences: list[tuple[int, ...]] = []
    found: list[tuple[int, int, int, int, int]] = []
    for number, prompt in enumerate(prompts):
        last = len(prompt.prompt_ids) - 1
        if is_letter(prompt):
            found += [(len(sequences), last, ids[0], number, c) for c, ids in enumerate(prompt.choice_ids)]
            sequences.append(prompt.prompt_ids)
            continue
        for c in [prompt.answer] if gold_only else range(len(prompt.choice_ids)):
            ids = prompt.choice_ids[c]
            found += [(len(sequences), last + n, token, number, c) for n, token in enumerate(ids)]
            sequences.append(prompt.prompt_ids + ids[:-1])
    device = next(model.parameters()).device
    longest = max(map(len, sequences))
    ids_BS = torch.tensor([[*s, *[0] * (longest - len(s))] for s in sequences], device=device)
    mask_BS = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences], device=device)
    sequence, position, target, number, choice = torch.tensor(found, device=device).T
    # Of each sequence only the positions that are read go through `lm_head`.
    read = sorted(set(position.tolist()))
    keep = torch.tensor(read, device=device)
    logits_BPV = model(input_ids=ids_BS, attention_mask=mask_BS, logits_to_keep=keep + before).logits
    logp_BPV = torch.log_softmax(logits_BPV.float(), dim=-1)
    logp = logp_BPV[sequence, torch.searchsorted(keep, position.contiguous()), target]
    return summed(logp, number, choice, absent_choices(prompts).to(device))


def score_padded(bench: Bench, model: Any, prompts: Sequence[Prompt], *, before: int = 0) -> list[list[float]]:
    """Scores of every choice of the prompts, in their order, in planned batches."""
    found: dict[int, list[float]] = {}
    for batch in plan_batches([padded_tokens(p) + before for p in prompts], bench.data.batch_tokens):
        chosen = [prompts[n] for n in batch]
        with torch.no_grad():
            found |= zip(batch, as_lists(padded_likelihoods(model, chosen, before=before), chosen), strict=True)
        bench.advance(len(batch), "whole model")
    return [found[n] for n in range(len(prompts))]


def padded_tokens(prompt: Prompt) -> int:
    """Tokens that a question's own sequences have, each as long as the longest."""
    if is_letter(prompt):
        return len(prompt.prompt_ids)
    return len(prompt.choice_ids) * (len(prompt.prompt_ids) + max(map(len, prompt.choice_ids)) - 1)
