"""Locks in the storage, which the system drops with the process that holds them."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


class Held(Exception):
    """Somebody else holds the lock; its text says who, where that is known."""


@contextlib.contextmanager
def locked(path: str | Path, *, shared: bool = False, wait: bool = False, sign: bool = False) -> Iterator[None]:
    """Hold a lock, alone or `shared`; `wait` until it is free. With `sign`, who holds it stands in it.

    Raises Held when it is not free, OSError when the file cannot be made. Some network file systems have no locks: that
    nobody else is at work there is the user's promise.
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+") as handle:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            handle.seek(0)
            raise Held(handle.read().strip()) from None
        except OSError:
            pass
        if sign:
            # For a message alone; a full storage will be told where it matters.
            with contextlib.suppress(OSError):
                handle.truncate(0)
                os.write(handle.fileno(), f"{os.uname().nodename}, pid {os.getpid()}".encode())
        yield
