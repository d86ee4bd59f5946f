"""What an epoch's validation pass tells of the tuned routers, layer by layer, and the guard against a collapse of the routing.

All of it is read from routing rows that the pass computes anyway and from gradients that the steps have anyway.
V validation questions, L tuned layers, E experts, K selected experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from roma_ray.config.finetune_settings import FinetuneConfig, GuardConfig
from roma_ray.engine.checkpoint import LoopState
from roma_ray.engine.identity import guard_acts
from roma_ray.engine.workers import World
from roma_ray.errors import TrainingError
from roma_ray.manifold import diagnostics

FIGURES = {
    "entropy": "routing entropy (nats)",
    "load_p5": "load, 5th percentile (%)",
    "load_p50": "load, median (%)",
    "load_p95": "load, 95th percentile (%)",
    "load_max": "largest load (%)",
    "unused_experts": "unused experts",
    "kl_to_base": "KL to base (nats)",
    "gradient_norm": "gate gradient norm",
}
"""An epoch's figures by layer, each a list in its record's `routing`, with what they are called. Loads are shares of selections."""

_PERCENTS = {"load_p5": 5, "load_p50": 50, "load_p95": 95, "load_max": 100}
_MOST_FINDINGS = 3
# Shares of counts, and ends of ranges, that are equal on paper.
_ROUNDING = 1e-9


def routing_figures(
    tuned_VLE: Tensor, base_VLE: Tensor, top_k: int, counts: Sequence[int] | None = None
) -> dict[str, Any]:
    """Figures of routing rows, tuned and base of the same questions: lists by layer; selected are the top k of r.

    `counts`: the experts of each layer, where rows are padded to the largest.
    """
    experts = tuned_VLE.shape[-1]
    load_LE = diagnostics.expert_load(diagnostics.top_k_selection(tuned_VLE, top_k), experts)
    base_LE = diagnostics.expert_load(diagnostics.top_k_selection(base_VLE, top_k), experts)
    own_L = [experts] * len(load_LE) if counts is None else list(counts)
    absent_L = experts - torch.tensor(own_L)
    percentiles = diagnostics.load_percentiles(load_LE, list(_PERCENTS.values()))
    return {
        "num_experts": experts,
        **({"experts": own_L} if len(set(own_L)) > 1 else {}),
        "top_k": top_k,
        "entropy": diagnostics.routing_entropy(tuned_VLE).tolist(),
        **{name: row.tolist() for name, row in zip(_PERCENTS, percentiles, strict=True)},
        "unused_experts": ((load_LE == 0).sum(-1) - absent_L).tolist(),
        "kl_to_base": diagnostics.routing_kl(tuned_VLE, base_VLE).tolist(),
        "base_entropy": diagnostics.routing_entropy(base_VLE).tolist(),
        "base_load_max": base_LE.amax(-1).tolist(),
        "base_unused_experts": ((base_LE == 0).sum(-1) - absent_L).tolist(),
    }


def collapsed(record: Mapping[str, Any], guard: GuardConfig) -> list[str]:
    """What of an epoch's record is past a threshold, a phrase each. Records that hold no figures say nothing."""
    found = record.get("routing")
    if guard.action == "none" or not found:
        return []
    full = 1 / found["top_k"]
    phrases = []
    for n, layer in enumerate(found["layers"]):
        experts = found["experts"][n] if "experts" in found else found["num_experts"]
        even = math.log(experts)
        entropy, before = found["entropy"][n], found["base_entropy"][n]
        if entropy < guard.least_entropy * before - _ROUNDING:
            phrases.append(
                f"layer {layer} keeps {entropy / before:.0%} of the base model's routing entropy (least_entropy: "
                f"{guard.least_entropy:.0%})"
            )
        if (flatter := _way(entropy, before, even)) > guard.most_entropy + _ROUNDING:
            phrases.append(
                f"layer {layer} has gone {flatter:.0%} of the way to even routing (most_entropy: {guard.most_entropy:.0%})"
            )
        lost = found["unused_experts"][n] - found["base_unused_experts"][n]
        if lost > guard.most_unused * experts + _ROUNDING:
            phrases.append(
                f"layer {layer} uses {lost} experts of {experts} fewer than the base model (most_unused: "
                f"{guard.most_unused:.0%})"
            )
        if (nearer := _way(found["load_max"][n], found["base_load_max"][n], full)) > guard.most_load + _ROUNDING:
            phrases.append(
                f"layer {layer} has gone {nearer:.0%} of the way to one expert for all questions (most_load: {guard.most_load:.0%})"
            )
        norm, first = found["gradient_norm"][n], found["first_gradient_norm"][n]
        if first and norm > guard.most_gradient * first:
            phrases.append(
                f"layer {layer} has {norm / first:.0f} times the first epoch's gradient (most_gradient: {guard.most_gradient:g})"
            )
    return phrases


