"""Local copies of objects, for what must be a file: one of each a node, in a scratch of bounded size that its processes share.

A copy is named after the object's address and digest, so it is never stale; the digest is compared on arrival. What was not
used for longest goes first. A file that is mapped stays readable for who has it open.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from roma_ray.errors import ArtifactError, BucketError, RomaError, StorageError
from roma_ray.store import leases, objects
from roma_ray.store.pins import pin, pinned
from roma_ray.store.uploads import UPLOADS

SCRATCH, ROOM = "ROMA_RAY_SCRATCH", "ROMA_RAY_SCRATCH_GIB"
_COPIES, _WRITING, _LOCKS = "copies", "writing", "locks"
# What somebody has just asked for is about to be opened.
_SETTLING_SECONDS = 120.0
# What nobody has written to for so long belongs to no living process.
_ABANDONED_SECONDS = 3600.0
_SECONDS_BETWEEN_LOOKS = 5.0
_TRIES = 3
_AT_ONCE, _AHEAD = 4, 8
_sealed: dict[Path, str] = {}

T = TypeVar("T")


def scratch_root() -> Path:
    """This machine's scratch: $ROMA_RAY_SCRATCH, else a folder of this user's under the system's temporary one.

    Raises BucketError where it cannot be made, StorageError where it is somebody else's.
    """
    given = os.environ.get(SCRATCH)
    root = Path(given).expanduser().absolute() if given else Path(tempfile.gettempdir()) / f"roma-ray-{os.getuid()}"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = root.lstat() if given is None else root.stat()
    except OSError as error:
        raise _no_room(root, error) from error
    if not stat.S_ISDIR(status.st_mode) or (given is None and status.st_uid != os.getuid()):
        raise StorageError(f"the scratch {root} is not this user's own folder: name another with ${SCRATCH}")
    return root


def _no_room(place: Path, error: Exception) -> BucketError:
    return BucketError(
        f"cannot write {place}: {getattr(error, 'strerror', None) or error}. Large tables and local copies of a bucket's files lie there: "
        f"free some space, or name another place with ${SCRATCH}, and run the same command again: finished work is kept."
    )


def capacity(root: Path) -> int:
    """Bytes that copies may take: $ROMA_RAY_SCRATCH_GIB, else half of what the disk has free or they take already."""
    given = os.environ.get(ROOM)
    if given is not None:
        try:
            return int(float(given) * (1 << 30))
        except (ValueError, OverflowError):
            raise StorageError(f"${ROOM} is {given!r}, which is no number of GiB") from None
    return (shutil.disk_usage(root).free + sum(size for _, size, _ in _copies(root))) // 2


@dataclass(frozen=True)
class Scratch:
    """This machine's scratch as it stands."""

    root: Path
    capacity: int
    """Bytes that copies may take."""
    taken: int
    free: int
    """What the disk has left beside them."""

    def __str__(self) -> str:
        room = (
            f"copies may take {self.capacity / 2**30:.1f} GiB (${ROOM} sets it) and take {self.taken / 2**30:.1f} GiB"
        )
        return f"{self.root}: {room}; {self.free / 2**30:.1f} GiB of the disk are free"


def scratch_facts() -> Scratch:
    """Where this machine's copies lie and how many may. Raises StorageError where nothing can be written there."""
    root = scratch_root()
    aside = _aside(root, "doctor")
    try:
        aside.write_bytes(b"0")
        taken, free = sum(size for _, size, _ in _copies(root)), shutil.disk_usage(root).free
    except OSError as error:
        raise _no_room(aside, error) from error
    finally:
        shutil.rmtree(aside.parent, ignore_errors=True)
    return Scratch(root, capacity(root), taken, free)


def local_copy(path: str | Path) -> Path:
    """A local file of an object's bytes, of the same name. Raises FileNotFoundError, ArtifactError (damaged), BucketError."""
    root = scratch_root()
    sealed = _sealed.get(Path(path))
    if sealed is not None and _used(place := _named(root, path, sealed)):
        return place
    for _ in range(_TRIES):
        found = objects.facts(path)
        place = _named(root, path, found.digest or found.tag)
        with _locked(root, place):
            if _used(place):
                return place
            try:
                _fetch(root, path, place, found)
            except objects.Lost:
                continue  # it was replaced meanwhile
        _make_room(root, place)
        return place
    raise BucketError(f"cannot read {path}: it changes all the time. Run the same command again.")


