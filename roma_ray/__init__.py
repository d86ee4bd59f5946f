"""Routing Manifold Alignment for mixture-of-experts language models, as a Ray job system.

`roma_ray/api.py` shows how a notebook runs it; the rest are the pieces for training loops of one's own. Names are looked up
when they are first used, so that importing this costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roma_ray.api import Finished, load_config, run
    from roma_ray.config.schema import Config
    from roma_ray.engine.added_term import ManifoldTerm, manifold_trainer, train_only_routers
    from roma_ray.manifold.losses import manifold_loss, neighbor_targets
    from roma_ray.manifold.neighbors import find_neighbors, successful_set
    from roma_ray.moe.text_routing import routing_rows

__version__ = "0.1.0"

_HOMES = {
    "roma_ray.api": ("Finished", "load_config", "run"),
    "roma_ray.config.schema": ("Config",),
    "roma_ray.engine.added_term": ("ManifoldTerm", "manifold_trainer", "train_only_routers"),
    "roma_ray.manifold.losses": ("manifold_loss", "neighbor_targets"),
    "roma_ray.manifold.neighbors": ("find_neighbors", "successful_set"),
    "roma_ray.moe.text_routing": ("routing_rows",),
}

__all__ = [
    "Config",
    "Finished",
    "ManifoldTerm",
    "find_neighbors",
    "load_config",
    "manifold_loss",
    "manifold_trainer",
    "neighbor_targets",
    "routing_rows",
    "run",
    "successful_set",
    "train_only_routers",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'roma_ray' has no attribute {name!r}")
