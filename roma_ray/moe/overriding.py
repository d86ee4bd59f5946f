"""Replacing a model's routing at chosen positions, or steering its experts at all, through the family's own choice of experts.

Softmax families receive `log r` as router logits (shifted by the row's own log-sum-exp, which softmax cannot see, so that
their own routing gives their own logits back); sigmoid families receive the scores `r x (sum of the row's own scores)`
where their code takes the sigmoid, before selection biases and groups. The router's own forward does the rest, so groups,
biases, renormalisation and scaling are never re-implemented here.

Shapes: B batch, S sequence, P positions, T flat tokens (B x S), L layers, E experts, R replaced rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from roma_ray.errors import ModelError
from roma_ray.moe.families import Family, Scoring, family
from roma_ray.moe.packing import seen_positions
from roma_ray.moe.replacing import replaced
from roma_ray.moe.routers import Router

LINEAR = (functional.linear,)
_SIGMOIDS = (torch.sigmoid, torch.Tensor.sigmoid, torch.special.expit, functional.sigmoid)


@contextmanager
def override_routing(
    model: PreTrainedModel, routers: Sequence[Router], routing_BLE: Tensor, positions_B: Tensor
) -> Iterator[None]:
    """Make `routers` use r = `routing_BLE` at `positions_B` of the padded batch run inside the `with` block.

    `routing_BLE` [B, L, E] with L in the order of `routers`: non-negative rows, each summing to 1 (they are used as given;
    softmax families normalise them, sigmoid families keep the row's original sum of scores). `positions_B` [B] indexes the
    batch; entries of -1 leave that row's routing alone. [B, P, L, E] with [B, P] replaces several positions of a row.
    Gradient flows into `routing_BLE`. With the model's own routing the choice of experts is the same and their
    weights agree to rounding. Raises ModelError if a router does not compute as its family is known to.
    """
    rows_RLE, positions_BP = _checked(routing_BLE, positions_B, routers)
    rule = family(model.config)
    changes = [_Replacement(router, rule, rows_RLE[:, column], positions_BP) for column, router in enumerate(routers)]
    with _changed(changes):
        yield


@contextmanager
def steer_routing(
    model: PreTrainedModel, routers: Sequence[Router], steered_LE: Tensor, margin: float
) -> Iterator[None]:
    """Raise and lower experts of `routers` at every token inside the `with` block.

    `steered_LE`, with L in the order of `routers`: +1 gives an expert the highest log r of the token plus `margin`, -1 the
    lowest less `margin`, 0 leaves it; the family's own choice and weights follow. Raises ModelError as `override_routing`.
    """
    rule = family(model.config)
    with _changed([_Steering(router, rule, steered_LE[n], margin) for n, router in enumerate(routers)]):
        yield


@contextmanager
def _changed(changes: Sequence[_Change]) -> Iterator[None]:
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(replaced(change.router.module, change.around(change.router.module.forward)))
        yield


def _checked(routing: Tensor, positions: Tensor, routers: Sequence[Router]) -> tuple[Tensor, Tensor]:
    positions_BP = positions[:, None] if positions.dim() == 1 else positions
    routing_BPLE = routing[:, None] if routing.dim() == 3 else routing
    expected = (*positions_BP.shape, len(routers), routers[0].width)
    if positions_BP.dim() != 2 or tuple(routing_BPLE.shape) != expected:
        raise ValueError(
            f"routing of shape {tuple(routing.shape)} does not fit positions {tuple(positions.shape)}: expected {expected}"
        )
    return routing_BPLE.flatten(0, 1).float(), positions_BP


class _Change(ABC):
    """What one router's logits or scores become during one `with` block."""

    def __init__(self, router: Router, rule: Family) -> None:
        self.router, self.rule = router, rule

    @abstractmethod
    def logits(self, logits_TE: Tensor) -> Tensor:
        """Softmax families: the changed logits, fp32."""

    @abstractmethod
    def scores(self, scores_TE: Tensor) -> Tensor:
        """Sigmoid families: the changed scores."""

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The router's forward with its logits (or sigmoid scores) changed."""

        def changed(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            # The changed logits are fp32 whatever the model's type, so that r is not rounded; what leaves the router
            # must have the types that it always has, or the experts would compute in another one.
            with torch.no_grad():
                # One token, in as many dimensions as this family's router takes.
                sample = hidden_states.flatten(0, -2)[:1].reshape(*[1] * (hidden_states.dim() - 1), -1)
                usual = forward(sample, *args, **kwargs)
            if self.rule.scoring is Scoring.SIGMOID:
                interception = Interception(_SIGMOIDS, self.router, self.scores)
            else:
                interception = Interception(LINEAR, self.router, self.logits)
            with interception:
                output = forward(hidden_states, *args, **kwargs)
            interception.check()
            return tuple(value.to(known.dtype) for value, known in zip(output, usual, strict=True))

        return changed


class _Steering(_Change):
    """Experts raised above and lowered below all others of their router."""

    def __init__(self, router: Router, rule: Family, steered_E: Tensor, margin: float) -> None:
        super().__init__(router, rule)
        self.steered_E, self.margin = steered_E[: router.num_experts], margin

    def logits(self, logits_TE: Tensor) -> Tensor:
        """On log r, which softmax cannot tell from the logits."""
        return self._steered(logits_TE.float().log_softmax(-1))

    def scores(self, scores_TE: Tensor) -> Tensor:
        """On the scores' logarithms: log r but for a number of the token's own."""
        logs_TE = scores_TE.float().clamp_min(torch.finfo(torch.float32).tiny).log()
        return self._steered(logs_TE).exp().to(scores_TE.dtype)

    def _steered(self, logs_TE: Tensor) -> Tensor:
        steered_E = self.steered_E.to(logs_TE.device)
        highest_T1, lowest_T1 = logs_TE.amax(-1, keepdim=True), logs_TE.amin(-1, keepdim=True)
        raised_TE = torch.where(steered_E > 0, highest_T1 + self.margin, logs_TE)
        return torch.where(steered_E < 0, lowest_T1 - self.margin, raised_TE)


class _Replacement(_Change):
    """What replaces one router's rows."""

    def __init__(self, router: Router, rule: Family, rows_RE: Tensor, positions_BP: Tensor) -> None:
        super().__init__(router, rule)
        self.rows_RE, self.positions_BP = rows_RE[:, : router.num_experts], positions_BP

    def logits(self, logits_TE: Tensor) -> Tensor:
        """Softmax families: the logits with `log r` in the replaced rows."""
        flat_TE = logits_TE.float()
        index_R, rows_RE = self._rows(flat_TE)
        # log 0 is a large negative number instead of minus infinity, whose gradient would be NaN.
        log_RE = rows_RE.clamp(min=torch.finfo(torch.float32).tiny).log()
        own_R1 = flat_TE.index_select(0, index_R).detach().logsumexp(dim=-1, keepdim=True)
        return flat_TE.index_copy(0, index_R, log_RE + own_R1)

    def scores(self, scores_TE: Tensor) -> Tensor:
        """Sigmoid families: the scores with `r x (own sum)` in the replaced rows."""
        index_R, rows_RE = self._rows(scores_TE)
        own_R1 = scores_TE.index_select(0, index_R).detach().sum(dim=-1, keepdim=True)
        return scores_TE.index_copy(0, index_R, (rows_RE * own_R1).to(scores_TE.dtype))

    def _rows(self, flat_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Flat token index and r of every position that is replaced."""
        positions_BP = seen_positions(self.router.layer, self.positions_BP.to(flat_TE.device))
        batch = positions_BP.shape[0]
        assert flat_TE.shape[0] % batch == 0, f"{flat_TE.shape[0]} tokens are not a whole batch of {batch} rows"
        starts_B1 = torch.arange(batch, device=flat_TE.device)[:, None] * (flat_TE.shape[0] // batch)
        present_R = (positions_BP >= 0).reshape(-1)
        index_R = (starts_B1 + positions_BP).reshape(-1)[present_R]
        return index_R, self.rows_RE.to(flat_TE.device)[present_R]


class Interception(TorchFunctionMode):
    """Changes the result of the one call inside a router's forward that is wanted; all else passes untouched."""

    def __init__(self, functions: Sequence[Any], router: Router, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.functions, self.router, self.change = functions, router, change
        self.done = False

    def check(self) -> None:
        """Raise ModelError where the call did not come."""
        if not self.done:
            raise ModelError(f"the router {self.router.name} does not compute as a router of its family should")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.done or not isinstance(result, Tensor):
            return result
        if func not in self.functions or result.dim() != 2 or result.shape[-1] != self.router.num_experts:
            return result
        self.done = True
        return self.change(result)
