"""A batch of questions through the head, differentiable, with its routing at the last prompt token replaced where wanted.

Q questions of a batch, C most choices, T flat tokens, N kept tokens, V vocabulary, L tuned layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from roma_ray.baselines.bench import Bench
from roma_ray.config.schema import Config
from roma_ray.engine.forward import Layout, lay_out
from roma_ray.engine.identity import is_cloze
from roma_ray.errors import UnmovedError
from roma_ray.moe.overriding import override_routing
from roma_ray.moe.passes import run_packed
from roma_ray.moe.reach import UNREACHED, reach_of, read_weights
from roma_ray.moe.reading import read_routing
from roma_ray.questions.prompts import Prompt

LEAST = 1e-6
"""In place of 0, whose logarithm has no gradient to move along."""
_LOOKED_AT = 32


class HeadRun:
    """Some questions laid out for the head, which can then be run with one routing after another.

    A question may stand several times in `rows`. Only the last prompt token's routing is ever replaced: tokens of a
    continuation keep their own.
    """

    def __init__(self, bench: Bench, rows: Sequence[int]) -> None:
        self.head, states = bench.head, bench.data.states
        self.prompts = [bench.data.prompts[row] for row in rows]
        self.layout = lay_out(self.prompts, prefix=states.prefix)
        self.states_TD = states.packed(rows, self.layout)
        self.routers = [self.head.routers[n] for n in bench.columns]
        self.last_1Q = torch.tensor([self.layout.ends], device=self.head.device)
        self.keep = self.layout.keep(self.last_1Q)
        self.reading = ChoiceReading(self.layout, self.keep, self.head.device)

    def likelihoods(self, routing_QLE: Tensor | None = None) -> Tensor:
        """Log-likelihood of every choice [Q, C], fp32 with graph, under r = `routing_QLE` at the last prompt token.

        Entries beyond a question's choices are minus infinity. Without `routing_QLE` the head routes by itself.
        """
        replaced: AbstractContextManager[None] = nullcontext()
        if routing_QLE is not None:
            replaced = override_routing(self.head.model, self.routers, routing_QLE[None], self.last_1Q)
        with replaced:
            return self.reading(self._run())

    def own_routing(self) -> Tensor:
        """The head's own r at the last prompt token: [Q, L, E], fp32."""
        with read_routing(self.head.model, self.routers, self.last_1Q) as tape, torch.no_grad():
            self._run()
        return tape.routing_BPLE[0]

    def reach(self) -> float:
        """The least reach of a loss on log r at the last prompt token, over the tuned layers (see `moe/reach.py`)."""
        z_QLE = self.own_routing().clamp_min(LEAST).log().requires_grad_()
        routing_QLE = z_QLE.softmax(-1)
        with read_weights(self.routers) as weights:
            self.likelihoods(routing_QLE)
        return min(
            reach_of(weights[router.layer].flatten(0, -2), routing_QLE[:, n], [z_QLE])
            for n, router in enumerate(self.routers)
        )

    def _run(self) -> Tensor:
        out = run_packed(self.head, self.layout.packing, self.states_TD, resume=True, keep=self.keep)
        return out.states


def check_reach(bench: Bench, name: str) -> None:
    """Refuse a method that would follow rounding noise. Raises UnmovedError."""
    reach = HeadRun(bench, bench.batches(bench.rows["train"][:_LOOKED_AT])[0]).reach()
    if reach < UNREACHED:
        raise UnmovedError(
            f"{name} moves routing weights along the gradient of the task loss, and the weights that these routers give their "
            f"experts do not depend on them (d(weights)/d(r) is {reach:.1g}), as where one expert is taken and its weight scaled "
            "to 1. It would follow rounding noise: leave it out of --methods"
        )


class ChoiceReading:
    """Where each token of each choice is predicted, so that all log-likelihoods are one gather and one sum."""

    def __init__(self, layout: Layout, keep: Sequence[int], device: torch.device) -> None:
        assert not layout.gold_only
        place = {token: n for n, token in enumerate(keep)}
        found = [
            (place[token], target, number, choice)
            for number, (prompt, question) in enumerate(zip(layout.prompts, layout.score_tokens, strict=True))
            for choice, tokens in enumerate(question)
            for token, target in zip(tokens, prompt.choice_ids[choice], strict=True)
        ]
        self.index = torch.tensor(found, device=device).T
        self.absent_QC = absent_choices(layout.prompts).to(device)

    def __call__(self, logits_NV: Tensor) -> Tensor:
        """Log-likelihoods [Q, C] from the logits at the kept tokens."""
        row, target, number, choice = self.index
        return summed(torch.log_softmax(logits_NV.float(), dim=-1)[row, target], number, choice, self.absent_QC)


def absent_choices(prompts: Sequence[Prompt]) -> Tensor:
    """Mask [Q, C] of the places beyond each question's choices."""
    widths = torch.tensor([len(p.choice_ids) for p in prompts])
    return torch.arange(int(widths.max()))[None] >= widths[:, None]


def summed(logp: Tensor, number: Tensor, choice: Tensor, absent_QC: Tensor) -> Tensor:
    """Token log-likelihoods added up by question and choice: [Q, C], minus infinity where there is no choice."""
    empty_QC = torch.zeros(absent_QC.shape, device=logp.device)
    return empty_QC.index_put((number, choice), logp, accumulate=True).masked_fill(absent_QC, -torch.inf)


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


def loss_kind(config: Config) -> str:
    """Which task loss the run trains with."""
    return "continuation" if is_cloze(config) else config.finetune.task_loss


def as_lists(likelihoods_QC: Tensor, prompts: Sequence[Prompt]) -> list[list[float]]:
    """Plain scores, a list a question as long as its choices."""
    rows = likelihoods_QC.detach().cpu().tolist()
    return [row[: len(p.choice_ids)] for row, p in zip(rows, prompts, strict=True)]
