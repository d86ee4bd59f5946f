"""The last router updated on fragile tokens, after "When Are Experts Misrouted?" (Yoon et al. 2026, arXiv 2605.07260).

From the paper's abstract: with the model held fixed, a token's standard route is compared with sampled routes of equal
compute, each scored by the next-token probability that it gives to the realized token of a verified trajectory. On fragile
tokens, unlike confident ones, better routes exist and are not chosen; a minimal update of the final layer's router, all else
frozen, moves some of them within reach.

This project's reading, where the paper's text was not at hand: the verified trajectory is a training question with its right
answer, its tokens the answer's; fragile is one whose probability under the base model is below `confidence`. Routes are
sampled by adding Gumbel noise to log r of the last router (a reading of the paper that others give too); a sampled route
takes the token's own r values in the perturbed order, so that it has the same weights over other experts. The router is then
trained, over the questions with such tokens, by cross-entropy to the best sampled route of each fragile token that has a
better one than its own: sum over its experts of -weight log r, weights scaled to sum 1.

Q questions, G answer tokens of a batch, T tokens, N kept tokens, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from roma_ray.baselines.bench import Bench
from roma_ray.baselines.budgeted_training import loop_settings, train
from roma_ray.baselines.contract import Fitted, Method
from roma_ray.config.schema import Config
from roma_ray.engine.answers import Answers
from roma_ray.engine.forward import Layout, lay_out
from roma_ray.errors import UnmovedError
from roma_ray.moe.masters import RouterMasters
from roma_ray.moe.overriding import override_routing
from roma_ray.moe.passes import run_packed
from roma_ray.moe.reading import read_choices, read_routing
from roma_ray.moe.routers import Router

# In place of 0, whose logarithm has no gradient.
_LEAST = 1e-30


class FragileTokens(Method):
    """The last router learns the better routes that the frozen model has for fragile tokens."""

    name = "fragile_tokens"
    title = "the last router trained to better sampled routes of fragile answer tokens (Misrouted)"
    trains = True
    seeded = True

    def configure(self, config: Config) -> dict[str, Any]:
        """The budget, the loop's settings, and how routes are sampled."""
        own = config.baselines.fragile.model_dump(mode="json")
        return {**super().configure(config), "finetune": loop_settings(config), "fragile": own}

    def prepare(self, bench: Bench, seed: int) -> dict[str, Tensor]:
        """Questions [n], answer tokens [n] and better routes [n, E] of the fragile tokens that have one. Raises UnmovedError."""
        settings, generator = bench.config.fragile, torch.Generator().manual_seed(seed)
        rows: list[int] = []
        tokens: list[int] = []
        routes: list[Tensor] = []
        seen = 0
        for batch in bench.batches(bench.rows["train"]):
            found = better_routes(AnswerPass(bench, batch), settings.confidence, settings.samples, generator)
            seen += found.fragile
            rows += [batch[q] for q in found.questions]
            tokens += found.tokens
            routes.append(found.routes_nE)
            bench.advance(len(batch), "routes of fragile tokens")
        if not rows:
            raise UnmovedError(
                f"fragile_tokens found no better route among {settings.samples} sampled ones for any of {seen:,} fragile "
                "answer tokens: raise baselines.fragile.samples or .confidence, or leave it out of --methods"
            )
        return {"rows": torch.tensor(rows), "tokens": torch.tensor(tokens), "routes": torch.cat(routes)}

    def fit(self, bench: Bench, prepared: dict[str, Tensor], learning_rate: float, seed: int) -> Fitted:
        """Train the last router towards the better routes, over the questions that have some."""
        wanted: dict[int, list[tuple[int, Tensor]]] = {}
        for row, token, route_E in zip(
            prepared["rows"].tolist(), prepared["tokens"].tolist(), prepared["routes"], strict=True
        ):
            wanted.setdefault(row, []).append((token, route_E))
        last = last_router(bench)
        masters = RouterMasters([last], [last.layer])

        def loss(rows: Sequence[int]) -> Tensor:
            run = AnswerPass(bench, rows)
            places = [run.number(q, token) for q, row in enumerate(rows) for token, _ in wanted[row]]
            target_nE = torch.stack([route_E for row in rows for _, route_E in wanted[row]]).to(bench.head.device)
            share_n = torch.tensor([1 / len(wanted[row]) for row in rows for _ in wanted[row]], device=target_nE.device)
            logr_nE = run.routing()[places].clamp_min(_LEAST).log()
            return -(share_n[:, None] * target_nE * logr_nE).sum()

        try:
            losses = train(bench, masters.parameters(), loss, sorted(wanted), learning_rate, seed)
            state = masters.state()
        finally:
            masters.detach()
        facts = {"losses": losses, "tokens": len(prepared["rows"]), "questions": len(wanted)}
        return Fitted(state, sum(gate.numel() for gate in state.values()), facts)

    def predict(self, bench: Bench, fitted: Fitted, rows: Sequence[int], seed: int) -> Answers:
        """The answers of the head with the trained router."""
        with bench.gates(fitted.tensors, [last_router(bench).layer]):
            return bench.answer(rows)


