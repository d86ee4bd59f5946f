"""Scratch: what a process puts down for itself and removes when it is done. Nothing in it is of the storage."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from roma_ray.store.files import unwritable
from roma_ray.store.staging import scratch_root

if TYPE_CHECKING:
    import pyarrow as pa


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new local folder, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="roma-ray-") as folder:
        yield Path(folder)


class ScratchTable:
    """A table that is put down part by part in a local file of its own: it lies on the disk and not in memory.

    The file's name goes as soon as it is finished or closed, its room with the last that was read of it.
    """

    def __init__(self, schema: pa.Schema, folder: Path | None = None) -> None:
        """`folder`: where there is room for it, else this machine's scratch. Raises StorageError where there is none."""
        import pyarrow as pa

        self.folder = scratch_root() if folder is None else folder
        try:
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=".rows-", suffix=".tmp")
            os.close(handle)
            self._path = Path(name)
            self._file = pa.OSFile(name, "wb")
        except OSError as error:
            raise unwritable(self.folder, error) from error
        self._writer = pa.ipc.new_file(self._file, schema)

    def append(self, table: pa.Table) -> None:
        """Put rows down behind the others: each chunk is a record batch. Raises StorageError."""
        try:
            self._writer.write_table(table)
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def finish(self, *, mapped: bool) -> pa.ipc.RecordBatchFileReader:
        """The record batches in their order; no more can be put down. Raises StorageError.

        `mapped`: for picking rows anywhere. Else each batch is read into memory when it is taken, for going through once.
        """
        import pyarrow as pa

        try:
            self._writer.close()
            self._file.close()
            place = str(self._path)
            return pa.ipc.open_file(pa.memory_map(place) if mapped else pa.OSFile(place))
        except OSError as error:
            raise unwritable(self.folder, error) from error
        finally:
            self.close()

    def close(self) -> None:
        """Remove the file's name, also where nothing was read of it."""
        self._file.close()
        self._path.unlink(missing_ok=True)
