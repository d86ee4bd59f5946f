"""Router weights as fp32 masters that train, while the forward pass sees them cast to the model's own type.

A gate trained in bf16 loses updates smaller than its last bit, and an fp32 gate inside a bf16 model does not run. So each
chosen router gets fp32 master parameters, and its forward uses `master.to(model dtype)` inside the graph: training sees
exactly the routing that the exported checkpoint will have. Everything else of the model stays frozen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from roma_ray.errors import CheckpointError, ModelError
from roma_ray.moe.routers import Router, router_parameters
from roma_ray.moe.slices import Slice

# Where an attached gate's masters are found.
_MASTERS = "_roma_masters"


class RouterMasters:
    """fp32 master parameters of the chosen layers' routers, attached to the model from construction until `detach`.

    While attached, the routers' own parameters are set aside, so `model.parameters()` holds only frozen ones.
    `target` is a slice or its routers; `layers` are whole-model indices. Raises ModelError when a layer has no router there.
    """

    def __init__(self, target: Slice | Sequence[Router], layers: Sequence[int]) -> None:
        routers = {router.layer: router for router in (target.routers if isinstance(target, Slice) else target)}
        missing = sorted(set(layers) - set(routers))
        if missing:
            raise ModelError(f"layers {missing} have no router in this model; those that do: {sorted(routers)}")
        self.layers = tuple(sorted(set(layers)))
        self.routers = tuple(routers[layer] for layer in self.layers)
        self.parameters_by_layer: dict[int, dict[str, nn.Parameter]] = {}
        self._undo: list[Callable[[], None]] = []
        for router in self.routers:
            frozen = router_parameters(router)
            self.parameters_by_layer[router.layer] = {
                name: nn.Parameter(tensor.detach().to(torch.float32, copy=True)) for name, tensor in frozen.items()
            }
            self._undo.append(_attach(router.gate, frozen, self.parameters_by_layer[router.layer]))

    def parameters(self) -> list[nn.Parameter]:
        """The masters in a fixed order: by layer, `weight` before `bias`."""
        return [parameter for layer in self.layers for parameter in self.parameters_by_layer[layer].values()]

    @torch.no_grad()
    def approach(self, goals: Sequence[Tensor], part: float) -> None:
        """Move each master, in the order of `parameters()`, a part of the way to a tensor of its shape."""
        for parameter, goal in zip(self.parameters(), goals, strict=True):
            parameter.lerp_(goal, part)

    def detach(self) -> None:
        """Give the model its original routers back. Masters keep their values; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def state(self) -> dict[str, Tensor]:
        """Copies of the masters on the CPU, fp32, under `layers.{whole-model index}.{weight|bias}`."""
        return {
            f"layers.{layer}.{name}": parameter.detach().cpu().clone()
            for layer in self.layers
            for name, parameter in self.parameters_by_layer[layer].items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the masters from `state()` of equal layers. Raises CheckpointError for other keys, shapes or non-finite values."""
        mine = {
            f"layers.{layer}.{name}": p for layer in self.layers for name, p in self.parameters_by_layer[layer].items()
        }
        if set(mine) != set(state):
            differing = ", ".join(sorted(set(mine) ^ set(state))[:4])
            raise CheckpointError(f"the router state is of other layers than are tuned here: {differing}")
        for key, parameter in mine.items():
            if state[key].shape != parameter.shape:
                raise CheckpointError(
                    f"{key} has shape {tuple(state[key].shape)}, this model needs {tuple(parameter.shape)}"
                )
            if not bool(torch.isfinite(state[key]).all()):
                raise CheckpointError(f"{key} holds NaN or infinite values")
        with torch.no_grad():
            for key, parameter in mine.items():
                parameter.copy_(state[key])


def gate_tensors(router: Router) -> Mapping[str, Tensor]:
    """What a router's gate holds: its masters while they are attached, else its own parameters."""
    attached: Mapping[str, Tensor] | None = router.gate.__dict__.get(_MASTERS)
    return router_parameters(router) if attached is None else attached


def frozen_digest(model: nn.Module) -> str:
    """SHA-256, in hex, of the names, types and bytes of all parameters and buffers that the model holds.

    With masters attached these are exactly the frozen ones; compare digests taken in the same state.
    """
    digest = hashlib.sha256()
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for name in sorted(tensors):
        digest.update(f"{name}:{tensors[name].dtype}:{tuple(tensors[name].shape)}".encode())
        digest.update(_tensor_bytes(tensors[name]))
    return digest.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256, in hex, of one tensor's type, shape and bytes."""
    return hashlib.sha256(f"{tensor.dtype}:{tuple(tensor.shape)}".encode() + bytes(_tensor_bytes(tensor))).hexdigest()


def _tensor_bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _attach(module: nn.Module, frozen: dict[str, nn.Parameter], masters: dict[str, nn.Parameter]) -> Callable[[], None]:
    """Let `module` read plain attributes, cast anew from the masters before each forward, in place of its parameters.

    A tensor that is part of a graph cannot stand in `_parameters`; an entry in `__dict__` is found before them.
    """

    def cast(_module: nn.Module, _inputs: Any) -> None:
        for name, master in masters.items():
            module.__dict__[name] = master.to(frozen[name].dtype)

    order = list(module._parameters)
    for name in frozen:
        del module._parameters[name]
    cast(module, ())
    handle = module.register_forward_pre_hook(cast)
    module.__dict__[_MASTERS] = masters

    def undo() -> None:
        handle.remove()
        del module.__dict__[_MASTERS]
        for name, parameter in frozen.items():
            module.__dict__.pop(name, None)
            module._parameters[name] = parameter
        for name in order:
            module._parameters[name] = module._parameters.pop(name)

    return undo
