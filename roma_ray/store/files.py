"""Files of the storage: put whole, got whole, listed below a folder, created where absent, removed. No more is done to them.

This is what an object store can do as well. Whoever must map a file, or hand it to a library that opens it, asks for its
`local` copy; on a mounted file system that is the file itself. A folder is nothing but the beginning of its files' names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from roma_ray.errors import StorageError

_ASIDE = ".tmp"


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)` and put the result at `path` whole: written aside, synced, renamed.

    Raises StorageError when the storage is full, read-only or gone.
    """
    target = Path(path)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{_ASIDE}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        with open(aside, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(aside, target)
        _sync_folder(target.parent)
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
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: str | Path, text: str) -> None:
    """Put UTF-8 text whole. Raises StorageError."""
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Put bytes whole. Raises StorageError."""
    write_atomically(path, lambda aside: aside.write_bytes(content))


def create(path: str | Path, text: str) -> bool:
    """Put UTF-8 text where nothing is; False where something was. Raises StorageError."""
    target = Path(path)
    if target.exists():
        return False
    write_text(target, text)
    return True


def read_text(path: str | Path) -> str:
    """A file's UTF-8 text. Raises OSError (FileNotFoundError where there is none), UnicodeDecodeError."""
    return Path(path).read_text(encoding="utf-8")


def read_bytes(path: str | Path) -> bytes:
    """A file's bytes. Raises OSError (FileNotFoundError where there is none)."""
    return Path(path).read_bytes()


def read_json(path: str | Path) -> Any:
    """A file's JSON. Raises OSError (FileNotFoundError where there is none), ValueError, RecursionError."""
    return json.loads(read_text(path))


def exists(path: str | Path) -> bool:
    """Whether there is such a file, or any below a folder of that name."""
    return Path(path).exists()


def size(path: str | Path) -> int:
    """A file's bytes. Raises OSError."""
    return Path(path).stat().st_size


def written_at(path: str | Path) -> float:
    """When a file was put, in seconds since 1970. Raises OSError."""
    return Path(path).stat().st_mtime


def listed(folder: str | Path, pattern: str = "*") -> list[Path]:
    """What lies in a folder, by name: paths that match, none where there is no such folder."""
    return sorted(Path(folder).glob(pattern))


def below(folder: str | Path) -> list[Path]:
    """Every file below a folder, by path."""
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def remove(path: str | Path) -> None:
    """Remove a file; no error where there is none. Raises OSError."""
    Path(path).unlink(missing_ok=True)


def remove_folder(folder: str | Path) -> None:
    """Remove all below a folder, as far as that goes."""
    shutil.rmtree(folder, ignore_errors=True)


def drop_empty(folder: str | Path) -> None:
    """Remove a folder in which nothing is left, where folders are more than the beginning of names."""
    with contextlib.suppress(OSError):
        Path(folder).rmdir()


def local(path: str | Path) -> Path:
    """A local file of the same bytes, for who maps it or opens it by name; nobody may write to it."""
    return Path(path)


def free_bytes(folder: str | Path) -> int:
    """Room that is left where a folder is. Raises OSError."""
    return shutil.disk_usage(folder).free


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
