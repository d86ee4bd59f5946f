"""A batch of questions through the head, differentiable, with its routing at the last prompt token replaced where wanted.

Q questions of a batch, C most choices, B sequences, P read positions, V vocabulary, L tuned layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from roma_ray.baselines.bench import Bench
from roma_ray.engine.cache import head_input
from roma_ray.engine.forward import Layout, lay_out, routing_positions
from roma_ray.moe.overriding import override_routing
from roma_ray.moe.reading import read_routing
from roma_ray.moe.slices import slice_logits
from roma_ray.questions.prompts import Prompt


class HeadRun:
    """Some questions laid out for the head, which can then be run with one routing after another.

    A question may stand several times in `rows`. Only the last prompt token's routing is ever replaced: tokens of a
    continuation keep their own.
    """

    def __init__(self, bench: Bench, rows: Sequence[int]) -> None:
        self.bench, self.head = bench, bench.head
        self.prompts = [bench.data.prompts[row] for row in rows]
        layout = lay_out(self.prompts)
        self.inputs = head_input(self.head, bench.data.cache, rows, self.prompts, layout)
        self.layout = layout.to(str(self.head.device))
        self.routers = [self.head.routers[n] for n in bench.columns]
        self.reading = ChoiceReading(self.layout, self.prompts)

    def likelihoods(self, routing_QLE: Tensor | None = None) -> Tensor:
        """Log-likelihood of every choice [Q, C], fp32 with graph, under r = `routing_QLE` at the last prompt token.

        Entries beyond a question's choices are minus infinity. Without `routing_QLE` the head routes by itself.
        """
        layout = self.layout
        replaced: AbstractContextManager[None] = nullcontext()
        if routing_QLE is not None:
            owner = torch.tensor(layout.owner, device=self.head.device)
            positions_B = torch.tensor([layout.prompt_lengths[n] - 1 for n in layout.owner], device=self.head.device)
            replaced = override_routing(self.head.model, self.routers, routing_QLE[owner], positions_B)
        with replaced:
            logits_BPV = slice_logits(self.head, self.inputs, layout.mask_BS, layout.score_positions_BP)
        return self.reading(logits_BPV)

    def own_routing(self) -> Tensor:
        """The head's own r at the last prompt token: [Q, L, E], fp32."""
        positions_BP = routing_positions(self.layout, "Last1")
        with read_routing(self.head.model, self.routers, positions_BP) as tape, torch.no_grad():
            slice_logits(self.head, self.inputs, self.layout.mask_BS, self.layout.score_positions_BP[:, :1])
        return tape.routing_BPLE[list(self.layout.first), 0]


class ChoiceReading:
    """Where each token of each choice is predicted, so that all log-likelihoods are one gather and one sum."""

    def __init__(self, layout: Layout, prompts: Sequence[Prompt]) -> None:
        places: list[tuple[int, int, int, int, int]] = []
        for sequence, (number, which) in enumerate(zip(layout.owner, layout.choice, strict=True)):
            choices = range(len(prompts[number].choice_ids)) if which < 0 else [which]
            for choice in choices:
                for position, token in enumerate(prompts[number].choice_ids[choice]):
                    places.append((sequence, position, token, number, choice))
        device = layout.ids_BS.device
        self.index = torch.tensor(places, device=device).T
        widths = [len(p.choice_ids) for p in prompts]
        self.absent_QC = torch.arange(max(widths))[None] >= torch.tensor(widths)[:, None]
        self.absent_QC = self.absent_QC.to(device)

    def __call__(self, logits_BPV: Tensor) -> Tensor:
        """Log-likelihoods [Q, C] from the logits at the layout's score positions."""
        sequence, position, token, number, choice = self.index
        logp = torch.log_softmax(logits_BPV.float(), dim=-1)[sequence, position, token]
        empty_QC = torch.zeros(self.absent_QC.shape, device=logp.device)
        likelihoods_QC = empty_QC.index_put((number, choice), logp, accumulate=True)
        return likelihoods_QC.masked_fill(self.absent_QC, -torch.inf)


def task_loss(likelihoods_QC: Tensor, aims: Sequence[int], prompts: Sequence[Prompt], over: str) -> Tensor:
    """The task loss of eq. 8 towards the choices `aims`, one value a question: [Q], fp32.

    over: `choices` (cross-entropy among the letters), `vocabulary` (minus the letter's log-likelihood) or `continuation`
    (minus the mean log-likelihood of the continuation's tokens).
    """
    aims_Q1 = torch.tensor(list(aims), device=likelihoods_QC.device)[:, None]
    chosen_Q = likelihoods_QC.gather(1, aims_Q1)[:, 0]
    if over == "choices":
        return likelihoods_QC.logsumexp(dim=1) - chosen_Q
    lengths = [len(p.choice_ids[aim]) for p, aim in zip(prompts, aims, strict=True)]
    return -chosen_Q / torch.tensor(lengths, device=chosen_Q.device)


def loss_kind(bench: Bench) -> str:
    """Which task loss the run trains with."""
    return "continuation" if bench.data.cloze else bench.setup.config.finetune.task_loss


def as_lists(likelihoods_QC: Tensor, prompts: Sequence[Prompt]) -> list[list[float]]:
    """Plain scores, a list a question as long as its choices."""
    rows = likelihoods_QC.detach().cpu().tolist()
    return [row[: len(p.choice_ids)] for row, p in zip(rows, prompts, strict=True)]