def last_router(bench: Bench) -> Router:
    """The router of the model's last layer that has experts, tuned or not."""
    return bench.head.routers[-1]


class AnswerPass:
    """Some questions with their right answers laid out for the head, read at the tokens that predict the answers'."""

    def __init__(self, bench: Bench, rows: Sequence[int]) -> None:
        self.head, states = bench.head, bench.data.states
        prompts = [bench.data.prompts[row] for row in rows]
        self.layout: Layout = lay_out(prompts, prefix=states.prefix, gold_only=bench.data.cloze)
        self.states_TD = states.packed(rows, self.layout)
        self.router = last_router(bench)
        golds = [
            question[0 if self.layout.gold_only else prompt.answer]
            for prompt, question in zip(prompts, self.layout.score_tokens, strict=True)
        ]
        self.starts = [sum(map(len, golds[:n])) for n in range(len(golds))]
        self.questions = [q for q, tokens in enumerate(golds) for _ in tokens]
        """Which question each answer token is of."""
        self.tokens = [n for tokens in golds for n in range(len(tokens))]
        """Its place in the answer."""
        self.positions_1G = torch.tensor([[t for tokens in golds for t in tokens]], device=self.head.device)
        self.targets_G = torch.tensor([t for p in prompts for t in p.choice_ids[p.answer]], device=self.head.device)
        self.keep = sorted(set(self.positions_1G[0].tolist()))

    def number(self, question: int, token: int) -> int:
        """Where an answer token lies among all of them."""
        return self.starts[question] + token

    def routing(self) -> Tensor:
        """r of the last router at the answer tokens, [G, E], with graph."""
        with read_routing(self.head.model, [self.router], self.positions_1G) as tape:
            # Logits are not read: one row of `lm_head` is the least that there is.
            self._run(torch.tensor([0]))
        return tape.routing_BPLE[0, :, 0]

    @torch.no_grad()
    def likelihoods(self, routing_GE: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-probability of each answer token among the whole vocabulary [G], and the route that it was given with [G, E].

        A route: the weights of the experts that the last router chose, scaled to sum 1. With `routing_GE` it routes by that.
        """
        replaced: AbstractContextManager[None] = nullcontext()
        if routing_GE is not None:
            replaced = override_routing(self.head.model, [self.router], routing_GE[None, :, None], self.positions_1G)
        with replaced, read_choices([self.router], self.positions_1G[0]) as choices:
            logits_NV = self._run()
        weights_GK, index_GK = choices[self.router.layer]
        shares_GK = weights_GK.float() / weights_GK.float().sum(1, keepdim=True)
        routes_GE = torch.zeros(len(index_GK), self.router.width, device=index_GK.device)
        routes_GE.scatter_(1, index_GK, shares_GK)
        place_G = torch.searchsorted(torch.tensor(self.keep, device=logits_NV.device), self.positions_1G[0])
        return torch.log_softmax(logits_NV.float(), dim=-1)[place_G, self.targets_G], routes_GE

    def _run(self, vocabulary_V: Tensor | None = None) -> Tensor:
        return run_packed(
            self.head,
            self.layout.packing,
            self.states_TD,
            resume=True,
            keep=self.keep,
            vocabulary_rows=vocabulary_V,
        ).states


@dataclass(frozen=True)
class Better:
    """The answer tokens of some questions for which a better route was found."""

    fragile: int
    """How many of the questions' answer tokens are fragile."""
    questions: list[int]
    tokens: list[int]
    routes_nE: Tensor


def better_routes(run: AnswerPass, confidence: float, samples: int, generator: torch.Generator) -> Better:
    """The best of `samples` Gumbel-perturbed routes of each fragile token, where one over other experts beats its own."""
    start_G, standard_GE = run.likelihoods()
    fragile_G = start_G.exp() < confidence
    best_G, best_GE = start_G.clone(), standard_GE.clone()
    own_GE = run.routing().detach()
    values_GE = own_GE.sort(dim=-1, descending=True).values
    for _ in range(samples if bool(fragile_G.any()) else 0):
        uniform_GE = torch.rand(own_GE.shape, generator=generator).clamp_min(_LEAST).to(own_GE.device)
        perturbed_GE = own_GE.clamp_min(_LEAST).log() - (-uniform_GE.log()).clamp_min(_LEAST).log()
        order_GE = perturbed_GE.argsort(dim=-1, descending=True)
        logp_G, routes_GE = run.likelihoods(torch.zeros_like(own_GE).scatter(1, order_GE, values_GE))
        # The token's own experts in another order are no other route.
        other_G = ((routes_GE > 0) != (standard_GE > 0)).any(1)
        better_G = other_G & (logp_G > best_G)
        best_G = torch.where(better_G, logp_G, best_G)
        best_GE = torch.where(better_G[:, None], routes_GE, best_GE)
    chosen = (fragile_G & (best_G > start_G)).nonzero()[:, 0].tolist()
    questions, tokens = [run.questions[n] for n in chosen], [run.tokens[n] for n in chosen]
    return Better(int(fragile_G.sum()), questions, tokens, best_GE[chosen].cpu())
