"""Models whose layers have different numbers of experts, as pruning tools leave them: told from the files, built of stock layers.

They are declared in config.json by `num_experts_per_layer` (one number a layer; 0 or null for a dense one) or by transformers'
own `per_layer_config` with the family's name for the number. A checkpoint that declares nothing is read by its tensors: the
experts of each layer where they are stored one by one, else the rows of the gates. Either way the gates must agree.

transformers builds all layers of these families alike, so the layers that differ are built a second time, by their own class
from the same configuration with that layer's number. Routing rows of all layers are as wide as the largest: absent experts
have r = 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from roma_ray.errors import ModelError

PER_LAYER = "num_experts_per_layer"
# The families' names for the number of experts of a layer.
_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_MOST = 10_000
_LONGEST = 500
_EXPERT = re.compile(r"\blayers\.(\d+)\..*\bexperts\.(\d+)\.")
_GATE = re.compile(
    r"\blayers\.(\d+)\.(?!.*\bexperts?\.).*\b(?:gate|gate\.wg|router|router\.(?:layer|gate|proj))\.weight$"
)


def expert_counts(config: PreTrainedConfig) -> list[int] | None:
    """The number of experts of each layer where they differ, 0 for a dense one; None for a model like any other."""
    counts: list[int] | None = getattr(config, PER_LAYER, None)
    return counts


def widest(config: PreTrainedConfig) -> int:
    """The experts of the whole model's largest layer."""
    return int(getattr(config, _names(config)[0]))


def declare(config: PreTrainedConfig, where: str, gates: GateRows) -> None:
    """Let a model's configuration say by `num_experts_per_layer` which layers differ, however it or its files do; in place.

    Raises ModelError for numbers that are none.
    """
    stated = _stated(config)
    counts = gates() if stated is None else [0 if n is None else n for n in stated]
    if counts is None:
        return
    total = config.num_hidden_layers
    if len(counts) != total or not all(type(n) is int and 0 <= n <= _MOST for n in counts) or not any(counts):
        raise ModelError(f"{where}: {PER_LAYER} is not one number of experts for each of {total} layers")
    if not _names(config):
        raise ModelError(
            f"{where}: layers of a {config.model_type!r} model cannot have different numbers of experts here"
        )
    groups = getattr(config, "n_group", None) or 1
    if any(n % groups for n in counts):
        raise ModelError(
            f"{where}: its routers choose among {groups} groups of equal size, and {PER_LAYER} has numbers that {groups} does not "
            "divide"
        )
    for name in _names(config):
        setattr(config, name, max(counts))
    if len({n for n in counts if n}) > 1:
        setattr(config, PER_LAYER, counts)
    elif hasattr(config, PER_LAYER):
        delattr(config, PER_LAYER)


def _stated(config: PreTrainedConfig) -> Sequence[Any] | None:
    """The numbers that a configuration declares, by either form."""
    listed = getattr(config, PER_LAYER, None)
    if listed is not None:
        return listed if isinstance(listed, list) else [listed]
    if not config.is_heterogeneous:
        return None
    own: dict[int, dict[str, Any]] = config._heterogeneity_spec.per_layer_overrides
    names = {name for name in _NAMES for layer in own.values() if name in layer}
    if not names:
        return None
    (name, *others) = sorted(names)
    usual = config._getattr_without_heterogeneous_validation(name, None)
    counts = [own.get(layer, {}).get(name, usual) for layer in range(config.num_hidden_layers)]
    left = {layer: {k: v for k, v in values.items() if k not in names} for layer, values in own.items()}
    config.per_layer_config = {layer: values for layer, values in left.items() if values} or None
    return [None] if others else counts


class GateRows:
    """The experts of each layer by a checkpoint's tensors, for a configuration that declares nothing."""

    def __init__(self, keys: Sequence[str], config: PreTrainedConfig, shapes: Any) -> None:
        # No tensor has a longer name; what is searched for in one would take its length squared.
        self.keys = [key for key in keys if len(key) <= _LONGEST]
        self.config, self.shapes = config, shapes

    def __call__(self) -> list[int] | None:
        """None where all layers have one number, or where nothing can be known before the files are here.

        `shapes` gives the stored shapes of some keys, or None where their files would have to be downloaded for it.
        """
        total, names = self.config.num_hidden_layers, _names(self.config)
        experts: dict[int, set[str]] = {}
        for key in self.keys:
            if (match := _EXPERT.search(key)) is not None and int(match[1]) < total:
                experts.setdefault(int(match[1]), set()).add(match[2])
        stored = {len(found) for found in experts.values()}
        if not names or len(stored) == 1:
            return None
        gates = {key: int(match[1]) for key in self.keys if (match := _GATE.search(key)) is not None}
        shapes: Mapping[str, tuple[int, ...]] | None = self.shapes(list(gates), bool(experts))
        if shapes is None:
            return None
        rows = {
            layer: shapes[key][0]
            for key, layer in gates.items()
            if layer < total and len(shapes[key]) == 2 and shapes[key][1] == self.config.hidden_size
        }
        # Where one expert too few is stored the gate still has its row: the file is damaged, and is refused as such.
        if len(set(rows.values())) < 2:
            return None
        return [rows.get(layer, 0) for layer in range(total)]


def _names(config: PreTrainedConfig) -> list[str]:
    return [name for name in _NAMES if isinstance(getattr(config, name, None), int)]


@lru_cache(maxsize=64)
def uneven_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A model class that builds each layer with its own number of experts, by `num_experts_per_layer` of its configuration."""

    def build(self: PreTrainedModel, config: PreTrainedConfig, *others: Any, **settings: Any) -> None:
        super(uneven, self).__init__(config, *others, **settings)
        layers = self.base_model.layers
        for n, count in enumerate(expert_counts(config) or ()):
            if count not in (0, widest(config)):
                with _counting(config, count):
                    layers[n] = type(layers[n])(config, n)

    # transformers knows how a class's files are named by its name.
    uneven: type[PreTrainedModel] = type(
        model_class.__name__, (model_class,), {"__init__": build, "__module__": model_class.__module__}
    )
    return uneven


@contextmanager
def _counting(config: PreTrainedConfig, count: int) -> Iterator[None]:
    """A configuration with another number of experts: its modules keep it, so it may be no copy."""
    usual = {name: getattr(config, name) for name in _names(config)}
    try:
        for name in usual:
            setattr(config, name, count)
        yield
    finally:
        for name, value in usual.items():
            setattr(config, name, value)
