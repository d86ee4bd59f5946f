"""Folders of models and checkpoints: what in them may be read, and how one is written so that it appears whole."""

from __future__ import annotations

import os
import pickle
import shutil
import stat
import struct
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from roma_ray.errors import CheckpointError, RomaError, StorageError
from roma_ray.store.buckets import is_object
from roma_ray.store.files import write_bytes
from roma_ray.store.scratch import scratch_folder

MANIFEST = "roma.json"


# What reading code, ours and the libraries', raises for files of the wrong shape.
_MALFORMED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RecursionError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    EOFError,
    OSError,
    ImportError,
    struct.error,
    pickle.UnpicklingError,
    StrictDataclassError,
)


@contextmanager
def refusing_malformed(path: str | Path, kind: type[RomaError] = CheckpointError) -> Iterator[None]:
    """Turn what a file of the wrong shape makes the reading code raise into one error of `kind` that names it.

    Foreign files can be wrong in more ways than checks can list; none of them may end in a traceback.
    """
    try:
        yield
    except RomaError:
        raise
    except _MALFORMED as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise kind(f"{path} is malformed ({type(error).__name__}: {reason:.160})") from None


# The files of a model or adapter that anyone reads: weights, configurations, tokenizers, templates.
_READ = {".json", ".safetensors", ".model", ".txt", ".jinja"}


def refuse_special_file(path: Path, kind: type[RomaError] = CheckpointError) -> None:
    """Raise `kind` for what no reader may open: a FIFO or device may never end, and a link may lead nowhere.

    A path at which there is nothing is left to the reader.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink():
            raise kind(
                f"{path} is a link that leads nowhere ({error.strerror}): put the file itself there, or remove the link"
            ) from None
        return
    if not stat.S_ISREG(mode):
        raise kind(f"{path} is no regular file (a folder, pipe or device): put the file itself there")


def refuse_special_files(folder: Path, kind: type[RomaError] = CheckpointError) -> None:
    """`refuse_special_file` for every file of a model's or adapter's folder that is read."""
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ:
            refuse_special_file(path, kind)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends without an error, and vanishes otherwise.

    An older checkpoint of ours at `target` is replaced. In a bucket its files are put, the manifest last. Raises CheckpointError
    when something else is there, and StorageError when the storage is full or not writable.
    """
    if is_object(target):
        with scratch_folder() as folder:
            yield folder
            for path in sorted(folder.rglob("*"), key=lambda path: (path.name == MANIFEST, path)):
                if path.is_file():
                    write_bytes(target / path.relative_to(folder), path.read_bytes())
        return
    target = target.absolute()
    if target.exists() and not (target / MANIFEST).is_file() and (target.is_file() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not a checkpoint of roma-ray; choose another place or remove it")
    mark = uuid.uuid4().hex[:8]
    aside = target.with_name(f".{target.name}.{mark}.tmp")
    old = target.with_name(f".{target.name}.{mark}.old")
    try:
        aside.mkdir(parents=True)
        yield aside
        for path in sorted(aside.iterdir()):
            _sync(path)
        _sync(aside)
        if target.exists():
            os.replace(target, old)
        os.replace(aside, target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise StorageError(
            f"cannot write {target}: {getattr(error, 'strerror', None) or error}. Free some space or choose another place."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
