"""One packed forward pass over some questions: which tokens run, which are read, what comes out.

T flat tokens, N kept tokens, P routing positions of a question, V vocabulary rows, L layers, E experts, Q questions.
The instruction that all prompts share is one segment, each prompt follows it, each choice's continuation its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from roma_ray.config.free_form import ANSWER
from roma_ray.engine.batches import is_letter
from roma_ray.moe.layers import aligned_positions, token_positions
from roma_ray.moe.packing import Packing, Segment, pack
from roma_ray.moe.sending import sent
from roma_ray.questions.prompts import Prompt, rule_scores


@dataclass(frozen=True)
class Layout:
    """The tokens of some questions, and which of them are read."""

    packing: Packing
    prompts: tuple[Prompt, ...]
    prefix: int
    """Tokens of the shared segment; 0 for none."""
    gold_only: bool
    score_tokens: tuple[tuple[tuple[int, ...], ...], ...]
    """For each question and choice that is scored: the flat tokens whose logits predict it, in order."""
    ends: tuple[int, ...]
    """Flat index that each question's last prompt token has."""

    def prompt_token(self, question: int, position: int) -> int:
        """Flat index of a position of a question's prompt."""
        if position < self.prefix:
            return position
        return self.ends[question] - len(self.prompts[question].prompt_ids) + 1 + position

    def routing_positions(self, tokens: str) -> Tensor:
        """Flat positions [Q, P] of a token rule (Last1 ...) in each prompt, of `Answer` those that predict it; -1 pads."""
        if tokens == ANSWER:
            rows = [list(answers[0]) for answers in self.score_tokens]
        else:
            rows = [
                [self.prompt_token(q, p) for p in token_positions(tokens, len(prompt.prompt_ids))]
                for q, prompt in enumerate(self.prompts)
            ]
        width = max(map(len, rows))
        return torch.tensor([row + [-1] * (width - len(row)) for row in rows])

    def aligned_positions(self, tokens: str, longest: int) -> Tensor:
        """The same in places that correspond between questions, [Q, P]; -1 where a prompt has none."""
        return torch.tensor(
            [
                [
                    self.prompt_token(q, p) if p >= 0 else -1
                    for p in aligned_positions(tokens, len(x.prompt_ids), longest)
                ]
                for q, x in enumerate(self.prompts)
            ]
        )

    def spans(self) -> list[range]:
        """The flat tokens of each question, its continuations among them; those of the shared segment are nobody's."""
        firsts = [self.prompt_token(q, self.prefix) for q in range(len(self.prompts))]
        return [range(start, stop) for start, stop in pairwise([*firsts, len(self.packing)])]

    def keep(self, *positions: Tensor) -> list[int]:
        """The flat tokens that anything is read at, ascending: the scores' and the given routing positions."""
        read = {t for question in self.score_tokens for choice in question for t in choice}
        for table in positions:
            read.update(table[table >= 0].tolist())
        return sorted(read)


def lay_out(prompts: Sequence[Prompt], *, prefix: int = 0, gold_only: bool = False) -> Layout:
    """Lay out the tokens that score every choice, or with `gold_only` the gold continuation alone (cloze training).

    `prefix` is the number of tokens that all prompts share. A continuation's last token is predicted, never fed.
    """
    segments: list[Segment] = []
    if prefix:
        shared = prompts[0].prompt_ids[:prefix]
        assert all(p.prompt_ids[:prefix] == shared and len(p.prompt_ids) > prefix for p in prompts)
        segments.append(Segment(shared))
    scored: list[list[list[int]]] = []
    ends: list[int] = []
    total = prefix
    for prompt in prompts:
        segments.append(Segment(prompt.prompt_ids[prefix:], 0 if prefix else -1))
        own = len(segments) - 1
        total += len(segments[own].ids)
        ends.append(total - 1)
        scored.append([])
        for ids in _continuations(prompt, gold_only):
            tokens = [ends[-1]]
            if len(ids) > 1:
                segments.append(Segment(ids[:-1], own))
                tokens += range(total, total + len(ids) - 1)
                total += len(ids) - 1
            scored[-1].append(tokens)
    frozen = tuple(tuple(tuple(choice) for choice in question) for question in scored)
    return Layout(pack(segments), tuple(prompts), prefix, gold_only, frozen, tuple(ends))


def _continuations(prompt: Prompt, gold_only: bool) -> list[tuple[int, ...]]:
    return [prompt.choice_ids[prompt.answer]] if gold_only else list(prompt.choice_ids)


def own_tokens(prompt: Prompt, prefix: int) -> int:
    """Tokens that a question adds to a packing: its prompt after the shared prefix, and each continuation's fed tokens."""
    return len(prompt.prompt_ids) - prefix + sum(len(ids) - 1 for ids in prompt.choice_ids)


def shared_prefix(prompts: Sequence[Prompt]) -> int:
    """How many leading tokens all prompts share, short of any prompt's last token."""
    first = min((p.prompt_ids for p in prompts), key=len)
    for place, token in enumerate(first[:-1]):
        if any(p.prompt_ids[place] != token for p in prompts):
            return place
    return len(first) - 1


def letter_rows(prompts: Sequence[Prompt]) -> Tensor:
    """The rows of `lm_head` that a cross-entropy over the choices reads: every choice's token, ascending."""
    assert all(map(is_letter, prompts))
    return torch.tensor(sorted({ids[0] for prompt in prompts for ids in prompt.choice_ids}))


