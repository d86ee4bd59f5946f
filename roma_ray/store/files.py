"""Files of the storage: put whole, got whole, listed below a folder, created where absent, removed. No more is done to them.

This is what a bucket can do as well: a path may be an object's (`objects.py`). Whoever must map a file, or hand it to a library
that opens it, asks for its `local` copy; on a mounted file system that is the file itself. A folder is nothing but the
beginning of its files' names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from roma_ray.errors import BucketError, StorageError
from roma_ray.store import buckets, leases, objects, staging, uploads
from roma_ray.store.buckets import is_object

_ASIDE = ".tmp"


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)` and put the result at `path` whole: written aside, synced, renamed.

    Raises StorageError when the storage is full, read-only or gone.
    """
    target = Path(path)
    if is_object(target):
        staging.write_through(target, write)
        return
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{_ASIDE}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        with open(aside, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(aside, target)
        _sync_folder(target.parent)
    except StorageError:
        raise  # of another place, which what is written was read from
    except (OSError, SafetensorError) as error:
        # safetensors has an error of its own for what the system refuses.
        raise unwritable(target, error) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def unwritable(path: str | Path, error: Exception) -> StorageError:
    """The error for a file that the storage, full, read-only or gone, did not take."""
    return StorageError(
        f"cannot write {path}: {getattr(error, 'strerror', None) or error}. Free some space or make it writable, or choose "
        "another place with --storage (or $ROMA_RAY_STORAGE), and run the same command again: finished work is kept."
    )


def write_json(path: str | Path, value: Any) -> None:
    """Put JSON (non-finite numbers refused) whole. Raises StorageError."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """JSON as it is put: non-finite numbers refused."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_text(path: str | Path, text: str) -> None:
    """Put UTF-8 text whole. Raises StorageError."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Put bytes whole. Raises StorageError."""
    if is_object(path) and not uploads.putting_in_background():
        leases.check_may_write(Path(path))
        objects.put(path, content, hashlib.sha256(content).hexdigest())
        return
    write_atomically(path, lambda aside: aside.write_bytes(content))


def create(path: str | Path, text: str) -> bool:
    """Put UTF-8 text where nothing is; False where something was. Raises StorageError."""
    target = Path(path)
    if is_object(target):
        return objects.create(target, text.encode()) is not None
    if target.exists():
        return False
    write_text(target, text)
    return True


def read_text(path: str | Path) -> str:
    """A file's UTF-8 text. Raises OSError (FileNotFoundError where there is none), UnicodeDecodeError."""
    return objects.get(path)[0].decode() if is_object(path) else Path(path).read_text(encoding="utf-8")


def read_bytes(path: str | Path) -> bytes:
    """A file's bytes. Raises OSError (FileNotFoundError where there is none)."""
    return objects.get(path)[0] if is_object(path) else Path(path).read_bytes()


def read_json(path: str | Path) -> Any:
    """A file's JSON. Raises OSError (FileNotFoundError where there is none), ValueError, RecursionError."""
    return json.loads(read_text(path))


def exists(path: str | Path) -> bool:
    """Whether there is such a file, or any below a folder of that name."""
    return objects.exists(path) if is_object(path) else Path(path).exists()


def present(paths: Sequence[Path]) -> list[bool]:
    """Which of these files are there; a bucket is asked once for each of their folders."""
    if not any(map(is_object, paths)):
        return [path.exists() for path in paths]
    there = {path for folder in {path.parent for path in paths} for path in objects.listed(folder, "*")}
    return [path in there for path in paths]


def is_special(path: str | Path) -> bool:
    """Whether what is there is no file: a folder, or a pipe that would be waited for without end."""
    return not is_object(path) and Path(path).exists() and not Path(path).is_file()


def is_link(path: str | Path) -> bool:
    """Whether a path is another's name; a bucket has none."""
    return not is_object(path) and Path(path).is_symlink()


def is_folder(path: str | Path) -> bool:
    """Whether there is such a folder; in a bucket, whether there is anything below it."""
    return objects.any_below(path) if is_object(path) else Path(path).is_dir()


def size(path: str | Path) -> int:
    """A file's bytes. Raises OSError."""
    return objects.facts(path).size if is_object(path) else Path(path).stat().st_size


def written_at(path: str | Path) -> float:
    """When a file was put, in seconds since 1970. Raises OSError."""
    return objects.facts(path).written if is_object(path) else Path(path).stat().st_mtime


def listed(folder: str | Path, pattern: str = "*") -> list[Path]:
    """What lies in a folder, by name: paths that match, none where there is no such folder."""
    return objects.listed(folder, pattern) if is_object(folder) else sorted(Path(folder).glob(pattern))


def below(folder: str | Path) -> list[Path]:
    """Every file below a folder, by path."""
    if is_object(folder):
        return sorted(path for path, _, _ in objects.below(folder))
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def entries(folder: str | Path) -> Iterator[tuple[Path, int, float]]:
    """Every file below a folder, with its bytes and when it was put. Raises OSError."""
    if is_object(folder):
        yield from objects.below(folder)
    else:
        for path in below(folder):
            yield path, size(path), written_at(path)


def remove(path: str | Path) -> None:
    """Remove a file; no error where there is none. Raises OSError."""
    if is_object(path):
        objects.remove(path)
        return
    Path(path).unlink(missing_ok=True)


def remove_folder(folder: str | Path) -> None:
    """Remove all below a folder, as far as that goes."""
    if is_object(folder):
        with contextlib.suppress(BucketError):
            objects.remove_folder(folder)
        return
    shutil.rmtree(folder, ignore_errors=True)


def drop_empty(folder: str | Path) -> None:
    """Remove a folder in which nothing is left, where folders are more than the beginning of names."""
    if not is_object(folder):
        with contextlib.suppress(OSError):
            Path(folder).rmdir()


def local(path: str | Path) -> Path:
    """A local file of the same bytes and name, for who maps it or opens it; nobody may write to it. Raises OSError."""
    return staging.local_copy(path) if is_object(path) else Path(path)


def locals_of(paths: Sequence[Path]) -> Iterator[Path]:
    """The `local` file of each path, in their order; from a bucket several are fetched ahead. Raises as `local`."""
    return staging.local_copies(paths) if any(map(is_object, paths)) else iter(paths)


def local_tree(folder: str | Path) -> Path:
    """A local folder, or file, of the same content and name; nobody may write to it. Raises OSError."""
    return staging.local_tree(folder) if is_object(folder) else Path(folder)


def local_place(path: str) -> Path:
    """A user's path of a file or folder, `s3://...` as its local copy, `~` expanded; whether it exists is the caller's to see.

    Raises StorageError (no address), BucketError.
    """
    if path.partition("://")[0] in buckets.SCHEMES:
        path = str(buckets.as_path(path))
    if not is_object(path):
        return Path(path).expanduser()
    with contextlib.suppress(FileNotFoundError):
        return local_tree(path)
    return Path(path)


def for_libraries(path: str | Path) -> str:
    """A path as other libraries that know buckets take it."""
    return buckets.address(path) if is_object(path) else str(path)


def seal(files: Mapping[Path, str]) -> None:
    """Say that these files, of a complete stage, have these digests and will not change; `unseal` takes it back."""
    staging.seal({path: digest for path, digest in files.items() if is_object(path)})


def fetch_ahead(paths: Sequence[str | Path]) -> None:
    """Say that `local` copies of these will be asked for, in this order: where they are far away, fetching begins now."""
    far = [path for path in paths if is_object(path)]
    if far:
        staging.fetch_ahead(far)


def roomy(folder: str | Path) -> Path:
    """A local folder with room for large files that are removed soon: the storage's own, else this machine's scratch."""
    return staging.scratch_root() if is_object(folder) else Path(folder)


def free_bytes(folder: str | Path) -> int | None:
    """Room that is left where a folder is; None in a bucket, which has no bound. Raises OSError."""
    return None if is_object(folder) else shutil.disk_usage(folder).free


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex; of an object, the one that its writer put beside it. Raises OSError."""
    return _facts(Path(path))[1]


def file_facts(paths: Sequence[Path]) -> list[tuple[int, str]]:
    """Bytes and SHA-256 of each file. Raises OSError (FileNotFoundError for one that is not there)."""
    if any(map(is_object, paths)):
        return staging.at_once(_facts, paths)
    return [_facts(path) for path in paths]


def _facts(path: Path) -> tuple[int, str]:
    if is_object(path):
        found = objects.facts(path)
        return found.size, found.digest or staging.digest_of(staging.local_copy(path))
    return path.stat().st_size, staging.digest_of(path)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
