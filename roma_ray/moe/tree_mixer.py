"""Recurrent layers on token trees: each leaf's sequence in a row of its own, through the stock mixer.

Attention looks at the tree itself; a mixer that carries a state from token to token cannot, so what sequences share is
computed once for each of them, in these layers alone.

Shapes: T flat tokens, G sequences, S tokens of the longest, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from roma_ray.moe.packing import Packing
from roma_ray.moe.sending import sent


def along_the_tree(mixer: nn.Module, gather_GS: Tensor, first_T: Tensor) -> Callable[..., Any]:
    """The mixer's forward for the flat row [1, T, D] of a packing, whose `sequences` these are; returns [1, T, D']."""
    forward = mixer.forward

    def mixed(hidden_states: Tensor, **settings: Any) -> Tensor:
        rows_GSD = hidden_states[0][gather_GS]
        # Padding lies behind each sequence, where a causal mixer cannot see it: no mask is needed.
        unmasked = {**settings, "attention_mask": None}
        out_GSD = forward(hidden_states=rows_GSD, **unmasked)
        return out_GSD.flatten(0, 1).index_select(0, first_T)[None]

    return mixed


def sequences(packing: Packing) -> tuple[Tensor, Tensor]:
    """Flat tokens of each leaf's sequence [G, S], right-padded; where each token stands first in that table, flat [T]."""
    parents = {segment.parent for segment in packing.segments}
    rows = []
    for leaf in range(len(packing.segments)):
        if leaf not in parents:
            rows.append([token for part in packing.path(leaf) for token in packing.span(part)])
    width = max(map(len, rows))
    first = [-1] * len(packing)
    for number, row in enumerate(rows):
        for place, token in enumerate(row):
            if first[token] < 0:
                first[token] = number * width + place
    table = torch.tensor([row + [row[0]] * (width - len(row)) for row in rows])
    return sent(table, packing.device), sent(torch.tensor(first), packing.device)
