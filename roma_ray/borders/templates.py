"""Strangers' templates, rendered in a process of its own: one that loops or allocates without bound ends there, not here.

Jinja's sandbox keeps a template from Python's internals, not from `range` in `range` or from doubling a text forty times. A
process has limits that no template passes: seconds of a processor (so a slow machine changes nothing) and memory.
"""

from __future__ import annotations

import importlib
import json
import math
import pickle
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

from roma_ray.borders.text import printable
from roma_ray.errors import ConfigError

SECONDS = 10
"""Of a processor, for one text; a usual one takes a thousandth."""
MEMORY = 1 << 30
"""Bytes more than the process has when it starts."""
LONGEST = 1 << 22
"""Characters of a rendered text."""

Render = Callable[[str, Mapping[str, Any]], str]
"""(template, values) -> text; it runs in the other process."""


class Renderer:
    """A process that renders templates with a function named `module:function`; it starts at the first text and again after a death."""

    def __init__(self, function: str, *, seconds: int = SECONDS, memory: int = MEMORY) -> None:
        self.function, self.seconds, self.memory = function, seconds, memory
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(self, template: str, values: Mapping[str, Any], what: str) -> str:
        """The text of a template, which errors call `what`.

        Raises ConfigError where it passes the limits, jinja2.TemplateError where it cannot be rendered.
        """
        import jinja2

        with self._lock:
            if self._process is None:
                self._process = self._start()
            answer = _asked(self._process, template, values)
            if "text" in answer:
                return str(answer["text"])
            if "error" in answer:
                raise jinja2.TemplateError(str(answer["error"]))
            if "end" in answer:
                self.close()
        raise ConfigError(
            f"{what} takes more than {self.seconds} s of a processor, {self.memory >> 20} MiB of memory or {LONGEST} characters "
            f"for one text ({answer.get('end') or answer['limit']}): it loops or grows without bound. Mend it, or do without it"
        )

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        settings = [self.function, self.seconds, self.memory]
        # What can be imported here can be imported there, also where a script has set its own path.
        script = f"import sys; sys.path[:] = {sys.path!r}; from roma_ray.borders.templates import serve; serve(*{settings!r})"
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        answer = _answer(process)
        assert answer == {"text": "ready"}, answer
        return process


def _asked(process: subprocess.Popen[bytes], template: str, values: Mapping[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None
    try:
        pickle.dump((template, dict(values)), process.stdin)
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has died; its end says how
    return _answer(process)


def _answer(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """What the process says; `end` where it is no more."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if line.endswith(b"\n"):
        answer: dict[str, Any] = json.loads(line)
        return answer
    code = process.wait()
    return {"end": f"it ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with {code}"}


def serve(function: str, seconds: int, memory: int) -> None:
    """The other process: render what comes until nothing comes any more."""
    answers = open(1, "w", encoding="ascii", closefd=False)  # noqa: SIM115 - open until the process ends
    sys.stdout = sys.stderr  # what a library prints is no answer
    module, _, name = function.partition(":")
    render: Render = getattr(importlib.import_module(module), name)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + memory)
    _say(answers, {"text": "ready"})
    while True:
        try:
            template, values = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + seconds)
        _say(answers, _rendered(render, template, values))


def _rendered(render: Render, template: str, values: Mapping[str, Any]) -> dict[str, Any]:
    try:
        text = render(template, values)
    except MemoryError:
        return {"limit": "no more memory"}
    except Exception as error:  # noqa: BLE001 - whatever a template raises is its author's matter
        return {"error": printable(f"{type(error).__name__}: {error}", 300)}
    return {"text": text} if len(text) <= LONGEST else {"limit": f"{len(text)} characters"}


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _say(stream: IO[str], answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


# -- chat templates, which come with models --------------------------------------------------------------------------------


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, tokenize: bool = False, **options: Any) -> str:
    """The text of a conversation, as `tokenizer.apply_chat_template(messages, tokenize=False, ...)` gives it, within limits.

    Raises ConfigError, jinja2.TemplateError (see `Renderer.render`).
    """
    assert not tokenize
    special = {
        name: [str(token) for token in value] if isinstance(value, list) else str(value)
        for name, value in tokenizer.special_tokens_map.items()
    }
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    values = {"conversations": [plain], **special, **options}
    name = printable(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    return _chats().render(tokenizer.get_chat_template(), values, f"the chat template of {name}")


@cache
def _chats() -> Renderer:
    return Renderer("roma_ray.borders.templates:render_chat")


def render_chat(template: str, values: Mapping[str, Any]) -> str:
    """transformers' own rendering of one conversation."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(chat_template=template, **values)
    return str(rendered[0])
