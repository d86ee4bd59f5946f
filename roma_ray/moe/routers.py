"""Finding a model's routers, and the routing weights that their logits mean.

Shapes: T flat tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from roma_ray.errors import ModelError
from roma_ray.moe.backbones import LANGUAGE_MODEL
from roma_ray.moe.families import Family, Scoring, family
from roma_ray.moe.uneven import expert_counts, widest


@dataclass(frozen=True)
class Router:
    """One router of a model or of a slice of it."""

    layer: int
    """Index of its layer in the whole model."""
    name: str
    """Path of the gate in this model (a slice renumbers its layers)."""
    whole_name: str
    """Path of the gate in the whole causal language model, for checkpoints: `model.layers.11.mlp.gate`."""
    module: nn.Module = field(repr=False)
    """What chooses experts: its output is (logits or probabilities, weights, indices)."""
    gate: nn.Module = field(repr=False)
    """What holds the tuned parameters and makes the logits: the module itself, in some families a linear layer in it."""
    num_experts: int
    top_k: int
    width: int
    """Experts of the whole model's largest layer: what routing rows are padded to, where layers have different numbers."""


class Routed(Protocol):
    """Consecutive layers of a model, in one slice or in several, as who reads and changes their routers sees them."""

    @property
    def routers(self) -> list[Router]:
        """In layer order, with whole-model layer indices."""

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...

    @property
    def path(self) -> str: ...

    @property
    def revision(self) -> str | None: ...

    @property
    def model_type(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...


@contextmanager
def seen_choices(routers: Sequence[Router], see: Callable[[int, tuple[Tensor, ...]], None]) -> Iterator[None]:
    """Inside the block `see(layer, output)` hears what each router puts out, (logits or probabilities, weights, indices)."""

    def hook(layer: int) -> Any:
        return lambda module, inputs, output: see(layer, output)

    handles = [router.module.register_forward_hook(hook(router.layer)) for router in routers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_routers(model: PreTrainedModel, *, first_layer: int = 0, wrapped: bool = False) -> list[Router]:
    """Return the routers of `model` in layer order, found by the class that the model records its router logits from.

    `first_layer` is the whole-model index of this model's layer 0 (a slice starts higher), `wrapped` says that the whole
    model is multimodal and this one its language model, or a part of it. The list is empty for a
    slice whose layers are all dense. Raises ModelError for dense models, families that cannot be tuned here, and
    models that already carry an adapter on their routers.
    """
    rule = family(model.config)
    router_class = _router_class(model)
    text_config = model.config.get_text_config()
    prefix = "" if model.get_output_embeddings() is not None else f"{model.base_model_prefix}."
    routers: dict[int, Router] = {}
    for name, module in model.named_modules():
        if not isinstance(module, router_class):
            continue
        index = _layer_index(name)
        layer = first_layer + index
        if layer in routers:
            raise ModelError(
                f"layer {layer} has two routers ({routers[layer].name} and {name}). If an adapter is loaded on this model, "
                "merge it first (merge_and_unload())."
            )
        gate, path = (module.get_submodule(rule.gate), f"{name}.{rule.gate}") if rule.gate else (module, name)
        whole_name = prefix + path.replace(f"layers.{index}.", f"layers.{layer}.", 1)
        if wrapped:
            whole_name = f"{LANGUAGE_MODEL}{whole_name.removeprefix('model.')}"
        counts = _expert_counts(module, gate, text_config)
        width = counts[0] if expert_counts(text_config) is None else widest(text_config)
        routers[layer] = Router(layer, path, whole_name, module, gate, *counts, width)
    return [routers[layer] for layer in sorted(routers)]


def router_parameters(router: Router) -> dict[str, nn.Parameter]:
    """The parameters that make a router's logits, in a fixed order: `weight`, and `bias` where the family has one.

    Buffers (DeepSeek-V3's `e_score_correction_bias`) and selection statistics (Ernie's) are never among them.
    """
    found = {name: p for name, p in router.gate.named_parameters(recurse=False) if name in ("weight", "bias")}
    assert "weight" in found, f"{router.name} has no weight"
    return {name: found[name] for name in ("weight", "bias") if name in found}


def gates_of(routers: Sequence[Router]) -> list[dict[str, Tensor]]:
    """A copy of the parameters that make each router's logits."""
    return [{name: p.detach().clone() for name, p in router_parameters(router).items()} for router in routers]


@torch.no_grad()
def put_gates(routers: Sequence[Router], gates: Sequence[dict[str, Tensor]]) -> None:
    """Copy such parameters back, in place."""
    for router, values in zip(routers, gates, strict=True):
        for name, parameter in router_parameters(router).items():
            parameter.copy_(values[name])


def routing_from_logits(logits_TE: Tensor, scoring: Family | Scoring) -> Tensor:
    """Return r, the distribution over all E experts that router logits mean, before any top-k: fp32, rows sum to 1.

    Softmax over all experts; for sigmoid-scored families the scores divided by their sum. Selection biases, groups and
    scaling factors are not part of r. Differentiable. Any leading shape.
    """
    rule = scoring.scoring if isinstance(scoring, Family) else scoring
    logits = logits_TE.float()
    if rule is Scoring.SIGMOID:
        scores = logits.sigmoid()
        return scores / scores.sum(dim=-1, keepdim=True)
    return torch.softmax(logits, dim=-1)


def _router_class(model: PreTrainedModel) -> type[nn.Module]:
    # Some causal language models leave the recording to their base model, multimodal ones to their language model.
    owners = (model, model.base_model, getattr(model.base_model, "language_model", None))
    records = [getattr(owner, "_can_record_outputs", None) or {} for owner in owners]
    recorded: Any = next((found["router_logits"] for found in records if "router_logits" in found), None)
    target = getattr(recorded, "target_class", None)
    if target is None:
        raise ModelError(
            f"{type(model).__name__} does not say where its router logits come from: it is dense, or its code is not the "
            "class that transformers ships for it."
        )
    assert recorded.index == 0, "families whose recorder takes another output than the first are refused by name"
    return target


def _layer_index(name: str) -> int:
    numbers = [part for part in name.split(".") if part.isdigit()]
    assert len(numbers) == 1, f"the router {name} does not lie in exactly one layer list"
    return int(numbers[0])


def _expert_counts(module: nn.Module, gate: nn.Module, config: Any) -> tuple[int, int]:
    weight = gate.weight
    assert isinstance(weight, Tensor)
    assert weight.dim() == 2
    top_k = getattr(module, "top_k", None) or getattr(config, "num_experts_per_tok", None) or config.top_k_experts
    return weight.shape[0], int(top_k)
