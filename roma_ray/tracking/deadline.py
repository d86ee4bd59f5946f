"""A bound on a call that may never end: a server that sends a byte a second resets every time-out of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from typing import TypeVar

T = TypeVar("T")

# Most abandoned calls: each still holds a thread and a connection.
MOST_HANGING = 8
_hanging: list[threading.Thread] = []


class Late(Exception):
    """A call did not end in time."""


def within(seconds: float, call: Callable[[], T], lock: threading.Lock) -> T:
    """`call()`, given up after so many seconds; calls of one lock run one after another.

    Raises Late, also at once where too many calls hang already, and what the call raises.
    """
    _hanging[:] = [thread for thread in _hanging if thread.is_alive()]
    if len(_hanging) >= MOST_HANGING:
        raise Late
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            # After a Ctrl-C the call before this one may still be running.
            with lock:
                outcome.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised again where the call was asked for
            outcome.set_exception(error)

    # A daemon thread, so that a hanging call does not keep the process from ending.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        return outcome.result(seconds)
    except TimeoutError:
        if outcome.done():
            raise
        _hanging.append(thread)
        raise Late from None
