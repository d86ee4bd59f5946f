"""Quantiles of any number of values, and which of them are told of neighborhoods."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def quantiles(values_P: Tensor, at: Sequence[float] = QUANTILES) -> dict[str, float]:
    """Linearly interpolated quantiles in fp64, keyed "q5" for 0.05; {} for no values.

    `torch.quantile` refuses more than 2^24 values, which an epsilon-ball easily holds.
    """
    if not len(values_P):
        return {}
    sorted_P = values_P.double().sort().values
    place = torch.tensor(at, dtype=torch.float64) * (len(sorted_P) - 1)
    low, high = sorted_P[place.floor().long()], sorted_P[place.ceil().long()]
    marks = low + (high - low) * (place - place.floor())
    return {f"q{round(100 * q)}": float(mark) for q, mark in zip(at, marks, strict=True)}
