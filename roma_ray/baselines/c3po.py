"""C3PO (Li et al. 2025, arXiv 2504.07964): each test question's expert weights re-mixed at test time, without its label.

The paper's three surrogates for the unknown loss, each over the successful neighbors of the question: neighborhood
gradient descent, kernel regression, and mode finding. As there: the critical layers (here the tuned ones, by default the
last five), the last token, the core experts only (the 20 highest-weighed of 64, here as a fraction), k = 3, Gaussian kernel.

Q test questions of a batch, K neighbors of each, M of their copies (Q x K), L tuned layers, E experts, S references.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from roma_ray.baselines.bench import Bench
from roma_ray.baselines.contract import NOTHING, Fitted, Method
from roma_ray.baselines.head_passes import LEAST, HeadRun, as_lists, check_reach, loss_kind, task_loss
from roma_ray.config.baseline_settings import C3poConfig
from roma_ray.config.schema import Config
from roma_ray.engine.answers import Answers
from roma_ray.manifold.neighbors import Neighborhoods


class C3po(Method):
    """Neighborhood gradient descent: the neighbors' kernel-weighted loss under the test question's own weights."""

    name = "c3po"
    title = "test-time re-mixing by the neighbors' loss (neighborhood gradient descent)"
    works_on: str | None = "test"

    reads = frozenset({"neighbors", "core_fraction", "steps", "step_size"})
    """Which of the settings `baselines.c3po` act."""

    def configure(self, config: Config) -> dict[str, Any]:
        """The surrogate's settings, the kernel's width and the loss."""
        settings = config.baselines.c3po.model_dump(mode="json", include=set(self.reads))
        return {"c3po": settings, "sigma": config.neighbors.sigma, "task_loss": loss_kind(config)}

    def check(self, bench: Bench) -> None:
        """Look whether there is a gradient to follow. Raises UnmovedError."""
        check_reach(bench, self.name)

    def fit(self, bench: Bench, prepared: dict[str, Tensor], learning_rate: float, seed: int) -> Fitted:
        """Nothing is learned before the questions. Raises as `check`."""
        self.check(bench)
        return NOTHING

    def parts(self, bench: Bench) -> list[list[int]]:
        """With each question run its neighbors."""
        return bench.batches(bench.rows["test"], copies=self._copies(bench))

    def work(self, bench: Bench, rows: Sequence[int], seed: int) -> Answers:
        """As `predict`; the neighbors of all test questions are searched at once."""
        near = bench.once(f"{C3po.name} neighbors", lambda: bench.neighbors_of(bench.rows["test"]))
        return self._answers(bench, rows, near)

    def predict(self, bench: Bench, fitted: Fitted, rows: Sequence[int], seed: int) -> Answers:
        """The answers under the re-mixed routing; a question without neighbors keeps its own."""
        return self._answers(bench, rows, bench.neighbors_of(rows))

    def _answers(self, bench: Bench, rows: Sequence[int], near: Neighborhoods) -> Answers:
        def reroute(batch: list[int], own_QLE: Tensor) -> Tensor:
            routing_QLE = own_QLE.clone()
            if led := [n for n, row in enumerate(batch) if len(near.of(row)[0])]:
                neighborhood = Neighborhood(bench, [batch[n] for n in led], near)
                routing_QLE[led] = self.remix(neighborhood, own_QLE[led], core_experts(bench, own_QLE[led]))
            return routing_QLE

        return answers_under(bench, rows, reroute, self.name, copies=self._copies(bench))

    def _copies(self, bench: Bench) -> int:
        return 1 + bench.config.c3po.neighbors

    def remix(self, near: Neighborhood, own_QLE: Tensor, core_QLE: Tensor) -> Tensor:
        """The new routing [Q, L, E] of the batch's questions."""
        settings = near.bench.config.c3po
        start_QLE = own_QLE.clamp_min(LEAST).log()
        z_QLE = start_QLE.clone().requires_grad_()
        adam = torch.optim.Adam([z_QLE], lr=settings.step_size)
        for _ in range(settings.steps):
            loss = near.losses(torch.where(core_QLE, z_QLE, start_QLE).softmax(-1)).sum()
            (z_QLE.grad,) = torch.autograd.grad(loss, [z_QLE])
            adam.step()
        return torch.where(core_QLE, z_QLE, start_QLE).softmax(-1).detach()