def mean_routing(routing_1PLE: Tensor, positions_QP: Tensor) -> Tensor:
    """r_i: the mean routing row over a question's positions, [Q, L, E] in fp32, gradient kept.

    `routing_1PLE` was read at `positions_QP` as one flat row.
    """
    routing_QPLE = routing_1PLE[0].unflatten(0, positions_QP.shape)
    count_Q = (positions_QP >= 0).sum(1).to(routing_QPLE)
    return routing_QPLE.sum(1) / count_Q[:, None, None]


def choice_scores(logits_NV: Tensor, keep: Sequence[int], layout: Layout) -> list[list[float]]:
    """Log-likelihood of each choice of each question, natural logarithm, fp32 (eq. 2's f; lm-eval's loglikelihood)."""
    logp_NV = torch.log_softmax(logits_NV.float(), dim=-1)
    place = {token: n for n, token in enumerate(keep)}
    rows: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    for prompt, question in zip(layout.prompts, layout.score_tokens, strict=True):
        for tokens, ids in zip(question, _continuations(prompt, layout.gold_only), strict=True):
            rows += [place[token] for token in tokens]
            targets += ids
            counts.append(len(ids))
    picked = logp_NV[torch.tensor(rows), torch.tensor(targets)].cpu()
    # Mostly one number a choice, which is its sum.
    sums = picked.tolist() if max(counts) == 1 else [part.sum().item() for part in picked.split(counts)]
    scores = iter(sums)
    return [[next(scores) for _ in question] for question in layout.score_tokens]


def answered(logits_NV: Tensor, keep: Sequence[int], layout: Layout, scores: list[list[float]], rule: str) -> list[int]:
    """The choice that each question is answered with. Without choices (rule `greedy`): 0 where each token of the answer is the
    likeliest, so that greedy decoding writes it, else -1.
    """
    if rule != "greedy":
        return [predict(own, prompt, rule) for own, prompt in zip(scores, layout.prompts, strict=True)]
    place = {token: n for n, token in enumerate(keep)}
    likeliest = logits_NV.argmax(-1).tolist()
    return [
        0 if all(likeliest[place[t]] == id for t, id in zip(tokens, prompt.choice_ids[0], strict=True)) else -1
        for prompt, (tokens,) in zip(layout.prompts, layout.score_tokens, strict=True)
    ]


def predict(scores: Sequence[float], prompt: Prompt, rule: str) -> int:
    """The chosen answer: highest log-likelihood, per character of the choice when `rule` is `normalized`.

    The first of equals, as lm-evaluation-harness's argmax.
    """
    assert rule in ("raw", "normalized")
    return int(rule_scores(scores, prompt.choice_chars, rule).argmax())


def task_losses(
    logits_NV: Tensor, keep: Sequence[int], layout: Layout, *, over: str, rows_V: Tensor | None = None
) -> Tensor:
    """Sum over the questions of the task loss, eq. 8, in fp32.

    over: `choices` (cross-entropy among the letters), `vocabulary` (of the gold letter among all tokens) or
    `continuation` (mean over the gold continuation's tokens of their cross-entropy among all tokens). `rows_V` are the
    vocabulary rows that the logits hold, where not all (`choices` only).
    """
    place = {token: n for n, token in enumerate(keep)}
    column = {int(token): n for n, token in enumerate(rows_V)} if rows_V is not None else None
    tokens = [
        question[0 if layout.gold_only else prompt.answer]
        for prompt, question in zip(layout.prompts, layout.score_tokens, strict=True)
    ]
    counts = [len(some) for some in tokens]
    # One gather for all questions: a copy of each one's indices would make a GPU wait for the host some hundred times a step.
    rows_P = sent(torch.tensor([place[token] for some in tokens for token in some]), logits_NV.device)
    logits_PV = logits_NV.index_select(0, rows_P).float()
    if over != "choices":
        gold_P = torch.tensor([id for prompt in layout.prompts for id in prompt.choice_ids[prompt.answer]])
        return _summed(logits_PV, sent(gold_P, logits_NV.device), counts)
    # Questions of equally many choices go together; their losses are added in the questions' order.
    groups: dict[int, list[int]] = {}
    for number, prompt in enumerate(layout.prompts):
        groups.setdefault(len(prompt.choice_ids), []).append(number)
    losses = []
    for group in groups.values():
        prompts = [layout.prompts[n] for n in group]
        letters_QC = [[ids[0] if column is None else column[ids[0]] for ids in prompt.choice_ids] for prompt in prompts]
        own_QV = logits_PV if len(groups) == 1 else logits_PV.index_select(0, sent(torch.tensor(group), rows_P.device))
        choices_QC = own_QV.gather(1, sent(torch.tensor(letters_QC), rows_P.device))
        answers_Q = sent(torch.tensor([prompt.answer for prompt in prompts]), rows_P.device)
        losses.append(functional.cross_entropy(choices_QC, answers_Q, reduction="none"))
    if len(groups) == 1:
        return losses[0].sum()
    order = torch.tensor([n for group in groups.values() for n in group]).argsort()
    return torch.cat(losses).index_select(0, sent(order, rows_P.device)).sum()


def _summed(logits_PV: Tensor, gold_P: Tensor, counts: Sequence[int]) -> Tensor:
    """The sum over the questions of the mean cross-entropy over each one's tokens, `counts` of them."""
    if max(counts) == 1:
        return functional.cross_entropy(logits_PV, gold_P, reduction="none").sum()
    logp_PV = torch.log_softmax(logits_PV, dim=-1)
    parts = zip(logp_PV.split(list(counts)), gold_P.split(list(counts)), strict=True)
    return torch.stack([functional.nll_loss(logp, gold) for logp, gold in parts]).sum()
