"""Turning what a worker raised into one message, with its traceback in a file that the message names."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from roma_ray import errors
from roma_ray.errors import RomaError, StorageError, WorkerError
from roma_ray.store.files import write_text

FOLDER = ".failures"


def keep_traceback(folder: str | Path, text: str) -> Path | None:
    """Write a worker's traceback into the stage's folder; None where that cannot be written."""
    path = Path(folder) / FOLDER / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    try:
        write_text(path, text)
    except StorageError:
        return None
    return path


def packed(error: BaseException) -> dict[str, str]:
    """A failure as plain data: Ray keeps the text of what a worker raises, but not always its class."""
    return {"kind": type(error).__name__, "text": _plain(error), "traceback": traceback.format_exc()}


def unpacked(failures: Sequence[Mapping[str, str]], name: str, folder: str | Path) -> RomaError:
    """The error that the user sees for packed failures of the stage `name`: the first one's, expected ones before bugs."""
    path = keep_traceback(folder, "\n\n".join(f["traceback"] for f in failures))
    where = f"\nThe worker's traceback: {path}" if path else ""
    for failure in failures:
        kind = getattr(errors, failure["kind"], None)
        if isinstance(kind, type) and issubclass(kind, RomaError):
            return kind(failure["text"] + where)
    return WorkerError(f"{name}: a worker failed: {failures[0]['kind']}: {failures[0]['text']}{where}")


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it wraps, by Ray's `cause`, Train's `worker_failures` and Python's own chaining."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        wrapped = [getattr(current, name, None) for name in ("cause", "controller_failure", "health_check_failure")]
        inner = [*wrapped, current.__cause__, *getattr(current, "worker_failures", {}).values()]
        waiting += [e for e in inner if isinstance(e, BaseException)]


def as_deaths() -> None:
    """Let Ray Tune take a worker that Ray ended (for memory, with its node) for a dead one, in this process.

    Tune asks each trial's actor for results. It takes RayActorError for a death; for what else comes of one, OutOfMemoryError
    foremost, it ends the whole sweep with a RuntimeError (Ray 2.50 to 2.60).
    """
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import RayActorError, RayError, RayTaskError

    plain = RayActorManager._actor_task_failed
    if getattr(plain, "takes_deaths", False):
        return

    # Ray passes these by name.
    def failed(self: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, RayError) and not isinstance(exception, (RayActorError, RayTaskError)):
            exception = RayActorError(error_msg=str(exception))
        plain(self, tracked_actor_task=tracked_actor_task, exception=exception)

    failed.takes_deaths = True  # type: ignore[attr-defined]
    RayActorManager._actor_task_failed = failed


def explain(error: BaseException, name: str, folder: str | Path, of: str | None = None) -> RomaError:
    """The error that the user sees for one raised in a worker of the stage `name`, whose workers are those `of` another where it says."""
    known = list(chain(error))
    text = "\n\n".join("".join(traceback.format_exception(e, chain=False)) for e in known)
    path = keep_traceback(folder, text)
    where = f"\nThe worker's traceback: {path}" if path else ""
    for found in known:
        if isinstance(found, RomaError):
            kind = next(c for c in type(found).__mro__ if c.__module__ == RomaError.__module__)
            return kind(f"{_plain(found)}{where}")
    from ray.exceptions import OutOfMemoryError

    if any(isinstance(found, OutOfMemoryError) for found in known):
        return WorkerError(
            f"{name}: memory ran out on a worker's node, and Ray ended the worker, more often than ray.max_failures lets it try "
            f"again. Use fewer workers on a node (ray.{of or name}_workers), smaller batches, or nodes with more memory.{where}"
        )
    root = known[-1]
    remedy = ""
    if isinstance(root, ModuleNotFoundError):
        remedy = " Install roma-ray on every node, or submit the job with --working-dir ."
    return WorkerError(f"{name}: a worker failed: {type(root).__name__}: {_plain(root)}.{remedy}{where}")


def _plain(error: BaseException) -> str:
    """The error's own text: Ray puts a whole traceback into the text of errors that it carries."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException) and cause is not error:
        return _plain(cause)
    if isinstance(error, OSError) and not isinstance(error, RomaError):
        return str(error)  # its first argument is only a number
    return str(error.args[0]) if error.args else type(error).__name__


@contextlib.contextmanager
def explained(name: str, folder: str | Path, of: str | None = None) -> Iterator[None]:
    """Turn what workers of this stage raise into a RomaError. See `explain`."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        raise explain(error, name, folder, of) from None
