"""One padded forward pass over some questions: which sequences run, which positions are read, what comes out.

B sequences, S longest sequence, P read positions, D width, L layers, E experts, Q questions.
A question is one sequence where all its choices are single tokens; else one sequence a choice (or the gold one alone).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from roma_ray.engine.batches import is_letter
from roma_ray.moe.layers import token_positions
from roma_ray.questions.prompts import Prompt


@dataclass(frozen=True)
class Layout:
    """The sequences of a batch of prompts, right-padded, and the positions that are read from them."""

    ids_BS: Tensor
    mask_BS: Tensor
    score_positions_BP: Tensor
    """Positions whose logits predict the choice tokens; -1 pads."""
    owner: tuple[int, ...]
    """Question (number in the batch) of each sequence."""
    choice: tuple[int, ...]
    """Choice whose continuation a sequence carries; -1 where it carries none."""
    first: tuple[int, ...]
    """First sequence of each question."""
    prompt_lengths: tuple[int, ...]
    """Prompt tokens of each question."""

    def to(self, device: str) -> Layout:
        """The same layout with its tensors on a device."""
        return Layout(
            self.ids_BS.to(device),
            self.mask_BS.to(device),
            self.score_positions_BP.to(device),
            self.owner,
            self.choice,
            self.first,
            self.prompt_lengths,
        )


def lay_out(prompts: Sequence[Prompt], *, gold_only: bool = False) -> Layout:
    """Lay out the sequences that score every choice, or with `gold_only` the gold continuation alone (cloze training).

    A continuation's last token is predicted, never fed, so a sequence is prompt + continuation[:-1].
    """
    sequences: list[tuple[int, ...]] = []
    positions: list[range] = []
    owner: list[int] = []
    choice: list[int] = []
    first: list[int] = []
    for number, prompt in enumerate(prompts):
        first.append(len(sequences))
        last = len(prompt.prompt_ids) - 1
        if is_letter(prompt):
            continuations: list[tuple[int, tuple[int, ...]]] = [(-1, ())]
        else:
            wanted = [prompt.answer] if gold_only else range(len(prompt.choice_ids))
            continuations = [(c, prompt.choice_ids[c][:-1]) for c in wanted]
        for which, extra in continuations:
            sequences.append(prompt.prompt_ids + tuple(extra))
            positions.append(range(last, last + len(extra) + 1))
            owner.append(number)
            choice.append(which)
    return Layout(
        _pad(sequences, 0),
        _pad([(1,) * len(s) for s in sequences], 0),
        _pad(positions, -1),
        tuple(owner),
        tuple(choice),
        tuple(first),
        tuple(len(p.prompt_ids) for p in prompts),
    )


def routing_positions(layout: Layout, tokens: str) -> Tensor:
    """Positions [B, P] of a token rule (Last1 ...) in each question's first sequence; -1 elsewhere. DESIGN 5.1, 5.10."""
    rows: list[Sequence[int]] = [()] * len(layout.owner)
    for number, sequence in enumerate(layout.first):
        rows[sequence] = token_positions(tokens, layout.prompt_lengths[number])
    return _pad(rows, -1).to(layout.ids_BS.device)


def mean_routing(routing_BPLE: Tensor, positions_BP: Tensor, layout: Layout) -> Tensor:
    """r_i: the mean routing row over the chosen prompt positions, [Q, L, E] in fp32, gradient kept."""
    first = torch.tensor(layout.first, device=routing_BPLE.device)
    present_QP = (positions_BP[first] >= 0).to(routing_BPLE.dtype)
    total_QLE = (routing_BPLE[first] * present_QP[:, :, None, None]).sum(1)
    return total_QLE / present_QP.sum(1)[:, None, None]


def choice_scores(logits_BPV: Tensor, layout: Layout, prompts: Sequence[Prompt]) -> list[list[float]]:
    """Log-likelihood of each choice of each question, natural logarithm, fp32 (eq. 2's f; lm-eval's loglikelihood)."""
    logp_BPV = torch.log_softmax(logits_BPV.float(), dim=-1)
    scores: list[list[float]] = [[0.0] * len(p.choice_ids) for p in prompts]
    for sequence, (number, which) in enumerate(zip(layout.owner, layout.choice, strict=True)):
        ids = prompts[number].choice_ids
        if which < 0:
            letters = torch.tensor([c[0] for c in ids], device=logp_BPV.device)
            scores[number] = logp_BPV[sequence, 0, letters].tolist()
        else:
            target = torch.tensor(ids[which], device=logp_BPV.device)
            rows_PV = logp_BPV[sequence, : len(target)]
            scores[number][which] = rows_PV.gather(1, target[:, None]).sum().item()
    return scores


def predict(scores: Sequence[float], prompt: Prompt, rule: str) -> int:
    """The chosen answer: highest log-likelihood, per character of the choice when `rule` is `normalized`.

    The first of equals, as lm-evaluation-harness's argmax.
    """
    values = list(scores)
    if rule == "normalized":
        values = [s / max(c, 1) for s, c in zip(scores, prompt.choice_chars, strict=True)]
    return max(range(len(values)), key=lambda c: (values[c], -c))


def task_losses(logits_BPV: Tensor, layout: Layout, prompts: Sequence[Prompt], *, over: str) -> Tensor:
    """Sum over the batch of the task loss, eq. 8, in fp32.

    over: `choices` (cross-entropy among the letters), `vocabulary` (of the gold letter among all tokens) or
    `continuation` (mean over the gold continuation's tokens of their cross-entropy among all tokens).
    """
    losses = []
    for sequence, number in enumerate(layout.owner):
        prompt = prompts[number]
        gold = torch.tensor(prompt.choice_ids[prompt.answer], device=logits_BPV.device)
        logits_PV = logits_BPV[sequence, : len(gold)].float()
        if over == "choices":
            letters = torch.tensor([c[0] for c in prompt.choice_ids], device=logits_BPV.device)
            answer = torch.tensor([prompt.answer], device=logits_BPV.device)
            losses.append(torch.nn.functional.cross_entropy(logits_PV[:, letters], answer))
        else:
            losses.append(torch.nn.functional.cross_entropy(logits_PV, gold))
    return torch.stack(losses).sum()


def _pad(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    width = max((len(r) for r in rows), default=0)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.long).reshape(
        len(rows), width
    )
