"""Where a model's values first stop being finite: the first of its parts, in the order of the computation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# A layer, and what lies directly in it: `model.layers.3`, `model.layers.3.mlp`, but not `model.layers.3.mlp.experts`.
_LAYER = re.compile(r"^(?P<stack>.*\.)?(?P<number>\d+)(?:\.(?P<part>[^.]+))?$")
_SHOWN = 2


class Watch:
    """What was seen of a model while it ran."""

    def __init__(self, first_layer: int) -> None:
        self.first_layer = first_layer
        self.found: tuple[str, nn.Module] | None = None

    @property
    def origin(self) -> str | None:
        """Which part first gave a value that is not finite, and what its weights say; None where all values were finite."""
        if self.found is None:
            return None
        name, module = self.found
        return f"{_place(name, self.first_layer)}{_cause(module, _whole_name(name, self.first_layer))}"

    def see(self, name: str) -> Callable[..., None]:
        """A hook that looks at what the part of that name gives."""

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if self.found is None and isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
                self.found = name, module

        return hook


@contextmanager
def watching(model: nn.Module, first_layer: int = 0) -> Iterator[Watch]:
    """Watch a model that runs inside the block; `first_layer` is the whole-model index of a slice's first layer."""
    watch = Watch(first_layer)
    handles = [
        module.register_forward_hook(watch.see(name))
        # A slice without `lm_head` is the model's inner part itself: the names are made the same.
        for name, module in ((name.removeprefix("model."), module) for name, module in model.named_modules())
        if _LAYER.match(name) or not any(part.isdigit() for part in name.split("."))
    ]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _place(name: str, first_layer: int) -> str:
    layer = _LAYER.match(name)
    if layer is None:
        return name or "the model's output"
    part = f" ({layer['part']})" if layer["part"] else ""
    return f"layer {int(layer['number']) + first_layer}{part}"


def _whole_name(name: str, first_layer: int) -> str:
    layer = _LAYER.match(name)
    if layer is None:
        return name
    number = int(layer["number"]) + first_layer
    return ".".join(filter(None, [f"{layer['stack'] or ''}{number}", layer["part"]]))


def _cause(module: nn.Module, name: str) -> str:
    """What the part's own weights say: damaged, or the type's range is too small for what they give."""
    weights = list(module.named_parameters())
    damaged = [f"{name}.{key}" for key, weight in weights if not bool(torch.isfinite(weight).all())]
    if damaged:
        more = f" and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""
        listed = f"{', '.join(damaged[:_SHOWN])}{more}"
        return f", whose weights are not finite themselves ({listed}): get the checkpoint again"
    # Experts come after their router, which may be a master in fp32.
    kind = str(weights[-1][1].dtype).removeprefix("torch.") if weights else "its type"
    remedy = "" if kind == "float32" else "; try model.dtype=float32"
    return f", whose own weights are finite, so {kind} cannot hold what it gives{remedy}"


def begins(origin: str | None) -> str:
    """A watch's `origin` as the end of a sentence about an example."""
    if origin is None:
        return "alone, it has finite values only"
    return f"the first value that is not finite comes from {origin}"