class C3poKernel(C3po):
    """Kernel regression: towards the neighbors' weighted mean, as far as their own loss says."""

    name = "c3po_kernel"
    title = "test-time re-mixing towards the neighbors' mean routing (kernel regression)"
    reads = frozenset({"neighbors", "core_fraction", "alphas"})

    def check(self, bench: Bench) -> None:
        """It tries mixtures, and follows no gradient."""

    def remix(self, near: Neighborhood, own_QLE: Tensor, core_QLE: Tensor) -> Tensor:
        """The best of alpha ω + (1 - alpha) ω̂ under the neighbors' kernel-weighted loss, for each question.

        Of equally good ones the nearest to the question's own routing.
        """
        mean_QLE = near.mean_routing()
        best_Q = torch.full((len(own_QLE),), torch.inf, device=own_QLE.device)
        best_QLE = own_QLE
        for alpha in sorted(near.bench.config.c3po.alphas, reverse=True):
            mixed_QLE = mixed(own_QLE, mean_QLE, alpha, core_QLE)
            with torch.no_grad():
                loss_Q = near.losses(mixed_QLE)
            better_Q = loss_Q < best_Q
            best_Q = torch.where(better_Q, loss_Q, best_Q)
            best_QLE = torch.where(better_Q[:, None, None], mixed_QLE, best_QLE)
        return best_QLE


class C3poMode(C3po):
    """Mode finding: mean shift among the successful questions' routing rows."""

    name = "c3po_mode"
    title = "test-time re-mixing towards the densest successful routing (mode finding)"
    # A pass or two over the head, as for the answers themselves.
    works_on = None
    reads = frozenset({"neighbors", "core_fraction", "steps", "mode_alpha"})

    def configure(self, config: Config) -> dict[str, Any]:
        """The surrogate's settings: its kernel's width comes from the references, and it has no loss."""
        return {"c3po": super().configure(config)["c3po"]}

    def prepare(self, bench: Bench, seed: int) -> dict[str, Tensor]:
        """Routing rows r [S, L, E] of the reference set, at the last prompt token."""
        return {"references": reference_routing(bench, bench.data.successful_N.nonzero()[:, 0].tolist())}

    def fit(self, bench: Bench, prepared: dict[str, Tensor], learning_rate: float, seed: int) -> Fitted:
        """Keep the reference set."""
        return Fitted(prepared)

    def predict(self, bench: Bench, fitted: Fitted, rows: Sequence[int], seed: int) -> Answers:
        """The answers under the shifted routing."""

        def reroute(batch: list[int], own_QLE: Tensor) -> Tensor:
            references_SLE = fitted.tensors["references"].to(own_QLE.device)
            return mean_shift(own_QLE, references_SLE, core_experts(bench, own_QLE), bench.config.c3po)

        return answers_under(bench, rows, reroute, self.name)


def answers_under(
    bench: Bench, rows: Sequence[int], reroute: Callable[[list[int], Tensor], Tensor], name: str, *, copies: int = 1
) -> Answers:
    """The answers, and the routing that they were given under: `reroute` of each batch and its own routing [Q, L, E]."""
    found: dict[int, tuple[list[float], np.ndarray]] = {}
    for batch in bench.batches(rows, copies=copies):
        run = HeadRun(bench, batch)
        routing_QLE = reroute(batch, run.own_routing())
        with torch.no_grad():
            scores = as_lists(run.likelihoods(routing_QLE), run.prompts)
        for number, row in enumerate(batch):
            found[row] = (scores[number], routing_QLE[number].cpu().numpy())
        bench.advance(len(batch), name)
    return Answers(list(rows), [found[r][0] for r in rows], routing_NLE=np.stack([found[r][1] for r in rows]))


