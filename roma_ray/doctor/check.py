"""One finding of `roma-ray doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """What was looked at, how it is, and what to do about it."""

    name: str
    state: Literal["ok", "note", "broken"]
    detail: str
    remedy: str = ""
