"""A head as a chain of slices: the last one here, with `lm_head` and the losses, those below it wherever their links are.

Routers of the slices below are here as copies, so masters, adapters and optimizers see the routers of a whole head; what the
copies hold goes to the links with the next pass. A whole head is a chain of one.

Shapes: T flat tokens, D width, P positions, L layers, E experts, N kept tokens, V vocabulary rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from roma_ray.moe.finite import watching
from roma_ray.moe.links import HeldSlice, PassPlan, run_slice, slice_reach
from roma_ray.moe.masters import RouterMasters, frozen_digest, gate_tensors
from roma_ray.moe.reach import WeightsReader, read_weights
from roma_ray.moe.routers import Router
from roma_ray.moe.sending import sent
from roma_ray.moe.slices import Slice

Item = TypeVar("Item")


class Links(Protocol):
    """The slices below the last one, from the bottom up, and how to call them."""

    def __len__(self) -> int: ...

    def call(self, link: int, method: str, *arguments: Any, parts: int = 1) -> Any:
        """Call a `HeldSlice`'s method and do not wait; a handle of its value, or of each of its `parts`.

        Arguments may be handles. Calls of one link run in the order in which they were made.
        """

    def get(self, handle: Any) -> Any:
        """The value behind a handle. Raises what the call raised."""


class HereLinks:
    """Links in this process: each call is done when it is made, and a handle is the value."""

    def __init__(self, links: Sequence[HeldSlice] = ()) -> None:
        self.links = links

    def __len__(self) -> int:
        return len(self.links)

    def call(self, link: int, method: str, *arguments: Any, parts: int = 1) -> Any:
        return getattr(self.links[link], method)(*arguments)

    def get(self, handle: Any) -> Any:
        return handle


@dataclass
class BegunPass:
    """A pass that the links work on."""

    number: int | None
    """By which its backward is called; None without a graph."""
    plan: PassPlan
    states: Any
    rows: list[Any]


@dataclass
class Pass:
    """A pass through all slices."""

    number: int | None
    layers: tuple[int, ...]
    states: Tensor
    """Logits [N, V] at the kept tokens."""
    routing_1PLE: Tensor
    """Of the layers asked for, ascending."""
    leaves: list[Tensor | None] = field(default_factory=list)
    """Where the graph of this process begins: the states that entered the last slice, then each link's routing rows."""


