"""The methods' names, in the table's order, and which of them a user means: known without loading any."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from roma_ray.errors import ConfigError

NAMES = (
    "base",
    "icl",
    "c3po",
    "c3po_kernel",
    "c3po_mode",
    "expert_steering",
    "router_tuning",
    "oracle_tuning",
    "prefix_tuning",
    "prompt_tuning",
    "dense_backprop",
    "fragile_tokens",
    "roma",
    "oracle",
    "oracle_control",
)


def chosen_methods(names: str | Sequence[str]) -> tuple[str, ...]:
    """The methods that `all` or a list of names means, in the table's order, always with the base model.

    The oracle never comes without its control. Raises ConfigError for an unknown name.
    """
    wanted = names.split(",") if isinstance(names, str) else list(names)
    wanted = [name.strip() for name in wanted if name.strip()]
    if not wanted:
        raise ConfigError(f"no methods are chosen; known: all, {', '.join(NAMES)}")
    for name in wanted:
        if name != "all" and name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"known: all, {', '.join(NAMES)}"
            raise ConfigError(f"there is no method {name!r}; {hint}")
    added = {"base", *({"oracle_control"} if "oracle" in wanted else ())}
    return tuple(name for name in NAMES if "all" in wanted or name in wanted or name in added)
