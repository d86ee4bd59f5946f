"""The objective of eq. 9 on some questions, and what it reads: states after the cut's attention, prompts, neighborhoods.

Q questions of a micro-batch, T flat tokens, P read positions, D width, V vocabulary rows, L tuned layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from roma_ray.config.finetune_settings import FinetuneConfig, RegularizerConfig
from roma_ray.engine.batches import chunks
from roma_ray.engine.cache import States, prefetched
from roma_ray.engine.collapse import routing_figures
from roma_ray.engine.distillation import Targets, Teacher, distillation_losses
from roma_ray.engine.extractor import Reading
from roma_ray.engine.forward import lay_out, letter_rows, mean_routing, task_losses
from roma_ray.engine.schedules import Moment
from roma_ray.engine.scoring import Scores, joined, score_each
from roma_ray.errors import ConfigError, UnmovedError
from roma_ray.manifold.losses import NeighborTargets, neighbor_targets, position_targets, pulled
from roma_ray.manifold.neighbors import Neighborhoods
from roma_ray.manifold.priors import base_targets, task_targets, uniform_targets
from roma_ray.manifold.regularizers import REGULARIZERS, Regularized, yardstick
from roma_ray.moe.head_chain import BegunPass, Chain, Pass, as_chain
from roma_ray.moe.layers import aligned_positions
from roma_ray.moe.links import PassPlan
from roma_ray.moe.masters import RouterMasters
from roma_ray.moe.reach import UNREACHED, WeightsReader, is_unreached, read_weights
from roma_ray.moe.routers import Router
from roma_ray.moe.sending import pinned, sent
from roma_ray.moe.slices import Slice
from roma_ray.questions.prompts import Prompt
from roma_ray.store.scratch import roomy_zeros

# Below this part of the task term's gradient the regularizer is idle, and the run says so.
IDLE_RATIO = 0.01


# Beside the other term a gradient of this part of it, or less, is lost in fp32.
_LOST = 1e-6

# Where a regularizer begins without a gradient.
_FLAT = {
    "manifold": "So it is where every question has the routing that it is pulled to (neighbors.method: self), and where routers are "
    "so certain that the squared distance has no gradient (then finetune.regularizer.distance: kl has one).",
    "base": "So it always is before the first step: kind `base` pulls each question to its own routing at the start.",
    "prior": "So it is where every question has the prior's routing.",
    "entropy": "So it is where the entropy of every row is past finetune.regularizer.entropy_target, or at its own end.",
}


def is_idle(probe: Mapping[str, float], regularizer: RegularizerConfig) -> bool:
    """Whether a regularizer that was asked for hardly pulls on the gates. A λ of 0 asks for none."""
    if is_unreached(probe) or is_noise(probe, regularizer):
        return False
    return _is_asked_for(regularizer) and probe["gradient_ratio"] < IDLE_RATIO


def is_noise(probe: Mapping[str, float], regularizer: RegularizerConfig) -> bool:
    """Whether a training's probe says that the gradient of the regularizer that was asked for began as rounding noise."""
    return _is_asked_for(regularizer) and probe.get("regularizer_noise", 0.0) > 0


def _is_asked_for(regularizer: RegularizerConfig) -> bool:
    return regularizer.kind != "none" and regularizer.weight != 0


def noise_level(dtype: torch.dtype) -> float:
    """The part of its yardstick's gradient at which the manifold term's is rounding noise, in a model of this type.

    Measured on a CPU, tiny models in fp32 and bf16 and the embedded one: 2e-7 or less where the target is the question's own row,
    0.3 or more where it is the neighbors'. The root leaves room for passes of a GPU that round otherwise.
    """
    return float(torch.finfo(dtype).eps) ** 0.5 / 4


def check_widths(routers: Sequence[Router], term: RegularizerConfig) -> None:
    """Refuse a regularizer that means the number of experts where tuned layers have different ones. Raises ConfigError."""
    counts = sorted({router.num_experts for router in routers})
    uniform = term.kind == "prior" and term.prior == "uniform"
    if len(counts) > 1 and (uniform or (term.kind == "entropy" and term.entropy_target is not None)):
        asked = "prior: uniform" if uniform else "entropy_target"
        raise ConfigError(
            f"finetune.regularizer.{asked} needs one number of experts, and the tuned layers have {counts}: choose layers that are "
            "alike (routing.layers), or another regularizer"
        )


