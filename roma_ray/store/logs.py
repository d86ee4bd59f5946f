"""Append logs: lines that workers and drivers add to a file, and that others read while it grows."""

from __future__ import annotations

import os
from pathlib import Path

from roma_ray.store.files import unwritable


def append_line(path: str | Path, line: str) -> None:
    """Add a line; one that a killed process left torn is closed first. Raises StorageError."""
    file = Path(path)
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
        with open(path, "rb") as stream:
            stream.seek(offset)
            new = stream.read()
    except (FileNotFoundError, NotADirectoryError):
        return [], offset
    whole = new[: new.rfind(b"\n") + 1]
    return whole.decode(errors="replace").split("\n")[:-1], offset + len(whole)