def _way(value: float, start: float, end: float) -> float:
    """How much of the way from `start` up to `end` lies behind; 0 where there is none to go."""
    return (value - start) / (end - start) if end - start > _ROUNDING else 0.0


def act(config: FinetuneConfig, state: LoopState, world: World) -> None:
    """Do what the guard is asked to do about the epoch that just ended, and note it in its record.

    All workers follow the first: figures may differ in their last bits from device to device, decisions must not.
    """
    if not guard_acts(config):
        return
    record = state.epochs[-1]
    mine = torch.tensor([float(bool(collapsed(record, config.guard)))])
    if not bool(world.gather([mine], world.size)[0]):
        return
    if config.guard.action == "stop":
        state.stopped = record["stopped"] = True
    elif len(state.epochs) < config.epochs:
        state.lambda_factor /= 2
        record["lambda_factor"] = state.lambda_factor


def check_kept(state: LoopState, guard: GuardConfig) -> None:
    """Where training was stopped, an epoch came before that. Raises TrainingError."""
    if state.stopped and len(state.epochs) == 1:
        raise TrainingError(
            f"the routing collapsed in the first epoch, so that finetune.guard.action: stop has none to keep: "
            f"{listed(collapsed(state.epochs[0], guard))}. Lower finetune.learning_rate or finetune.regularizer.weight, or set "
            "finetune.guard.action to warn, which trains on."
        )


def listed(phrases: Sequence[str]) -> str:
    """The first of some phrases, and how many more there are."""
    more = len(phrases) - _MOST_FINDINGS
    return "; ".join([*phrases[:_MOST_FINDINGS], *([f"and {more} more"] if more > 0 else [])])


def entropy_kept(record: Mapping[str, Any]) -> str:
    """The one phrase that every epoch's line has: least and most of the base model's entropy that a layer keeps."""
    found = record.get("routing")
    if not found or not all(found["base_entropy"]):
        return ""
    parts = [100 * now / before for now, before in zip(found["entropy"], found["base_entropy"], strict=True)]
    return f", {min(parts):.0f}-{max(parts):.0f} % of the base model's routing entropy"


def describe_collapse(record: Mapping[str, Any], guard: GuardConfig) -> str:
    """The line that an epoch past a threshold prints; empty for others."""
    phrases, number = collapsed(record, guard), record["epoch"] + 1
    if not phrases:
        return ""
    done = ""
    if record.get("stopped"):
        done = ". Training stops here" + (
            f": the routers of epoch {number - 1} or before are kept" if number > 1 else ""
        )
    elif "lambda_factor" in record:
        done = f". λ is halved from epoch {number + 1} on, to {record['lambda_factor']:g} of what was set"
    return f"warning: the routing may have collapsed in epoch {number}: {listed(phrases)}{done}"


def collapse_notes(epochs: Sequence[Mapping[str, Any]], selected: int, guard: GuardConfig) -> list[str]:
    """What the guard says of a whole training, in sentences; empty where no epoch is past a threshold."""
    found = {record["epoch"]: phrases for record in epochs if (phrases := collapsed(record, guard))}
    if not found:
        return []
    numbers = ", ".join(str(epoch + 1) for epoch in found)
    exported = f"epoch {selected + 1}, {'one of them' if selected in found else 'not one of them'}, is exported"
    lines = [
        f"the routing may have collapsed in epoch(s) {numbers} ({exported}); in epoch {min(found) + 1} "
        f"{listed(found[min(found)])}"
    ]
    halved = [f"{record['epoch'] + 2}" for record in epochs if "lambda_factor" in record]
    if halved:
        lines.append(f"the guard halved λ from epoch(s) {', '.join(halved)} on")
    if epochs[-1].get("stopped"):
        lines.append(f"the guard stopped the training after epoch {epochs[-1]['epoch'] + 1}")
    return lines