@dataclass
class TrainingData:
    """What the loop reads: everything by row number of the question table."""

    prompts: Sequence[Prompt]
    states: States
    train: list[int]
    validation: list[int]
    neighborhoods: Neighborhoods
    routing_NLE: Tensor
    """The base model's r of every question at the tuned layers, fp32; r_j of eq. 7 unless refreshed."""
    successful_N: Tensor
    """Mask of S (eq. 2)."""
    base_NLE: Tensor | None
    """The base model's r again, what an epoch's routing is compared with; None where that of `tokens` is not known."""
    tokens: str
    rule: str
    cloze: bool
    batch_tokens: int
    teacher: Teacher | None = None
    """What a teacher says at the answers' tokens (task loss `distill`)."""


@dataclass(frozen=True)
class Micro:
    """A micro-batch, ready for the head."""

    rows: list[int]
    reading: Reading
    states_TD: Tensor
    vocabulary_V: Tensor | None
    """The rows of `lm_head` that the task loss reads, where not all."""
    targets: Targets | None
    """What the teacher says, where there is one."""


class Objective:
    """The objective of eq. 9 on some rows, as sums over questions."""

    def __init__(
        self,
        config: FinetuneConfig,
        head: Slice | Chain,
        data: TrainingData,
        masters: RouterMasters,
        weights: WeightsReader = read_weights,
    ) -> None:
        self.config, self.data, self.masters = config, data, masters
        self.head = as_chain(head)
        self.read_weights = weights
        self.device = str(self.head.device)
        self.columns = [n for n, router in enumerate(head.routers) if router.layer in masters.layers]
        term = config.regularizer
        # Whether each position has its own pull. Extraction keeps their mean row alone, so the rows are read here.
        self.each = term.kind == "manifold" and term.positions == "sum"
        self.longest = max(len(prompt.prompt_ids) for prompt in data.prompts) if self.each else 0
        check_widths([head.routers[n] for n in self.columns], term)
        # Whether the task loss reaches the tuned routers at all; `settle` says so.
        self.with_task = True
        self.over = "continuation" if data.cloze and config.task_loss != "distill" else config.task_loss
        assert self.over != "distill" or data.teacher is not None, "what the teacher says is at hand"
        self.targets = self._targets()

    def feed(self, parts: Sequence[Sequence[int]]) -> Iterator[Micro]:
        """The micro-batches of these rows, each read while the one before is computed."""
        return prefetched(self.prepare, parts)

    def prepare(self, rows: Sequence[int]) -> Micro:
        """Lay out a micro-batch and read its states. Raises CacheError."""
        teacher = self.data.teacher if self.over == "distill" else None
        prompts, gold_only = [self.data.prompts[row] for row in rows], self.data.cloze or teacher is not None
        layout = lay_out(prompts, prefix=self.data.states.prefix, gold_only=gold_only)
        # Pinned here, in the thread that reads ahead: the copy then does not wait for the step before.
        states_TD = pinned(self.data.states.packed(rows, layout), self.device)
        vocabulary = letter_rows(layout.prompts) if self.over == "choices" else None
        tokens = self.data.tokens
        places = layout.aligned_positions(tokens, self.longest) if self.each else layout.routing_positions(tokens)
        targets = None if teacher is None else teacher.targets(rows)
        return Micro(list(rows), Reading.at(layout, {tokens: places}), states_TD, vocabulary, targets)

    def losses(self, micro: Micro, now: Moment | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(task, regularizer, routing entropy) summed over a micro-batch; the first two carry the graph.

        `now` is the step whose temperature and dropout the router logits go through; without it they stay as they are.
        """
        task, on, entropy = self._terms(micro, self._run(micro, now))
        return task, REGULARIZERS[self.config.regularizer.kind](on), entropy

    def _terms(self, micro: Micro, done: Pass) -> tuple[Tensor, Regularized, Tensor]:
        """As `losses`, of a pass, with what the regularizer may see in its place."""
        reading, states = micro.reading, done.states
        positions_QP = sent(reading.positions[self.data.tokens], self.device)
        routing_QLE = mean_routing(done.routing_1PLE, positions_QP)
        if micro.targets is None:
            task = task_losses(states, reading.keep, reading.layout, over=self.over, rows_V=micro.vocabulary_V)
        else:
            task = distillation_losses(states, reading.keep, reading.layout, micro.targets)
        own = self.targets.take(torch.tensor(micro.rows))
        targets = NeighborTargets(*(sent(column, self.device) for column in own))
        rows = pulled(done.routing_1PLE[0].unflatten(0, positions_QP.shape), targets) if self.each else routing_QLE
        term = self.config.regularizer
        on = Regularized(
            rows, targets, self.masters.parameters(), term.distance, term.entropy_sign, term.entropy_target
        )
        entropy = -(routing_QLE * routing_QLE.clamp_min(1e-30).log()).sum(-1).mean(-1).sum().detach()
        return task, on, entropy

    def _plan(self, micro: Micro, now: Moment | None = None) -> PassPlan:
        """What a pass over a micro-batch is to do."""
        layout, layers = micro.reading.layout, self.masters.layers
        width = self.masters.routers[0].width
        factors = None if now is None else now.logit_factors(layout, len(layers), width)
        return PassPlan(layout.packing, micro.reading.flat_positions, layers, factors)

    def _begin(self, micro: Micro, now: Moment | None = None, *, graph: bool = True) -> BegunPass:
        return self.head.begin(self._plan(micro, now), micro.states_TD, graph=graph)

    def _finish(self, micro: Micro, begun: BegunPass) -> Pass:
        return self.head.finish(begun, keep=micro.reading.keep, vocabulary_rows=micro.vocabulary_V)

    def _run(self, micro: Micro, now: Moment | None = None) -> Pass:
        """The tuned layers' routing rows [1, Q * P, L, E] at a micro-batch's positions, and the logits at its kept tokens."""
        return self._finish(micro, self._begin(micro, now))

    def _targets(self) -> NeighborTargets:
        """What the regularizer pulls each question to."""
        term, data = self.config.regularizer, self.data
        if term.kind == "base":
            return base_targets(data.routing_NLE)
        if term.kind == "prior" and term.prior == "uniform":
            return uniform_targets(data.routing_NLE)
        if term.kind == "prior":
            tasks = [prompt.task for prompt in data.prompts]
            return task_targets(data.routing_NLE, tasks, data.successful_N, roomy_zeros)
        if self.each:
            return self._targets_of_each()
        return neighbor_targets(data.neighborhoods, data.routing_NLE, roomy_zeros)

    @torch.no_grad()
    def _targets_of_each(self) -> NeighborTargets:
        """Targets of a pull at each position, from the neighbors' rows under the routers as they are now."""
        data = self.data
        lengths, kind_N = torch.tensor([len(prompt.prompt_ids) for prompt in data.prompts]).unique(return_inverse=True)
        places = [aligned_positions(data.tokens, length, self.longest) for length in lengths.tolist()]
        present_NP = (torch.tensor(places) >= 0)[kind_N]
        routing_NPLE = roomy_zeros(*present_NP.shape, *data.routing_NLE.shape[1:])
        feed = self.feed(chunks(data.neighborhoods.indices.unique().tolist(), self.config.micro_batch_size))
        for micro, begun in self.head.ahead(feed, partial(self._begin, graph=False)):
            routing_1PLE = self._finish(micro, begun).routing_1PLE
            routing_NPLE[micro.rows] = routing_1PLE[0].unflatten(0, (len(micro.rows), -1)).float().cpu()
        return position_targets(data.neighborhoods, routing_NPLE, present_NP, roomy_zeros)

    def gradients(self, micro: Micro, now: Moment) -> Tensor:
        """One flat fp32 vector: every gate's gradient sum, then the sums of task loss, regularizer, entropy and objective.

        Whether they are finite is seen once a step (`apply`): to look here would make a GPU wait at each micro-batch.
        """
        return self.gradients_of([micro], now)[0]

    def gradients_of(self, micros: Iterable[Micro], now: Moment) -> list[Tensor]:
        """`gradients` of each micro-batch of a step; of a chain of slices all work at once, on different ones."""
        passes = self.head.ahead(micros, lambda micro: self._begin(micro, now))
        begun = [self._backward(micro, self._finish(micro, one), now) for micro, one in passes]
        return [collect() for collect in begun]

    def _backward(self, micro: Micro, done: Pass, now: Moment) -> Callable[[], Tensor]:
        """Begin the backward pass of the objective; what is returned waits for its gradients, flat with the sums."""
        task, on, entropy = self._terms(micro, done)
        penalty = REGULARIZERS[self.config.regularizer.kind](on)
        # Adding an unused term would still be exact, but a run without one must be readable as such.
        loss = now.task * task if now.strength == 0 else now.task * task + now.strength * penalty
        if not self.with_task:
            # Its gradient is rounding noise, which Adam would make steps of.
            loss = now.strength * penalty
        sums = torch.stack([task.detach(), penalty.detach(), entropy, loss.detach()]).float()
        collect = self.head.gradients(done, loss, self.masters)

        def flat() -> Tensor:
            parts = zip(collect(), self.masters.parameters(), strict=True)
            return torch.cat([*((torch.zeros_like(g) if p is None else p).reshape(-1) for p, g in parts), sums])

        return flat

    def validation(self) -> Scores:
        """The answers of the routers as they are now to the validation questions."""
        return self._score(self.data.validation)

    def routing_figures(self, answers: Scores) -> dict[str, Any] | None:
        """What the validation pass tells of each tuned layer's routing (`engine/collapse.py`); None without the base model's."""
        if self.data.base_NLE is None:
            return None
        tuned_VLE = torch.from_numpy(answers.routing_NLE[:, self.columns])
        routers = [self.head.routers[n] for n in self.columns]
        counts = [router.num_experts for router in routers]
        figures = routing_figures(tuned_VLE, self.data.base_NLE[answers.rows], routers[0].top_k, counts)
        return {"layers": list(self.masters.layers), **figures}

    def _score(self, rows: Sequence[int]) -> Scores:
        return joined(list(self._scores(rows))).of(rows)

    def _scores(self, rows: Sequence[int]) -> Iterator[Scores]:
        """Answers to some questions, a batch at a time."""
        data = self.data
        how: dict[str, Any] = {"tokens": data.tokens, "rule": data.rule, "batch_tokens": data.batch_tokens}
        return score_each(self.head, data.states, data.prompts, rows, **how)

    def probe(self, rows: Sequence[int], weight: float | None = None) -> dict[str, float]:
        """Gradient norm of each term on the gates over some rows, their ratio, and the lambda in force.

        `weight` is the lambda in force; without it, that of the configuration. Raises TrainingError where `auto` finds nothing
        to divide by.
        """
        task_norm, penalty_norm, scale = self._gradient_norms(rows)
        reach = self._reach(rows[: self.config.micro_batch_size])
        noise = penalty_norm <= noise_level(self.head.dtype) * scale
        if reach >= UNREACHED:
            noise |= penalty_norm <= _LOST * task_norm
        if weight is None:
            weight = self._weight(task_norm, penalty_norm, reach, noise)
        ratio = weight * penalty_norm / task_norm if task_norm and reach >= UNREACHED else 0.0
        return {
            "reach": reach,
            "task_gradient": task_norm,
            "regularizer_gradient": penalty_norm,
            "regularizer_noise": float(noise),
            "gradient_ratio": ratio,
            "weight": weight,
        }

    def _weight(self, task_norm: float, penalty_norm: float, reach: float, noise: bool) -> float:
        """The configured lambda, `auto` resolved. Raises TrainingError."""
        regularizer = self.config.regularizer
        if regularizer.kind == "none":
            return 0.0
        if regularizer.weight != "auto":
            return float(regularizer.weight)
        if reach < UNREACHED:
            # There is nothing to weigh the term against, and Adam's steps do not depend on its scale.
            return 1.0
        if noise:
            raise UnmovedError(
                f"finetune.regularizer.weight: auto would divide by rounding noise: at the start the regularizer's gradient on the "
                f"gates is {penalty_norm:.1g}, the task term's {task_norm:.1g}. {_FLAT.get(regularizer.kind, '')} Give a "
                "number instead: the run prints the ratio of the two gradients at its end, by which to correct it."
            )
        return regularizer.gradient_ratio * task_norm / penalty_norm

    def _gradient_norms(self, rows: Sequence[int]) -> tuple[float, float, float]:
        """Gradient norms on the gates, a question: of the task term, of the regularizer, and of the latter's yardstick (else 0)."""
        gates = self.masters.parameters()
        kind = self.config.regularizer.kind
        totals = [[torch.zeros_like(g) for g in gates] for _ in range(3)]
        feed = self.feed(chunks(rows, self.config.micro_batch_size))
        for micro, begun in self.head.ahead(feed, self._begin):
            done = self._finish(micro, begun)
            task, on, _ = self._terms(micro, done)
            for term, total in zip((task, REGULARIZERS[kind](on), yardstick(kind, on)), totals, strict=True):
                if term is not None and term.requires_grad:
                    grads = self.head.gradients(done, term, self.masters, retain=True)()
                    for sum_, grad in zip(total, grads, strict=True):
                        if grad is not None:
                            sum_ += grad
            self.head.drop(done)
        task_norm, penalty_norm, scale = (
            float(torch.cat([g.reshape(-1) for g in t]).norm()) / len(rows) for t in totals
        )
        return task_norm, penalty_norm, scale

    def _reach(self, rows: Sequence[int]) -> float:
        """The least reach of the tuned routers (see `moe/reach.py`), on one micro-batch."""
        micro = next(self.feed([list(rows)]))
        keep, read = micro.reading.keep, self.read_weights
        return self.head.reach(self._plan(micro), micro.states_TD, self.masters, keep=keep, read=read)

    def settle(self, probe: dict[str, float]) -> None:
        """Leave the task term out where the probe saw that it reaches no tuned router. Raises TrainingError if nothing does."""
        self.with_task = not is_unreached(probe)
        if self.with_task:
            return
        unreached = (
            "the task loss does not reach these routers: the weights that they give their experts do not depend on their logits "
            f"(d(weights)/d(gate) is {probe['reach']:.1g} of d(r)/d(gate)), as where one expert is taken and its weight scaled "
            "to 1. "
        )
        if is_noise(probe, self.config.regularizer):
            raise UnmovedError(
                f"{unreached}And the regularizer's gradient ({probe['regularizer_gradient']:.1g}) is rounding noise. "
                f"{_FLAT.get(self.config.regularizer.kind, '')} Nothing would move them but noise."
            )
        if probe["weight"] * probe["regularizer_gradient"] == 0:
            raise UnmovedError(
                f"{unreached}Training would follow rounding noise (a gradient of {probe['task_gradient']:.1g}). The manifold term can "
                "move them: set finetune.regularizer.kind=manifold with a weight above 0."
            )

    def refresh(self, epoch: int, gates: dict[str, Tensor]) -> None:
        """With `refresh`, rebuild r_j from the routers as they were at the start of this epoch (epoch 0: the base's)."""
        term = self.config.regularizer
        if term.kind != "manifold" or not term.refresh or epoch == 0:
            return
        now = self.masters.state()
        self.masters.load(gates)
        if self.each:
            self.targets = self._targets_of_each()
        else:
            routing_NLE = roomy_zeros(*self.data.routing_NLE.shape).copy_(self.data.routing_NLE)
            for found in self._scores(self.data.neighborhoods.indices.unique().tolist()):
                routing_NLE[found.rows] = torch.from_numpy(found.routing_NLE[:, self.columns])
            self.targets = neighbor_targets(self.data.neighborhoods, routing_NLE, roomy_zeros)
        self.masters.load(now)
