"""The file of a verdict: arms that differ in what pulls the routers, each with the settings that its own grid may choose from.

name: verdict
base: olmoe.yaml                    # as in a space file, with `set`
arms:
  lambda = 0: {set: {finetune.regularizer.kind: none}}
  RoMA: {}
  random successes: {set: {neighbors.method: random}}
  its own routing:                  # an arm may have a grid of its own beside the common one
    set: {neighbors.method: self}
    grid: {finetune.regularizer.weight: [1, 10]}
grid:                               # every arm's; a setting that is idle in an arm is left out of its grid
  finetune.learning_rate: [1e-4, 1e-3]
  finetune.regularizer.gradient_ratio: [0.3, 1]
judged: RoMA                        # compared with every other arm
seeds: [0, 1, 2]                    # settings are chosen with the first one
margin: 1.0                         # points of accuracy within which two arms count as equal
margin_nats: 0.05                   # the same of log-likelihoods
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from roma_ray.ablations.forms import read_form
from roma_ray.ablations.space import MOST_TRIALS, Space, Trial, changed, identifying, make_space, setting
from roma_ray.ablations.space_file import SpaceFile, grid_tag
from roma_ray.config.loading import parse_config
from roma_ray.config.schema import Config
from roma_ray.config.section import Name, Section
from roma_ray.engine.identity import aged, idle_settings
from roma_ray.errors import ConfigError
from roma_ray.store.artifacts import fingerprint

BASE = "base model"
"""What tables call the model before any training; no arm may be named so."""
Grid = dict[str, tuple[Any, ...]]


class ArmSettings(Section):
    """One way of training."""

    set: dict[str, Any] = Field(default_factory=dict)
    grid: Grid = Field(default_factory=dict)


class ArmsFile(Section):
    """The file's settings; the module's text shows them together."""

    name: Name = Field(default="verdict", min_length=1, max_length=180)
    base: str | dict[str, Any] = "assets:demo.yaml"
    set: dict[str, Any] = Field(default_factory=dict)
    arms: dict[Name, ArmSettings] = Field(min_length=2)
    grid: Grid = Field(default_factory=dict)
    judged: Name = "RoMA"
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    margin: float = Field(default=1.0, gt=0, lt=100)
    margin_nats: float = Field(default=0.05, gt=0)
    max_concurrent: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> ArmsFile:
        if self.judged not in self.arms:
            raise ValueError(f"`judged` is none of the arms: {', '.join(self.arms)}")
        if BASE in self.arms:
            raise ValueError(f"`arms`: another name than `{BASE}`, please: tables call the untrained model so")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("`seeds` names a seed twice")
        grids = [self.grid, *(arm.grid for arm in self.arms.values())]
        if any(not values for grid in grids for values in grid.values()):
            raise ValueError("a setting of `grid` has no values")
        if any("seed" in keys for keys in (*grids, *(arm.set for arm in self.arms.values()))):
            raise ValueError("`seed` is varied by `seeds: [0, 1, 2]`, not by an arm or a grid")
        for name, arm in self.arms.items():
            if both := arm.set.keys() & arm.grid.keys():
                raise ValueError(f"`arms`: {name} has {min(both)} in `set` and in `grid`")
        # Each is read before the trials are: a product that nobody can run must not be walked through first.
        if sum(math.prod(map(len, arm.grid.values())) for arm in self.arms.values()) > MOST_TRIALS:
            raise ValueError(f"`arms`: their grids have more than {MOST_TRIALS} settings")
        return self


@dataclass(frozen=True)
class Arms:
    """A checked file: the space of every arm's grid with the first seed."""

    file: ArmsFile
    source: Path
    overrides: tuple[str, ...]
    storage: str | None
    grids: Mapping[str, Grid]
    """Every arm's settings: fixed ones with one value."""
    space: Space

    def trials_of(self, arm: str) -> list[Trial]:
        """The arm's trials in the grid's space, in the grid's order."""
        tag = grid_tag(self.space.file, list(self.grids).index(arm))
        return [trial for trial in self.space.trials if tag in dict(trial.factors)]

    def chosen_space(self, chosen: Mapping[str, Trial]) -> tuple[Space, Mapping[str, str]]:
        """The space of each arm at its chosen trial's settings with all seeds, the judged arm its centre where it has one; and the tag
        of each arm's trials there.
        """
        # Every key that the centre changes is set in every arm, so that each is its chosen trial to the last idle setting.
        judged = self.grids[self.file.judged] if self.file.judged in chosen else {}
        settings = {
            arm: {key: (setting(trial.config, key),) for key in {**self.grids[arm], **judged}}
            for arm, trial in chosen.items()
        }
        centre = {key: setting(chosen[self.file.judged].config, key) for key in judged}
        grid = tuple(settings.values())
        file = _file(self.file, "chosen settings", {**self.file.set, **centre}, grid, self.file.seeds)
        return make_space(file, self.source, self.overrides, self.storage), {
            arm: grid_tag(file, number) for number, arm in enumerate(settings)
        }


