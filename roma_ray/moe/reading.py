"""Reading live routing weights from a forward pass: the graph is kept, and only the wanted positions stay in memory.

Shapes: B batch, S sequence, P read positions, T flat tokens (B x S), L layers, E experts (of the widest layer: those that a
smaller one lacks have r = 0).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from roma_ray.moe.families import Family, family
from roma_ray.moe.packing import kept_tokens, seen_positions
from roma_ray.moe.routers import Router, routing_from_logits, seen_choices
from roma_ray.moe.sending import sent


class RoutingTape:
    """The routing rows that the last forward pass left at the wanted positions."""

    def __init__(self, routers: Sequence[Router], positions_BP: Tensor, rule: Family) -> None:
        if positions_BP.dim() != 2:
            raise ValueError(f"positions must be a [batch, positions] table, not of shape {tuple(positions_BP.shape)}")
        self._routers = routers
        self._positions_BP = positions_BP
        self._family = rule
        self._rows: dict[int, Tensor] = {}
        self._untrimmed: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    @property
    def routing_BPLE(self) -> Tensor:
        """r at the wanted positions, fp32 with graph: L in the order of the routers given; zeros where a position is -1."""
        assert len(self._rows) == len(self._routers), "read the tape after a forward pass through all its routers"
        return torch.stack([self._rows[router.layer] for router in self._routers], dim=2)

    def _record(self, router: Router, logits_TE: Tensor) -> None:
        experts = logits_TE.shape[-1]
        flat_TE = logits_TE.reshape(-1, experts)
        batch = self._positions_BP.shape[0]
        assert flat_TE.shape[0] % batch == 0, f"{flat_TE.shape[0]} tokens are not a whole batch of {batch} rows"
        index_R, absent_BP = self._places(router.layer, flat_TE.shape[0] // batch, flat_TE.device)
        rows = routing_from_logits(flat_TE.index_select(0, index_R), self._family)
        rows_BPE = functional.pad(rows, (0, router.width - experts)).reshape(batch, -1, router.width)
        self._rows[router.layer] = rows_BPE.masked_fill(absent_BP[:, :, None], 0.0)

    def _places(self, layer: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Flat index of each wanted position in a layer's logits, and which are padding; made where the positions are, sent
        once for all layers that compute every token."""
        everywhere = kept_tokens(layer) is None
        known = self._untrimmed.get((length, device)) if everywhere else None
        if known is not None:
            return known
        positions_BP = seen_positions(layer, self._positions_BP)
        offsets_B1 = torch.arange(positions_BP.shape[0], device=positions_BP.device)[:, None] * length
        index_R = (offsets_B1 + positions_BP.clamp(min=0)).reshape(-1)
        made = sent(index_R, device), sent(positions_BP < 0, device)
        if everywhere:
            self._untrimmed[length, device] = made
        return made


@contextmanager
def read_routing(model: PreTrainedModel, routers: Sequence[Router], positions_BP: Tensor) -> Iterator[RoutingTape]:
    """Record r at `positions_BP` of the padded batch that the model is run on inside the `with` block.

    `with read_routing(model, routers, positions_BP) as tape: model(...)`, then `tape.routing_BPLE` (fp32, with graph).
    Entries of -1 are padding and give zero rows. A second forward replaces the first. Positions must lie in the batch.
    """
    tape = RoutingTape(routers, positions_BP, family(model.config))
    handles = [router.gate.register_forward_hook(_hook(tape, router)) for router in routers]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def _hook(tape: RoutingTape, router: Router) -> Any:
    def record(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        tape._record(router, output if isinstance(output, Tensor) else output[0])

    return record


@contextmanager
def read_choices(routers: Sequence[Router], positions_P: Tensor) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Inside the block a pass over one flat row leaves each router's chosen experts at `positions_P` here, by layer.

    They are weights and indices, [P, K] each, without graph.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def see(layer: int, output: tuple[Tensor, ...]) -> None:
        weights, index = (part.detach().flatten(0, -2) for part in output[1:3])
        seen_P = seen_positions(layer, positions_P.to(index.device))
        found[layer] = weights[seen_P], index[seen_P]

    with seen_choices(routers, see):
        yield found
