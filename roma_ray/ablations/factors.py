"""What a sweep varies, one column a factor: which setting is which in every table, and how a figure scales it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from roma_ray.ablations.naming import assigned, level_name, short_names
from roma_ray.ablations.space import CENTRE, Space, Trial, changed, setting
from roma_ray.config.schema import Config


@dataclass(frozen=True)
class VariedSetting:
    """A factor of the space file, or a setting of its grids and samples that is no factor by itself."""

    name: str
    keys: tuple[str, ...]
    """The dotted settings that it changes."""
    factor: str | None
    """Its name in `one_at_a_time`; None for a grid's or a sample's."""
    levels: tuple[tuple[str, tuple[Any, ...]], ...]
    """(name, values of the keys) of a factor's levels."""

    def values(self, config: Config) -> tuple[Any, ...]:
        """The values of its settings."""
        return _values(config, self.keys)

    def number(self, config: Config) -> float | None:
        """Its one setting, where that is a number."""
        if len(self.keys) != 1:
            return None
        (value,) = self.values(config)
        usual = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if usual else None

    def level(self, trial: Trial) -> str:
        """What a trial has of it, as a cell."""
        if not self.keys:
            return CENTRE
        named = [level for factor, level in trial.factors if factor == self.factor and level != CENTRE]
        if named:
            # Two names of one configuration, such as All and L5 of a model with five layers.
            return " = ".join(dict.fromkeys(named))
        values = self.values(trial.config)
        for level, wanted in self.levels:
            if wanted == values:
                return level
        if len(values) == 1:
            return level_name(values[0])
        return ", ".join(map(assigned, short_names(self.keys), map(level_name, values)))


def columns(space: Space) -> tuple[VariedSetting, ...]:
    """Everything that the space file varies, in its order; settings that all its trials share are left out."""
    found = []
    for name, factor in space.file.one_at_a_time.items():
        changes = list(factor.changes())
        keys = tuple(dict.fromkeys(key for _, change in changes for key in change))
        levels = tuple((level, _changed(space.centre, keys, change)) for level, change in changes)
        found.append(VariedSetting(name, keys, name, levels))
    single = {column.keys for column in found}
    others = dict.fromkeys(key for part in (*map(list, space.file.grid), list(space.file.sample)) for key in part)
    free = [key for key in others if (key,) not in single]
    names = dict(zip(free, short_names(free), strict=True))
    for key in free:
        column = VariedSetting(names[key], (key,), None, ())
        if key in space.file.sample or len({str(column.values(trial.config)) for trial in space.trials}) > 1:
            found.append(column)
    # Seeds alone: one setting, which needs a name in every table.
    return tuple(found) or (VariedSetting("setting", (), None, ()),)


def centre_text(space: Space) -> str:
    """The centre's own settings, in words."""
    # It is the first of the trials.
    centre = space.trials[0]
    return ", ".join(assigned(column.name, column.level(centre)) for column in columns(space))


def _changed(centre: Config, keys: Sequence[str], change: dict[str, Any]) -> tuple[Any, ...]:
    data = changed(centre, change, "a level")
    # Compare values as the configuration types them: 1 becomes 1.0 where the setting is a fraction.
    return _values(Config.model_validate(data), keys)


def _values(config: Config, keys: Sequence[str]) -> tuple[Any, ...]:
    return tuple(setting(config, key) for key in keys)
