"""Progress lines while workers start: how many are running and what the others wait for, until the first one has done work."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from roma_ray.errors import StorageError
from roma_ray.store.files import listed, read_text, write_text

_FIRST_SECONDS, _LONGEST_SECONDS = 10.0, 60.0
WAITING, IMPORTS, MODEL, READY = "waiting", "imports", "model", "ready"
_WORDS = {
    IMPORTS: "import their libraries",
    MODEL: "load the model",
    READY: "are at work",
}


class Starting:
    """Prints how far the workers are every so often, inside a `with` block and until `over` is called."""

    def __init__(self, stage: str, stands: Callable[[], str], say: Callable[[str], None]) -> None:
        self.stage, self.stands, self.say = stage, stands, say
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tell, name=f"starting-{stage}", daemon=True)

    def __enter__(self) -> Starting:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over()
        self._thread.join()

    def over(self) -> None:
        """A worker has done something: nothing more is said."""
        self._over.set()

    def _tell(self) -> None:
        seconds, pause = 0.0, _FIRST_SECONDS
        while not self._over.wait(pause):
            seconds += pause
            self.say(f"{self.stage}: starting workers, {seconds:.0f} s so far: {self.stands()}")
            pause = min(2 * pause, _LONGEST_SECONDS)


class Roll:
    """Where the workers of a stage stand: a file each, in a folder of the stage that the driver sees too."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = uuid.uuid4().hex[:12]

    def note(self, state: str) -> None:
        """Note this worker's state in the stage's folder. A storage that refuses the note is ignored here: the work will report it."""
        with contextlib.suppress(StorageError):
            write_text(self.folder / self.name, state)

    def stands(self, workers: int) -> str:
        """How far `workers` workers are, in words."""
        found = Counter(read_text(path) for path in listed(self.folder, "[!.]*"))
        return in_words(found, workers)


def in_words(states: Counter[str], workers: int) -> str:
    """How many of the workers are in which state."""
    parts = [f"{states[state]} {words}" for state, words in _WORDS.items() if states[state]]
    missing = workers - sum(states[state] for state in _WORDS)
    if missing > 0:
        parts.append(f"{missing} of {workers} wait for a node with room, or for their process to start")
    return ", ".join(parts)