def load_arms(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    storage: str | None = None,
    base: str | None = None,
) -> Arms:
    """Read a file (default: the embedded one) and check every trial of its grid; `base` takes the place of the file's.

    Raises ConfigError, before any work.
    """
    source = Path(path) if path is not None else Path(__file__).parents[1] / "assets" / "verdict.yaml"
    file = read_form(ArmsFile, source, base)
    centre = make_space(_file(file, "grid", file.set, (), file.seeds[:1]), source, overrides, storage).centre
    grids = {name: _grid(file, arm, centre, f"{source}: {name}") for name, arm in file.arms.items()}
    space = make_space(_file(file, "grid", file.set, tuple(grids.values()), file.seeds[:1]), source, overrides, storage)
    arms = Arms(file, source, tuple(overrides), storage, grids, space)
    _check_comparable(arms)
    # What would be refused once the grid is trained is refused now: a seed, or more trials than a sweep may have.
    arms.chosen_space({arm: arms.trials_of(arm)[0] for arm in grids})
    return arms


def _check_comparable(arms: Arms) -> None:
    """The same model is asked the same questions in every arm, and no two arms are one. Raises ConfigError."""
    asked = _asked(arms.space.centre)
    known: dict[frozenset[str], str] = {}
    for arm in arms.grids:
        trials = arms.trials_of(arm)
        if any(_asked(trial.config) != asked for trial in trials):
            raise ConfigError(
                f"{arms.source}: {arm} changes the model or the questions, so that its answers cannot be compared with the others': "
                "change `base` or `set`, for all arms alike (of `questions`, an arm may change `fraction`)"
            )
        same = known.setdefault(frozenset(map(_training, trials)), arm)
        if same != arm:
            raise ConfigError(
                f"{arms.source}: {same} and {arm} train alike: what sets them apart does nothing, so there is no difference to judge"
            )


def _asked(config: Config) -> object:
    """What is asked of whom; which part of it is trained on is left out."""
    return config.model, config.questions.model_copy(update={"fraction": 1.0})


def _training(trial: Trial) -> str:
    """Equal for trials that differ in idle settings alone."""
    settings = copy.deepcopy(aged(identifying(trial.config)))
    for key in idle_settings(trial.config):
        *sections, name = key.split(".")
        node = settings
        for section in sections:
            node = node.get(section, {})
        node.pop(name, None)
    return fingerprint(settings)


def _file(
    file: ArmsFile, part: str, changes: Mapping[str, Any], grid: Sequence[Grid], seeds: Sequence[int]
) -> SpaceFile:
    return SpaceFile(
        name=f"{file.name}: {part}",
        base=file.base,
        set=dict(changes),
        grid=tuple(grid),
        seeds=tuple(seeds),
        max_concurrent=file.max_concurrent,
    )


def _grid(file: ArmsFile, arm: ArmSettings, centre: Config, origin: str) -> Grid:
    """An arm's settings: its own, then those of the common grid that act beside them. Raises ConfigError."""
    own = {**{key: (value,) for key, value in arm.set.items()}, **arm.grid}
    common = {key: values for key, values in file.grid.items() if key not in own}
    # Idle in every combination of the arm's own settings.
    idle = [
        idle_settings(parse_config(changed(centre, dict(zip(own, values, strict=True)), origin), origin))
        for values in itertools.product(*own.values())
    ]
    return {**own, **{k: values for k, values in common.items() if not all(k in found for found in idle)}}
