"""Puts to a bucket that go on in the background while the next files are made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar


class Uploads:
    """Puts that go on in the background, in their order; after one that fails none is made."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._waiting: list[Future[None]] = []

    def submit(self, put: Callable[[], None]) -> None:
        """Put something after all that was submitted before."""
        before = self._waiting[-1] if self._waiting else None

        def after() -> None:
            if before is not None:
                before.result()
            put()

        self._waiting.append(self._pool.submit(after))

    @property
    def begun(self) -> bool:
        """Whether anything was submitted."""
        return bool(self._waiting)

    def wait(self) -> None:
        """Wait until all is put. Raises BucketError for what the bucket did not take."""
        self.end()
        if self._waiting:
            self._waiting[-1].result()

    def end(self) -> None:
        """Wait until all is put or has failed."""
        self._pool.shutdown()

    def give_up(self) -> None:
        """Wait for what is being put; what has not begun is not put."""
        self._pool.shutdown(cancel_futures=True)


UPLOADS: ContextVar[Uploads | None] = ContextVar("uploads", default=None)


@contextlib.contextmanager
def in_background() -> Iterator[Uploads]:
    """Within the block, this thread's files for a bucket are put by another one; the caller waits for it when he must."""
    uploads = Uploads()
    token = UPLOADS.set(uploads)
    try:
        yield uploads
    except BaseException:
        uploads.give_up()
        raise
    finally:
        UPLOADS.reset(token)


@contextlib.contextmanager
def trailing() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Yield what makes calls whose files for a bucket are put while the caller goes on, one call's after the other's.

    At the end of the block all are there. Raises BucketError for what the bucket did not take, there or at the next call.
    """
    last: Uploads | None = None

    def make(call: Callable[[], object]) -> None:
        nonlocal last
        if last is not None:
            last.wait()
        with in_background() as last:
            call()

    try:
        yield make
        if last is not None:
            last.wait()
    finally:
        if last is not None:
            last.end()


def putting_in_background() -> bool:
    """Whether this thread is `in_background`: small files then go after the large ones that they speak of."""
    return UPLOADS.get() is not None
