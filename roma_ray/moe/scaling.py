"""Multiplying router logits in a packed pass: a gate temperature, or dropout.

Shapes: T flat tokens of the packing, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from roma_ray.moe.overriding import LINEAR, Interception
from roma_ray.moe.packing import kept_tokens
from roma_ray.moe.replacing import replaced
from roma_ray.moe.routers import Router


@contextmanager
def scaled_logits(routers: Sequence[Router], factors_TLE: Tensor) -> Iterator[None]:
    """The routers' logits are multiplied by the factors of each token inside the `with` block; L in the order of `routers`.

    All that follows sees the product: the choice of experts, their weights, and whoever reads the routing. Selection biases are no
    part of the logits. Raises ModelError if a router does not compute as its family is known to.
    """
    with ExitStack() as stack:
        for column, router in enumerate(routers):
            stack.enter_context(replaced(router.module, _scaled(router, factors_TLE[:, column, : router.num_experts])))
        yield


def _scaled(router: Router, factors_TE: Tensor) -> Callable[..., Any]:
    forward = router.module.forward

    def scaled(*args: Any, **settings: Any) -> Any:
        kept_N = kept_tokens(router.layer)
        own_NE = factors_TE if kept_N is None else factors_TE[kept_N.to(factors_TE.device)]
        with Interception(LINEAR, router, lambda logits_NE: logits_NE * own_NE.to(logits_NE)) as interception:
            output = forward(*args, **settings)
        interception.check()
        return output

    return scaled
