"""Scratch: what a process puts down for itself and removes when it is done. Nothing in it is of the storage."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from roma_ray.store.files import unwritable


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new local folder, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="roma-ray-") as folder:
        yield Path(folder)


class ScratchArray:
    """An array of zeros, fp32, that lies in a mapped file and not in memory; the file goes when it is closed."""

    def __init__(self, folder: str | Path, rows: int, width: int) -> None:
        """`folder`: where there is room for it. Raises StorageError where there is none."""
        import numpy as np

        try:
            self._file = tempfile.NamedTemporaryFile(dir=folder, prefix=".rows-", suffix=".tmp")  # noqa: SIM115 - see close
            # A mapped file that finds no room while it is written to ends the process without a word.
            os.posix_fallocate(self._file.fileno(), 0, rows * width * 4)
        except OSError as error:
            raise unwritable(folder, error) from error
        self.values = np.memmap(self._file, dtype=np.float32, mode="w+", shape=(rows, width))
        """[rows, width]"""

    def close(self) -> None:
        """Remove the file."""
        self._file.close()
