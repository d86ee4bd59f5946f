"""Locks in the storage, which the system drops with the process that holds them; in a bucket, leases that expire after it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from roma_ray.store import leases
from roma_ray.store.buckets import is_object


class Held(Exception):
    """Somebody else holds the lock; its text says who, where that is known."""


@contextlib.contextmanager
def locked(path: str | Path, *, shared: bool = False, wait: bool = False, sign: bool = False) -> Iterator[None]:
    """Hold a lock, alone or `shared`; `wait` until it is free. With `sign`, who holds it stands in it.

    Raises Held when it is not free, OSError when the file cannot be made. Some network file systems have no locks: that
    nobody else is at work there is the user's promise.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(
                leases.leased(path, shared=shared, wait=wait) if is_object(path) else _flock(path, shared, wait, sign)
            )
        except leases.Taken as other:
            raise Held(str(other)) from None
        yield


@contextlib.contextmanager
def _flock(path: str | Path, shared: bool, wait: bool, sign: bool) -> Iterator[None]:
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


def check_held(path: str | Path) -> None:
    """Raise Held where this process held the lock at `path` and may have lost it, which only a lease can be."""
    try:
        leases.check_held(Path(path))
    except leases.Taken as error:
        raise Held(str(error)) from None
