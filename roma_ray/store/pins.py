"""Copied folders that living processes may still open files of: shared locks, which the system drops with their process."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

_pins: dict[Path, int] = {}
"""Copied folders that this process holds a shared lock on, and its descriptor."""
_MOST_PINS = 8


def pin(place: Path) -> None:
    """Keep a copied folder from being removed while this process may still open its files; of many, the last ones. Raises OSError."""
    handle = _pins.pop(place, None)
    if handle is None:
        handle = os.open(place.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    _pins[place] = handle
    while len(_pins) > _MOST_PINS:
        os.close(_pins.pop(next(iter(_pins))))


def pinned(folder: Path) -> bool:
    """Whether a process has pinned what lies in a folder. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
