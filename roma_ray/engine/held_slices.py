"""Slices that a process has loaded and keeps for its next work, where that asks for the same ones again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from roma_ray.moe.slices import Slice

Key = tuple[Any, int, int | None, bool]
"""The model and its settings, the first layer, the one after the last, whether with `lm_head`."""


@dataclass
class _Held:
    part: Slice
    gates: list[dict[str, Tensor]]
    """Of the base model: a work may have put others in their place."""


class HeldSlices:
    """What a process holds from one work to the next. Never more than what one of them needs."""

    def __init__(self) -> None:
        self.loaded = 0
        self._held: dict[Key, _Held] = {}
        self._used: set[Key] = set()

    @contextmanager
    def opening(self, model: Any) -> Iterator[None]:
        """While a work of `model` (a ModelSpec; else it needs none of these) is opened, what it loads is held, or taken of what is.

        Of another model nothing is left before, nor afterwards what the work has not asked for.
        """
        if any(key[0] != model for key in self._held):
            self.release()
        self._used = set()
        token = _HOLDING.set(self)
        try:
            yield
        except BaseException:
            self.release()
            raise
        finally:
            _HOLDING.reset(token)
        self._leave(self._used)

    def take(self, key: Key, load: Callable[[], Slice]) -> Slice:
        """The slice, as it was loaded; one that is not held is loaded when the unused ones are gone. Raises what `load` does."""
        import torch

        from roma_ray.moe.routers import router_parameters

        if key in self._held:
            held = self._held[key]
            with torch.no_grad():
                for router, values in zip(held.part.routers, held.gates, strict=True):
                    for name, parameter in router_parameters(router).items():
                        parameter.copy_(values[name])
        else:
            self._leave(self._used)
            part = load()
            gates = [{n: p.detach().clone() for n, p in router_parameters(r).items()} for r in part.routers]
            held = self._held[key] = _Held(part, gates)
            self.loaded += 1
        self._used.add(key)
        return held.part

    @property
    def told_by_content(self) -> bool:
        """Whether other weights at the same path would be another model: a place of self-checks is named by the content."""
        return all(key[0].checks for key in self._held)

    def release(self) -> None:
        """Hold nothing."""
        self._leave(set())

    def _leave(self, keys: set[Key]) -> None:
        if gone := self._held.keys() - keys:
            for key in gone:
                del self._held[key]
            give_back()


def give_back() -> None:
    """Give the memory of what is not referred to any more back to the device and the system."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_HOLDING: ContextVar[HeldSlices | None] = ContextVar("held slices", default=None)


def holding() -> HeldSlices | None:
    """What this thread's work may take its slices from, while it is opened."""
    return _HOLDING.get()
