"""Locks in a bucket: leases, objects that their holder renews and that expire when it no longer does.

A lease is taken by a write that the bucket does only where nothing, or what was read before, is there, so of two who try one
succeeds. It expires by the bucket's clock alone: an object says when it was put, and the time now is what it says of one that
is put to ask. A holder that lost its lease is told before it makes anything complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from roma_ray.errors import BucketError, BusyError, StorageError
from roma_ray.store import objects

SECONDS = "ROMA_RAY_LEASE_SECONDS"
_SECONDS, _LEAST_SECONDS = 60.0, 2.0
_POLL_SECONDS, _LOOK_SECONDS = 1.0, 0.2
_SHARED, _CLOCK = ".shared", ".clock"
LOCK = ".lock"
"""Of the folder that it lies in, what its holder alone writes."""


class Taken(Exception):
    """Somebody else holds the lease; its text says who, and when it expires without its holder."""


@dataclass(frozen=True)
class _Found:
    """A lease as it stands in the bucket."""

    owner: str
    token: str
    seconds: float
    tag: str
    written: float


def possible(folder: Path) -> bool:
    """Whether the bucket does the two conditional writes that leases rest on: some servers ignore the condition. Raises BucketError."""
    probe = folder / f".lease.{uuid.uuid4().hex}"
    try:
        tag = objects.create(probe, b"first")
        if tag is None or objects.create(probe, b"second") is not None:
            return False
        objects.replace(probe, b"third", tag)
        try:
            objects.replace(probe, b"fourth", tag)
        except objects.Lost:
            return True
        return False
    finally:
        objects.remove(probe)


class Lease:
    """One that this process holds, renewed by a thread of its own."""

    def __init__(self, path: Path) -> None:
        self.path, self.seconds = path, lease_seconds()
        self.owner = f"{os.uname().nodename}, pid {os.getpid()}"
        self.token, self.count, self.tag = uuid.uuid4().hex, 0, ""
        self._over, self._writing = threading.Event(), threading.Lock()
        self._renewed = time.monotonic()
        self._taken = False

    def text(self) -> bytes:
        """What stands in the object: each renewal another."""
        content = {"owner": self.owner, "token": self.token, "seconds": self.seconds, "count": self.count}
        return json.dumps(content).encode()

    def start(self, tag: str, since: float) -> None:
        """It was taken by a write that began at `since` (`time.monotonic`): renew it from now on."""
        self.tag, self._renewed = tag, since
        # No daemon: a thread in the middle of a request must not meet the end of the interpreter.
        threading.Thread(target=self._renew, name="lease").start()

    def _renew(self) -> None:
        due = time.monotonic() + self.seconds / 4
        while threading.main_thread().is_alive() and not self._over.wait(_LOOK_SECONDS):
            if time.monotonic() < due:
                continue
            due = time.monotonic() + self.seconds / 4
            with self._writing:
                if self._over.is_set():
                    return
                began = time.monotonic()
                self.count += 1
                try:
                    self.tag = objects.replace(self.path, self.text(), self.tag, "lease")
                except objects.Lost:
                    self._taken = True
                    return
                except BucketError:
                    continue  # the bucket may be back before the lease expires
                self._renewed = began

    @property
    def lost(self) -> bool:
        """Whether somebody else may hold it by now."""
        return self._taken or time.monotonic() - self._renewed > self.seconds

    def end(self) -> None:
        """Give it back, unless it is somebody else's by now."""
        self._over.set()
        with self._writing:
            if not self.lost:
                # What is not given back expires.
                with contextlib.suppress(objects.Lost, BucketError):
                    objects.replace(self.path, b"{}", self.tag, "lease")


_held: dict[Path, Lease] = {}


def check_held(path: Path) -> None:
    """Raise Taken where this process held the lease at `path` and may have lost it."""
    lease = _held.get(path)
    if lease is not None and lease.lost:
        raise Taken(f"this one did not renew its lease for {lease.seconds:.0f} s")


def check_may_write(path: Path) -> None:
    """Raise BusyError where this process held the lease on a folder above, and may have lost it."""
    for place, lease in list(_held.items()):
        if place.parent in path.parents and place.name == LOCK and lease.lost:
            raise BusyError(
                f"another run may have taken over {place.parent}: this one did not renew its lease for {lease.seconds:.0f} s, and "
                "writes nothing more there. Run the same command again."
            )