class Neighborhood:
    """The successful neighbors of a batch of questions (of each at least one), and their loss under those questions' routing."""

    def __init__(self, bench: Bench, rows: Sequence[int], near: Neighborhoods) -> None:
        self.bench = bench
        parts = [near.of(row) for row in rows]
        self.rows = [int(n) for indices, _, _ in parts for n in indices]
        self.owner = torch.tensor([n for n, part in enumerate(parts) for _ in part[0]], device=bench.head.device)
        self.weights_M = torch.cat([part[2] for part in parts]).float().to(bench.head.device)
        self.count = len(rows)
        self.run = HeadRun(bench, self.rows)
        self.aims = [prompt.answer for prompt in self.run.prompts]

    def losses(self, routing_QLE: Tensor) -> Tensor:
        """Kernel-weighted task loss [Q] of each question's neighbors, all of which take the question's own routing."""
        likelihoods_MC = self.run.likelihoods(routing_QLE[self.owner])
        losses_M = self.weights_M * task_loss(
            likelihoods_MC, self.aims, self.run.prompts, loss_kind(self.bench.setup.config)
        )
        return torch.zeros(self.count, device=losses_M.device).index_add(0, self.owner, losses_M)

    def mean_routing(self) -> Tensor:
        """ω̂: the neighbors' kernel-weighted mean routing [Q, L, E]."""
        weighted_MLE = self.weights_M[:, None, None] * self.run.own_routing()
        total_QLE = torch.zeros(self.count, *weighted_MLE.shape[1:], device=weighted_MLE.device)
        return total_QLE.index_add(0, self.owner, weighted_MLE)


def core_experts(bench: Bench, routing_QLE: Tensor) -> Tensor:
    """Mask [Q, L, E] of each layer's core experts: the highest-weighed ones, never fewer than the model selects."""
    router = bench.head.routers[0]
    count = min(router.width, max(router.top_k, round(bench.config.c3po.core_fraction * router.width)))
    chosen = routing_QLE.topk(count, dim=-1).indices
    return torch.zeros_like(routing_QLE, dtype=torch.bool).scatter(-1, chosen, True)


def mixed(own_QLE: Tensor, other_QLE: Tensor, alpha: float, core_QLE: Tensor) -> Tensor:
    """alpha ω + (1 - alpha) ω̂ in the core experts, ω elsewhere, scaled to sum 1."""
    both_QLE = torch.where(core_QLE, alpha * own_QLE + (1 - alpha) * other_QLE, own_QLE)
    return both_QLE / both_QLE.sum(-1, keepdim=True)


def mean_shift(own_QLE: Tensor, references_SLE: Tensor, core_QLE: Tensor, settings: C3poConfig) -> Tensor:
    """ω ← alpha ω + (1 - alpha) ω̄ over and over, ω̄ the Gaussian-weighted mean of the nearest references in pathway space.

    The kernel's width is the distance to the furthest of the k nearest, so that the kernel fits any number of experts.
    """
    routing_QLE = own_QLE
    flat_SF = references_SLE.flatten(1)
    count = min(settings.neighbors, len(flat_SF))
    for _ in range(settings.steps):
        near_Qk, index_Qk = torch.cdist(routing_QLE.flatten(1), flat_SF).topk(count, dim=1, largest=False)
        width_Q1 = near_Qk[:, -1:].clamp_min(LEAST)
        weights_Qk = torch.softmax(-0.5 * (near_Qk / width_Q1).square(), dim=1)
        mean_QLE = (weights_Qk[:, :, None, None] * references_SLE[index_Qk]).sum(1)
        routing_QLE = mixed(routing_QLE, mean_QLE, settings.mode_alpha, core_QLE)
    return routing_QLE


def reference_routing(bench: Bench, rows: Sequence[int]) -> Tensor:
    """The base model's own r at the last prompt token: [rows, L, E], fp32."""
    scores = bench.score(rows)
    return torch.from_numpy(scores.routing_NLE[:, bench.columns])
