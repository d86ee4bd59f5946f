"""Where finetuning and evaluation get their head from: loaded anew, or kept in memory from one trial to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from roma_ray.engine.model_spec import ModelSpec
from roma_ray.moe.head_chain import Chain
from roma_ray.moe.routers import gates_of, put_gates
from roma_ray.moe.slices import Slice


class Heads:
    """Loads a head whenever one is asked for."""

    @contextmanager
    def lend(self, model: ModelSpec, cut: int) -> Iterator[Slice | Chain]:
        """The layers from `cut` up, with `lm_head`, whole or in slices, for as long as the block runs. Raises ModelError."""
        yield model.load(cut, None, with_lm_head=True)


class KeptHeads(Heads):
    """Keeps the last head that was lent, so that a process which works through many trials loads it once."""

    def __init__(self) -> None:
        self.loaded = 0
        self._key: tuple[ModelSpec, int] | None = None
        self._head: Slice | None = None

    @contextmanager
    def lend(self, model: ModelSpec, cut: int) -> Iterator[Slice | Chain]:
        """As above; the routers are the base model's again afterwards. A head that an error leaves behind is not kept."""
        if self._head is None or self._key != (model, cut):
            self._head = None  # Never two of them in memory.
            self._head, self._key = model.load(cut, None, with_lm_head=True), (model, cut)
            self.loaded += 1
        head = self._head
        base = gates_of(head.routers)
        try:
            yield head
        except BaseException:
            self._head = None
            raise
        put_gates(head.routers, base)


FRESH = Heads()