@contextlib.contextmanager
def leased(path: str | Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a lease, alone or `shared`; `wait` until it is free. Raises Taken when it is not, BucketError."""
    place = Path(path)
    while True:
        lease = Lease(_beside(place) / uuid.uuid4().hex if shared else place)
        other = _share(lease, place) if shared else _take(lease)
        if other is None:
            break
        if not wait:
            raise Taken(other)
        time.sleep(_POLL_SECONDS)
    _held[lease.path] = lease
    try:
        yield
    finally:
        del _held[lease.path]
        _give_back(lease, shared)


def _give_back(lease: Lease, shared: bool) -> None:
    lease.end()
    if shared:
        # What is not given back expires.
        with contextlib.suppress(BucketError):
            objects.remove(lease.path)


def _beside(place: Path) -> Path:
    """Where those who share a lease have theirs: an object each."""
    return place.with_name(place.name + _SHARED)


def _take(lease: Lease) -> str | None:
    """Take a lease alone; None, or who holds it. Who wants it alone takes it first and then looks for those who share it."""
    while True:
        began = time.monotonic()
        tag = objects.create(lease.path, lease.text())
        if tag is None:
            with contextlib.suppress(FileNotFoundError, objects.Lost):
                found = _read(lease.path)
                if (other := _live(lease.path, found)) is not None:
                    return other
                tag = objects.replace(lease.path, lease.text(), found.tag)
        if tag is not None:
            break
    lease.start(tag, began)
    try:
        for one in objects.listed(_beside(lease.path), "*"):
            with contextlib.suppress(FileNotFoundError):
                if (other := _live(one, _read(one))) is not None:
                    lease.end()
                    return other
    except BaseException:
        lease.end()  # else this process would renew it as long as it lives
        raise
    return None


def _share(lease: Lease, place: Path) -> str | None:
    """Take a share; None, or who holds the lease alone. Who shares puts his own first and then looks for that one."""
    began = time.monotonic()
    tag = objects.create(lease.path, lease.text())
    assert tag is not None, "no other lease has this name"
    lease.start(tag, began)
    try:
        with contextlib.suppress(FileNotFoundError):
            if (other := _live(place, _read(place))) is not None:
                _give_back(lease, shared=True)
                return other
    except BaseException:
        _give_back(lease, shared=True)
        raise
    return None


def _read(path: Path) -> _Found:
    """A lease as it stands. Raises FileNotFoundError, BucketError."""
    content, facts = objects.get(path)
    try:
        value = dict(json.loads(content))
        owner, token, seconds = str(value.get("owner", "")), str(value.get("token", "")), float(value.get("seconds", 0))
    except (ValueError, TypeError, OverflowError, RecursionError):
        # Nobody's that keeps to this form: it expires like any other.
        owner, token, seconds = "unknown", "unknown", _SECONDS
    return _Found(
        "".join(filter(str.isprintable, owner))[:200], token, min(max(seconds, 0.0), 3600.0), facts.tag, facts.written
    )


def _live(path: Path, found: _Found) -> str | None:
    """Who holds a lease, and until when; None where it was given back or has expired."""
    if not found.token:
        return None
    left = found.written + found.seconds - _now(path)
    # The bucket's clock counts whole seconds.
    return f"{found.owner}; its lease expires in {left + 1:.0f} s unless it is renewed" if left > -1 else None


def _now(path: Path) -> float:
    """The time by the bucket's clock."""
    probe = path.with_name(f"{path.name}{_CLOCK}.{uuid.uuid4().hex}")
    objects.put(probe, b"", hashlib.sha256(b"").hexdigest())
    try:
        return objects.facts(probe).written
    finally:
        objects.remove(probe)


def lease_seconds() -> float:
    """How long a lease lasts without being renewed: $ROMA_RAY_LEASE_SECONDS, else a minute. Raises StorageError."""
    given = os.environ.get(SECONDS)
    try:
        seconds = _SECONDS if given is None else float(given)
    except ValueError:
        seconds = 0.0
    if not _LEAST_SECONDS <= seconds <= 3600:
        raise StorageError(f"${SECONDS} is {given!r}: give a number of seconds from {_LEAST_SECONDS:.0f} to 3600")
    return seconds
