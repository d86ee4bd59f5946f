"""Dense backpropagation to the router ("Default MoE", Panda et al. 2025, arXiv 2504.12463), finetuning the gates alone.

An inactive expert stands in with its *default vector*, a running average of what it gave to the tokens that did choose it:

    y = sum over active i of w_i E_i(x)  +  sum over inactive i of c r_i d_i      d_i <- beta d_i + (1 - beta) mean E_i(x)

with w_i the model's own weights of the top-k, r the routing weights over all experts, and c = (sum of w) / (sum of r over the
active). So the router hears of every expert at every token, and no further expert is computed. The paper's equations have w = r
and c = 1. Families that scale what they have chosen (Qwen3, Mixtral, GPT-OSS, Granite and others to a sum of 1, the DeepSeeks
by a constant) are not in them, so c is this project's reading: there w = c r, and the inactive experts get the same c. The
weights of any two experts stand to one another as their r, active or not, and what the model itself computes is kept; the
price is that all weights together sum to c, not to 1.

The second sum is part of the **forward pass** too, as in the paper and its published code (`output + default_vector_ema(...)`);
answers are therefore given with it, by the function that was trained. Averages start at zero, move only in passes that train,
and carry no gradient themselves.

T tokens, K chosen experts, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from roma_ray.baselines.bench import Bench
from roma_ray.baselines.contract import Fitted
from roma_ray.baselines.router_tuning import RouterMethod
from roma_ray.config.schema import Config
from roma_ray.engine.answers import Answers
from roma_ray.errors import ModelError
from roma_ray.moe.families import Family, family
from roma_ray.moe.routers import Router, routing_from_logits


class DefaultVectors:
    """Default vectors of some routers' experts, in force inside `installed`."""

    def __init__(self, model: PreTrainedModel, routers: Sequence[Router], decay: float) -> None:
        self.model, self.routers, self.decay = model, routers, decay
        config, device = model.config.get_text_config(), model.device
        # Nemotron's experts work in a narrower space than its layers.
        width = getattr(config, "moe_latent_size", None) or config.hidden_size
        self.vectors_ED = {r.layer: torch.zeros(r.num_experts, width, device=device) for r in routers}
        self.weights_TE: dict[int, Tensor] | None = None
        """Where `read_weights` wants them, with their graph."""

    def state(self) -> dict[str, Tensor]:
        """The vectors on the CPU, fp32, by `default.{layer}`."""
        return {f"default.{layer}": vectors.cpu().clone() for layer, vectors in self.vectors_ED.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Set the vectors from `state()`."""
        for layer, vectors_ED in self.vectors_ED.items():
            vectors_ED.copy_(state[f"default.{layer}"])

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model computes with default vectors; they move in passes that keep a graph."""
        rule = family(self.model.config)
        with ExitStack() as stack:
            for router in self.routers:
                stack.enter_context(self._around(router, rule))
            yield

    @contextmanager
    def read_weights(self, _routers: Sequence[Router]) -> Iterator[dict[int, Tensor]]:
        """Inside the block a forward pass leaves the weights [T, E] of all experts here, by layer: the default vectors' too.

        They depend on a router's logits also where it scales its one expert's weight to 1.
        """
        self.weights_TE = {}
        try:
            yield self.weights_TE
        finally:
            self.weights_TE = None

    @contextmanager
    def _around(self, router: Router, rule: Family) -> Iterator[None]:
        experts = _experts_beside(self.model, router)
        logits: list[Tensor] = []
        handle = router.gate.register_forward_hook(
            lambda _module, _inputs, output: logits.append(output if isinstance(output, Tensor) else output[0])
        )
        forward: Callable[..., Tensor] = experts.forward

        def dense(hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
            flat_TD = hidden_TD.reshape(-1, hidden_TD.shape[-1])
            routing_TE = routing_from_logits(logits.pop().reshape(len(flat_TD), -1), rule)
            output_TD = self._output(router.layer, forward, flat_TD, index_TK, weights_TK, routing_TE)
            return output_TD.reshape(hidden_TD.shape)

        experts.__dict__["forward"] = dense
        try:
            yield
        finally:
            del experts.__dict__["forward"]
            handle.remove()

    def _output(
        self, layer: int, forward: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, routing_TE: Tensor
    ) -> Tensor:
        tokens, chosen = index_TK.shape
        # Each (token, chosen expert) pair as a token of its own with weight one: as much work as the usual call, but what
        # each expert gives stays apart.
        ones_R1 = torch.ones_like(weights_TK).reshape(-1, 1)
        repeated_RD = hidden_TD.repeat_interleave(chosen, dim=0)
        given_TKD = forward(repeated_RD, index_TK.reshape(-1, 1), ones_R1).reshape(tokens, chosen, -1)
        vectors_ED = self.vectors_ED[layer]
        if torch.is_grad_enabled():
            self._move(vectors_ED, given_TKD.detach().flatten(0, 1).float(), index_TK.reshape(-1))
        scale_T1 = weights_TK.float().sum(1, keepdim=True) / routing_TE.gather(1, index_TK).sum(1, keepdim=True)
        inactive_TE = scale_T1 * routing_TE.scatter(1, index_TK, 0.0)
        if self.weights_TE is not None:
            self.weights_TE[layer] = inactive_TE.scatter(1, index_TK, weights_TK.float())
        active_TD = (weights_TK[:, :, None].to(given_TKD.dtype) * given_TKD).sum(1)
        # A copy: the next pass moves the vectors in place, the backward pass of this one still needs them.
        return active_TD + (inactive_TE @ vectors_ED.clone()).to(active_TD.dtype)

    def _move(self, vectors_ED: Tensor, given_RD: Tensor, expert_R: Tensor) -> None:
        """One step of the running averages, for the experts that were chosen at all."""
        sums_ED = torch.zeros_like(vectors_ED).index_add_(0, expert_R, given_RD)
        counts_E = torch.bincount(expert_R, minlength=len(vectors_ED))
        seen_E = counts_E > 0
        means_ED = sums_ED[seen_E] / counts_E[seen_E, None]
        vectors_ED[seen_E] = self.decay * vectors_ED[seen_E] + (1 - self.decay) * means_ED


def _experts_beside(model: PreTrainedModel, router: Router) -> nn.Module:
    """The module of all experts in a router's own block. Raises ModelError."""
    inside = 1 if router.gate is router.module else 2
    block = model.get_submodule(router.name.rsplit(".", inside)[0])
    experts = getattr(block, "experts", None)
    if not isinstance(experts, nn.Module):
        raise ModelError(f"dense_backprop finds no `experts` beside the router {router.name}; leave this method out")
    return experts


class DenseBackprop(RouterMethod):
    """Router tuning whose gates hear of every expert."""

    name = "dense_backprop"
    title = "gates finetuned with a gradient from every expert (Default MoE; default vectors in the forward pass too)"

    def configure(self, config: Config) -> dict[str, Any]:
        """The decay too."""
        return {**super().configure(config), "default_decay": config.baselines.default_decay}

    def fit(self, bench: Bench, prepared: dict[str, Tensor], learning_rate: float, seed: int) -> Fitted:
        """Finetune with default vectors, which are kept."""
        vectors = self._vectors(bench)
        with vectors.installed():
            fitted = self.train(bench, prepared, learning_rate, seed, vectors.read_weights)
        return Fitted({**fitted.tensors, **vectors.state()}, fitted.trained_parameters, fitted.facts)

    def predict(self, bench: Bench, fitted: Fitted, rows: Sequence[int], seed: int) -> Answers:
        """The answers of the function that was trained: tuned gates and default vectors."""
        vectors = self._vectors(bench)
        vectors.load(fitted.tensors)
        gates = {name: tensor for name, tensor in fitted.tensors.items() if not name.startswith("default.")}
        with bench.gates(gates), vectors.installed():
            return bench.answer(rows)

    def _vectors(self, bench: Bench) -> DefaultVectors:
        routers = [bench.head.routers[n] for n in bench.columns]
        return DefaultVectors(bench.head.model, routers, bench.config.default_decay)
