"""What `roma-ray doctor --model` finds out about a model: its family, and its self-check, a layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from roma_ray.config.loading import load_config
from roma_ray.config.schema import Config, ModelConfig
from roma_ray.doctor.check import Check
from roma_ray.engine.kept_selfchecks import read_checks, worst_of
from roma_ray.engine.setup import ModelSpec, resolve_model
from roma_ray.engine.streaming import plan_chain
from roma_ray.errors import RomaError
from roma_ray.moe.reach import is_unreached
from roma_ray.moe.slices import model_facts


def examine_model(path: str, storage: str | None) -> Iterator[Check]:
    """Check every layer of a model that runs on this machine have not checked; holds one layer at a time."""
    try:
        spec, _ = resolve_model(_config(path, storage))
        facts = model_facts(spec.path, revision=spec.revision)
        yield Check("model", "ok", _described(path, facts))
        if facts["quantization"] is not None:
            size = f"{spec.weight_bytes() / 2**30:,.1f} GiB in memory"
            stored = f"stored in {facts['quantization']} and dequantized to {spec.dtype}, {size}"
            yield Check("model's weights", "ok", stored)
        _check_layers(spec)
    except RomaError as error:
        yield Check("model", "broken", str(error))
        return
    figures = worst_of(spec.checks)
    if not figures:
        yield Check("model's self-check", "broken", "transformers' own forward pass gives values that are not numbers")
        return
    shown = ", ".join(f"{name} {figures[name]:.1e}" for name in figures if name != "reach")
    detail = f"{spec.dtype} on {spec.device}, {facts['num_layers']} layers, largest differences from transformers' own pass: {shown}"
    yield Check("model's self-check", "ok", detail)
    if is_unreached(figures):
        yield Check(
            "model's routers",
            "note",
            f"the task loss does not reach all of them ({figures['reach']:.1e}): it is left out of their training",
        )


def _config(path: str, storage: str | None) -> Config:
    """The embedded configuration with this model, in its own type as runs take it; a path is no YAML, whatever it holds."""
    config = load_config()
    return config.model_copy(update={"model": ModelConfig(path=path), "storage": storage or config.storage})


def _described(path: str, facts: dict[str, Any]) -> str:
    least, most = min(facts["experts_by_layer"]), max(facts["experts_by_layer"])
    counted = f"{most}" if least == most else f"{least} to {most}"
    return (
        f"{path}: {facts['model_type']}, {facts['parameters'] / 1e9:.3g} billion parameters, experts in {len(facts['moe_layers'])} "
        f"of {facts['num_layers']} layers, {facts['top_k']} of {counted} a token"
    )


def _check_layers(spec: ModelSpec) -> None:
    done = {layer for facts in read_checks(spec.checks) for layer in range(facts["start"], facts["stop"])}
    # No limit holds: each layer is a slice of its own.
    chain = plan_chain(spec, 0.0, least=True)
    for start, stop in chain:
        if not set(range(start, stop)) <= done:
            last = stop == chain[-1][1]
            spec.load(start, None if last else stop, with_lm_head=last)