def local_copies(paths: Sequence[Path]) -> Iterator[Path]:
    """The copy of each object, in their order, a few ahead of the caller. Raises as `local_copy`."""
    with ThreadPoolExecutor(_AHEAD, thread_name_prefix="copies") as pool:
        waiting: list[Future[Path]] = []
        try:
            for path in paths:
                waiting.append(pool.submit(local_copy, path))
                if len(waiting) > _AHEAD:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def _fetch(root: Path, path: str | Path, place: Path, found: objects.Facts) -> None:
    for tries in range(_TRIES):
        aside = _aside(root, place.name)
        try:
            objects.fetch(path, aside, found.tag)
            if aside.stat().st_size == found.size and found.digest in (None, digest_of(aside)):
                _keep(aside, place)
                return
        except OSError as error:
            if isinstance(error, FileNotFoundError) and aside.parent.exists():
                raise  # the object is gone, not the scratch
            raise _no_room(place, error) from error
        finally:
            shutil.rmtree(aside.parent, ignore_errors=True)
        time.sleep(0.1 * tries)
    raise ArtifactError(
        f"{path} is not what was written (corrupted or truncated): its digest is another. Remove its stage (`roma-ray rm`) and run "
        "again to recompute it."
    )


def seal(files: Mapping[Path, str]) -> None:
    """Take a complete stage's word for the digests of its files: whether a copy is the right one need not be asked then."""
    _sealed.update(files)


def unseal(folder: Path) -> None:
    """Forget it of all below a folder."""
    for path in [path for path in _sealed if folder in path.parents]:
        del _sealed[path]


def local_tree(folder: str | Path) -> Path:
    """A local folder of the same name with copies of all below a folder of objects; of an object, its copy.

    It stays as long as this process is one that asked for it, whatever room there is: its files are opened one by one.

    Raises FileNotFoundError, ArtifactError (damaged), BucketError, StorageError (no room here).
    """
    root, folder = scratch_root(), Path(folder)
    with contextlib.suppress(FileNotFoundError):
        return local_copy(folder)
    names = {path: path.relative_to(folder) for path, _, _ in objects.below(folder)}
    if not names:
        raise FileNotFoundError(f"there is nothing at {folder}")
    if any(".." in name.parts for name in names.values()):
        raise StorageError(f"{folder} holds an object whose name leads out of it; it cannot be copied")
    aside = _aside(root, folder.name)

    def linked(path: Path) -> Path:
        copy, target = local_copy(path), aside / names[path]
        # At once: a copy may go before the last one is there.
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(copy, target)
        return copy

    try:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            copies = dict(zip(names, pool.map(linked, names), strict=True))
        listing = "\0".join(f"{names[path]}\0{copies[path]}" for path in sorted(names))
        marks = hashlib.sha256(listing.encode()).hexdigest()
        place = root / _COPIES / marks[:2] / marks[2:26] / folder.name
        with _locked(root, place):
            if not _used(place):
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(aside, place)
            pin(place)
    except OSError as error:
        if isinstance(error, RomaError) or (isinstance(error, FileNotFoundError) and aside.parent.exists()):
            raise
        raise _no_room(aside, error) from error
    finally:
        shutil.rmtree(aside.parent, ignore_errors=True)
    return place


def fetch_ahead(paths: Sequence[str | Path]) -> None:
    """Begin to copy objects in this order, in the background, as far as half of the scratch has room for them.

    What goes wrong is told to whoever asks for the copy.
    """
    root = scratch_root()
    left = capacity(root) // 2

    def fetch() -> None:
        nonlocal left
        for path in paths:
            # No daemon: a thread in the middle of a request must not meet the end of the interpreter.
            if left < 0 or not threading.main_thread().is_alive():
                return
            with contextlib.suppress(OSError, RomaError):
                left -= local_copy(path).stat().st_size

    threading.Thread(target=fetch, name="fetch-ahead").start()


