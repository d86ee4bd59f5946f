"""All methods by name, in the order of the table."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from roma_ray.baselines.base import Base
from roma_ray.baselines.c3po import C3po, C3poKernel, C3poMode
from roma_ray.baselines.contract import Method
from roma_ray.baselines.dense_backprop import DenseBackprop
from roma_ray.baselines.icl import InContext
from roma_ray.baselines.oracle import Oracle, OracleControl
from roma_ray.baselines.oracle_tuning import OracleTuning
from roma_ray.baselines.router_tuning import Roma, RouterTuning
from roma_ray.baselines.soft_prompts import PrefixTuning, PromptTuning
from roma_ray.errors import ConfigError

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Base(),
        InContext(),
        C3po(),
        C3poKernel(),
        C3poMode(),
        RouterTuning(),
        OracleTuning(),
        PrefixTuning(),
        PromptTuning(),
        DenseBackprop(),
        Roma(),
        Oracle(),
        OracleControl(),
    )
}


def chosen_methods(names: str | Sequence[str]) -> tuple[str, ...]:
    """The methods that `all` or a list of names means, in the table's order, always with the base model.

    The oracle never comes without its control. Raises ConfigError for an unknown name.
    """
    wanted = names.split(",") if isinstance(names, str) else list(names)
    wanted = [name.strip() for name in wanted if name.strip()]
    if not wanted:
        raise ConfigError(f"no methods are chosen; known: all, {', '.join(METHODS)}")
    for name in wanted:
        if name != "all" and name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"known: all, {', '.join(METHODS)}"
            raise ConfigError(f"there is no method {name!r}; {hint}")
    added = {"base", *({"oracle_control"} if "oracle" in wanted else ())}
    return tuple(name for name in METHODS if "all" in wanted or name in wanted or name in added)
