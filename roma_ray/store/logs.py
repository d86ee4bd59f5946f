"""Append logs: lines that workers and drivers add to a file, and that others read while it grows.

An object is put again, whole, with each line, in place of exactly the one that was read: of two writers neither loses a line.
"""

from __future__ import annotations

import os
from pathlib import Path

from roma_ray.store import buckets, objects
from roma_ray.store.files import unwritable


def append_line(path: str | Path, line: str) -> None:
    """Add a line; one that a killed process left torn is closed first. Raises StorageError."""
    file = Path(path)
    if buckets.is_object(file):
        _append(file, line.encode() + b"\n")
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a+b") as stream:
            torn = False
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                torn = stream.read(1) != b"\n"
            stream.write((b"\n" if torn else b"") + line.encode() + b"\n")
    except OSError as error:
        raise unwritable(file, error) from error


def whole_lines(path: str | Path, offset: int = 0) -> tuple[list[str], int]:
    """Lines that are whole from byte `offset` on, and where the next one begins; none where there is no file. Raises OSError.

    A line may be half written: the rest comes with the next call.
    """
    try:
        if buckets.is_object(path):
            new = objects.get_after(path, offset) if offset else objects.get(path)[0]
        else:
            with open(path, "rb") as stream:
                stream.seek(offset)
                new = stream.read()
    except (FileNotFoundError, NotADirectoryError):
        return [], offset
    whole = new[: new.rfind(b"\n") + 1]
    return whole.decode(errors="replace").split("\n")[:-1], offset + len(whole)


_known: dict[Path, tuple[bytes, str]] = {}
"""What this process last put to a log in a bucket, and its ETag: where nobody else wrote, it need not be read again."""
_MOST_KNOWN = 16


def put_again(path: str | Path) -> int:
    """Bytes that are put again with the next line of a log in a bucket, as far as this process knows."""
    return len(_known.get(Path(path), (b"", ""))[0])


def _append(path: Path, line: bytes) -> None:
    while True:
        before, tag = _known.get(path) or _there(path)
        try:
            new = objects.replace(path, before + line, tag) if tag else objects.create(path, line)
        except objects.Lost:
            new = None
        if new is not None:
            _known.pop(path, None)
            _known[path] = before + line, new
            if len(_known) > _MOST_KNOWN:
                del _known[next(iter(_known))]
            return
        _known.pop(path, None)


def _there(path: Path) -> tuple[bytes, str]:
    try:
        content, facts = objects.get(path)
    except FileNotFoundError:
        return b"", ""
    return content, facts.tag