class Chain:
    """A head in slices; `part` is the last one."""

    def __init__(self, part: Slice, links: Links | None = None) -> None:
        self.part = part
        self.links: Links = HereLinks() if links is None else links
        copies = [self.links.get(handle) for handle in [self.links.call(n, "copies") for n in range(len(self.links))]]
        self._copies: list[list[Router]] = [[_moved(router, part.device) for router in own] for own in copies]
        self.routers = [*(router for own in self._copies for router in own), *part.routers]
        self._sent: list[tuple[Tensor, int]] = []
        self._numbers = count()

    @property
    def start(self) -> int:
        """The head's first layer."""
        return min(self.part.start, *(router.layer for router in self.routers))

    @property
    def stop(self) -> int:
        return self.part.stop

    @property
    def path(self) -> str:
        return self.part.path

    @property
    def revision(self) -> str | None:
        return self.part.revision

    @property
    def model_type(self) -> str:
        return self.part.model_type

    @property
    def dtype(self) -> torch.dtype:
        return self.part.dtype

    @property
    def device(self) -> torch.device:
        """Where the last slice is, and all that is computed from its output."""
        return self.part.device

    def digest(self) -> str:
        """Of all that is frozen, in every slice."""
        below = [self.links.call(n, "digest") for n in range(len(self.links))]
        return " ".join([frozen_digest(self.part.model), *map(self.links.get, below)])

    def ahead(self, items: Iterable[Item], begin: Callable[[Item], BegunPass]) -> Iterator[tuple[Item, BegunPass]]:
        """Each item with its pass, of which a few more are begun than are taken, so that all slices have work: as many as there are
        slices (1F1B), and one, for what a link hands on has a way to go.
        """
        waiting: deque[tuple[Item, BegunPass]] = deque()
        most = len(self.links) + 1 if len(self.links) else 0
        for item in items:
            waiting.append((item, begin(item)))
            if len(waiting) > most:
                yield waiting.popleft()
        yield from waiting

    def begin(self, plan: PassPlan, states_TD: Tensor, *, graph: bool) -> BegunPass:
        """Send a pass through the links; `states_TD` are those after the attention of the head's first layer."""
        number = next(self._numbers) if graph else None
        states: Any = states_TD
        rows = []
        for link, gates in enumerate(self._changed()):
            method, more = ("infer", ()) if number is None else ("forward", (number,))
            states, own = self.links.call(link, method, plan, gates, states, *more, parts=2)
            rows.append(own)
        return BegunPass(number, plan, states, rows)

    def finish(self, begun: BegunPass, *, keep: Sequence[int], vocabulary_rows: Tensor | None = None) -> Pass:
        """Take a pass up where the links leave it, in the caller's grad mode. Arguments as of `run_packed`."""
        below: list[Tensor | None] = [self.links.get(begun.states), *map(self.links.get, begun.rows)]
        if len(self.links):
            below = [None if value is None else sent(value, self.device).detach() for value in below]
            if begun.number is not None:
                below = [None if value is None else value.requires_grad_() for value in below]
        entering_TD, *rows = below
        assert entering_TD is not None
        states, own = run_slice(
            self.part,
            begun.plan,
            entering_TD,
            resume=not len(self.links),
            keep=keep,
            vocabulary_rows=vocabulary_rows,
        )
        found = [row for row in (*rows, own) if row is not None]
        if not found:
            found = [states.new_empty(*begun.plan.positions_1P.shape, 0, 0)]
        routing_1PLE = found[0] if len(found) == 1 else torch.cat(found, dim=2)
        return Pass(begun.number, begun.plan.layers, states, routing_1PLE, below if len(self.links) else [])

    def gradients(
        self, done: Pass, term: Tensor, masters: RouterMasters, *, retain: bool = False
    ) -> Callable[[], list[Tensor | None]]:
        """The gradient of a term of a pass on each gate of `masters`, None where there is none: the links begin with theirs, and
        what is returned waits for them. With `retain` the pass is held until `drop`.
        """
        assert masters.layers == done.layers, "a pass has gradients for the gates of the layers that it was asked for"
        gates = masters.parameters()
        leaves = [leaf for leaf in done.leaves if leaf is not None]
        found = torch.autograd.grad(term, [*gates, *leaves], retain_graph=retain, allow_unused=True)
        direct, crossing = found[: len(gates)], iter(found[len(gates) :])
        states, *rows = [None if leaf is None else next(crossing) for leaf in done.leaves] or [None]
        handles = []
        for link in reversed(range(len(self.links))):
            states, own = self.links.call(link, "backward", states, rows[link], done.number, retain, parts=2)
            handles.append(own)

        def collect() -> list[Tensor | None]:
            # The gates of the lower layers come first.
            below = [grad for handle in reversed(handles) for grad in self.links.get(handle)]
            through = [*below, *[None] * (len(gates) - len(below))]
            return [_sum(gate, *grads) for gate, *grads in zip(gates, direct, through, strict=True)]

        return collect

    def drop(self, done: Pass) -> None:
        """Let go of a pass that was retained."""
        for link in range(len(self.links)):
            self.links.call(link, "drop", done.number)

    def reach(
        self,
        plan: PassPlan,
        states_TD: Tensor,
        masters: RouterMasters,
        *,
        keep: Sequence[int],
        read: WeightsReader = read_weights,
    ) -> float:
        """The least reach of the routers asked for (`moe/reach.py`)."""
        assert not len(self.links) or read is read_weights, "links weigh experts by what their routers give"
        states: Any = states_TD
        handles = []
        for link, gates in enumerate(self._changed()):
            states, own = self.links.call(link, "weigh", plan, gates, states, parts=2)
            handles.append(own)
        entering_TD = self.links.get(states)
        resume = not len(self.links)
        _, found = slice_reach(self.part, plan, entering_TD, masters, resume=resume, keep=keep, read=read)
        return min([found, *map(self.links.get, handles)])

    def origin(self, plan: PassPlan, states_TD: Tensor, *, keep: Sequence[int]) -> str | None:
        """Where values first stop being finite, if they do (`moe/finite.py`)."""
        states: Any = states_TD
        handles = []
        for link, gates in enumerate(self._changed()):
            states, own = self.links.call(link, "watch", plan, gates, states, parts=2)
            handles.append(own)
        with watching(self.part.model, self.part.start) as seen:
            run_slice(self.part, plan, self.links.get(states), resume=not len(self.links), keep=keep)
        return next((found for found in (*map(self.links.get, handles), seen.origin) if found is not None), None)

    def _changed(self) -> list[dict[str, Tensor] | None]:
        """For each link the values of its gates, fp32 on the CPU, where one has changed since they were sent."""
        held = [
            {f"layers.{router.layer}.{name}": tensor for router in own for name, tensor in gate_tensors(router).items()}
            for own in self._copies
        ]
        now = [(tensor, tensor._version) for own in held for tensor in own.values()]
        same = len(now) == len(self._sent) and all(
            a is b and before == after for (a, before), (b, after) in zip(self._sent, now, strict=True)
        )
        self._sent = now
        return [None if same else {key: t.detach().float().cpu().clone() for key, t in own.items()} for own in held]


def as_chain(head: Slice | Chain) -> Chain:
    """A head as a chain: a whole one is a chain of one."""
    return head if isinstance(head, Chain) else Chain(head)


def _sum(gate: Tensor, direct: Tensor | None, through: Tensor | None) -> Tensor | None:
    """A gate's gradient here and in its link, together, where the gate is."""
    if through is None:
        return direct
    through = sent(through, gate.device)
    return through if direct is None else direct + through


def _moved(router: Router, device: torch.device) -> Router:
    router.module.to(device)
    return router
