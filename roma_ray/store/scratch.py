"""Scratch: what a process puts down for itself and removes when it is done. Nothing in it is of the storage."""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from roma_ray.errors import StorageError
from roma_ray.store.files import unwritable
from roma_ray.store.staging import SCRATCH, scratch_root

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

HELD_BYTES = 2**28
"""Larger tables that are held for picking rows from, and larger arrays, lie in this machine's scratch, mapped."""

_UNSUPPORTED = {errno.EINVAL, errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP}
"""What a file system says that cannot reserve room, where the system's library does not do it for it."""


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new local folder, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="roma-ray-") as folder:
        yield Path(folder)


def roomy_zeros(*shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Zeros on the CPU, fp32 or of `dtype`: in memory, or of more than `HELD_BYTES` in this machine's scratch, mapped.

    The file has no name and its room is reserved, so no later write finds the disk full; it goes with the last tensor that
    shares it. Pages of it are not the process's own: the system writes them down and takes them back. Raises StorageError.
    """
    import torch

    dtype = dtype or torch.float32
    size = math.prod(shape) * dtype.itemsize
    if size <= HELD_BYTES:
        return torch.zeros(shape, dtype=dtype)
    folder = scratch_root()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file, size)
            room = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise _full(folder, error) from error
    return torch.frombuffer(room, dtype=dtype).reshape(shape)


def _reserve(file: IO[bytes], size: int) -> None:
    """Have the disk give a file its room, all zeros. Raises OSError."""
    if hasattr(os, "posix_fallocate"):  # macOS has none
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    piece = bytes(2**22)
    for start in range(0, size, len(piece)):
        file.write(piece[: size - start])
    file.flush()


class ScratchTable:
    """A table that is put down part by part in a local file of its own: it lies on the disk and not in memory.

    The file has no name, so that nothing is left of it however the process ends; its room goes with the last that was read
    of it.
    """

    def __init__(self, schema: pa.Schema, folder: Path | None = None) -> None:
        """`folder`: where there is room for it, else this machine's scratch. Raises StorageError where there is none."""
        import pyarrow as pa

        self.folder = scratch_root() if folder is None else folder
        try:
            self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - `close` closes it
            self._writer = pa.ipc.new_file(pa.PythonFile(self._file, "w"), schema)
        except OSError as error:
            raise self._full(error) from error

    def append(self, table: pa.Table) -> None:
        """Put rows down behind the others: each chunk is a record batch. Raises StorageError."""
        try:
            self._writer.write_table(table)
        except OSError as error:
            raise self._full(error) from error

    def finish(self, *, mapped: bool) -> pa.ipc.RecordBatchFileReader:
        """The record batches in their order; no more can be put down. Raises StorageError.

        `mapped`: for picking rows anywhere. Else each batch is read into memory when it is taken, for going through once.
        """
        import pyarrow as pa

        try:
            self._writer.close()
            self._file.flush()
            if mapped:
                return pa.ipc.open_file(pa.py_buffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)))
            return pa.ipc.open_file(pa.PythonFile(os.fdopen(os.dup(self._file.fileno()), "rb"), "r"))
        except OSError as error:
            raise self._full(error) from error
        finally:
            self.close()

    def close(self) -> None:
        """Give the file up, also where nothing was read of it; who reads has it open."""
        # What a full disk did not take is not asked for any more.
        with contextlib.suppress(OSError):
            self._file.close()

    def _full(self, error: OSError) -> StorageError:
        return _full(self.folder, error)


def _full(folder: Path, error: OSError) -> StorageError:
    if folder != scratch_root():
        return unwritable(folder, error)
    return StorageError(
        f"cannot write in {folder}: {error.strerror or error}. Large tables lie there while a process goes through "
        f"them: free some space, or name another place with ${SCRATCH}, and run the same command again: finished work is kept."
    )
