"""Scratch: a folder of this machine's own, gone when its user is done. Nothing in it is of the storage."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new local folder, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="roma-ray-") as folder:
        yield Path(folder)