def write_through(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)`, put the result as an object, whole, and keep it as its local copy. Raises BucketError, StorageError.

    Within `in_background` the put goes on while the caller does.
    """
    root, name = scratch_root(), Path(path).name
    aside = _aside(root, name)
    try:
        write(aside)
    except BaseException as error:
        shutil.rmtree(aside.parent, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError) and not isinstance(error, RomaError):
            raise _no_room(aside, error) from error
        raise
    waiting = UPLOADS.get()
    if waiting is None:
        _upload(root, path, aside)
    else:
        waiting.submit(lambda: _upload(root, path, aside))


def _upload(root: Path, path: str | Path, aside: Path) -> None:
    try:
        digest = digest_of(aside)
        leases.check_may_write(Path(path))
        objects.put(path, aside if aside.stat().st_size else b"", digest)
        place = _named(root, path, digest)
        # Without it, who asks for a copy fetches one.
        with contextlib.suppress(OSError):
            _keep(aside, place)
    except OSError as error:
        if isinstance(error, RomaError):
            raise
        raise _no_room(aside, error) from error
    finally:
        shutil.rmtree(aside.parent, ignore_errors=True)
    _make_room(root, place)


def digest_of(path: Path) -> str:
    """SHA-256 of a local file's bytes, in hex. Raises OSError."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def at_once(call: Callable[[Path], T], paths: Iterable[Path]) -> list[T]:
    """`call` of each path, several at a time: a bucket takes its time for each, whatever is asked. In their order."""
    with ThreadPoolExecutor(4 * _AT_ONCE) as pool:
        return list(pool.map(call, paths))


def _keep(aside: Path, place: Path) -> None:
    """Make a file the copy that its name promises, also after a failure of power. Raises OSError."""
    with open(aside, "rb") as stream:
        os.fsync(stream.fileno())
    place.parent.mkdir(parents=True, exist_ok=True)
    os.replace(aside, place)


def _named(root: Path, path: str | Path, state: str) -> Path:
    """Where the copy of this state of an object (its digest, else its ETag) lies; some readers go by the name."""
    mark = hashlib.sha256(f"{path}\0{state}".encode()).hexdigest()
    return root / _COPIES / mark[:2] / mark[2:26] / Path(path).name


def _aside(root: Path, name: str) -> Path:
    """A new place of that name in a folder of its own, for its writer alone."""
    folder = root / _WRITING / f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise _no_room(folder, error) from error
    return folder / name


@contextlib.contextmanager
def _locked(root: Path, place: Path) -> Iterator[None]:
    """Let one process of this machine at a time make a copy; the others then find it."""
    lock = root / _LOCKS / place.parent.parent.name
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = open(lock, "a")  # noqa: SIM115 - closed below
    except OSError as error:
        raise _no_room(lock, error) from error
    with handle:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _used(place: Path) -> bool:
    """Whether the copy is there; if so it is among the last to go."""
    try:
        os.utime(place.parent)
    except PermissionError:
        pass  # another user's, who shares the scratch
    except OSError:
        return False
    return place.exists()


def _copies(root: Path) -> list[tuple[float, int, Path]]:
    """When each copy was last asked for, its bytes, and its folder."""
    found = []
    for folder in (root / _COPIES).glob("*/*"):
        with contextlib.suppress(OSError):
            sizes = [file.stat() for file in folder.rglob("*") if file.is_file()]
            # A file of a copied folder is the single copy's by another name.
            found.append((folder.stat().st_mtime, sum(s.st_size // s.st_nlink for s in sizes), folder))
    return found


class _Looked:
    """When this process last looked for room in the scratch."""

    at = -_SECONDS_BETWEEN_LOOKS


def _make_room(root: Path, kept: Path) -> None:
    """Remove what was not used for longest until the rest fits, and what killed processes were writing; now and then only."""
    if time.monotonic() - _Looked.at < _SECONDS_BETWEEN_LOOKS:
        return
    _Looked.at, now = time.monotonic(), time.time()
    for folder in (root / _WRITING).glob("*-*"):
        with contextlib.suppress(OSError):
            if now - max(part.stat().st_mtime for part in (folder, *folder.rglob("*"))) > _ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
    copies = sorted(_copies(root))
    excess = sum(size for _, size, _ in copies) - capacity(root)
    for used, size, folder in copies:
        if excess <= 0:
            return
        with contextlib.suppress(OSError):
            if folder != kept.parent and now - used > _SETTLING_SECONDS and not pinned(folder):
                shutil.rmtree(folder, ignore_errors=True)
                excess -= size
