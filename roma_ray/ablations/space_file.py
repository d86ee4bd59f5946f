"""The space file: a base configuration and what is varied around it, as a checked list of trials.

    name: layers-and-neighbors
    base: configs/olmoe.yaml            # beside this file, `assets:demo.yaml`, or the settings themselves
    set: {finetune.epochs: 3}           # changes of the base; with them it is the centre
    one_at_a_time:                      # the centre with one factor changed, as in the paper's ablations
      layers: {setting: routing.layers, values: [F1, M1, L5]}
      neighbors:
        levels:                         # a level may change several settings
          random: {neighbors.method: random}
          k = 1: {neighbors.k: 1}
    grid:                               # products; several make a list
      - {finetune.learning_rate: [1e-5, 1e-4], finetune.regularizer.weight: [0.1, 1]}
    sample: {finetune.learning_rate: {log_uniform: [1e-5, 1e-2]}}
    samples: 10
    seeds: [0, 1, 2]                    # every trial with each; the split of the questions stays that of the base

Trials whose configurations are equal are one trial: so the centre is counted once, however many factors list it.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from roma_ray.ablations.naming import level_name
from roma_ray.config.section import Name, Section

# Tags of trials of a grid or a sample; trials of a factor are tagged with its name.
PRODUCT = re.compile(r"grid( \d+)?|sample")


class Factor(Section):
    """What is varied by itself: one setting's values, or named levels that may change several settings."""

    setting: str | None = None
    values: tuple[Any, ...] = ()
    levels: dict[Name, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_form(self) -> Factor:
        if bool(self.setting and self.values) == bool(self.levels):
            raise ValueError("give either `setting` and `values`, or `levels`")
        return self

    def changes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each level's name and settings."""
        yield from self.levels.items()
        for value in self.values:
            assert self.setting is not None
            yield level_name(value), {self.setting: value}


class Range(Section):
    """From what a sampled setting is drawn."""

    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    integer: tuple[int, int] | None = None
    """Both ends may be drawn."""
    choice: tuple[Any, ...] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Range:
        given = [name for name in ("uniform", "log_uniform", "integer", "choice") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of `uniform`, `log_uniform`, `integer` and `choice`")
        ends = self.uniform or self.log_uniform or self.integer
        if ends is not None and not ends[0] < ends[1]:
            raise ValueError("the first end must be below the second")
        if self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError("a logarithmic range is positive")
        if self.choice is not None and not self.choice:
            raise ValueError("`choice` needs at least one value")
        return self

    def draw(self, generator: random.Random) -> Any:
        """One value."""
        if self.uniform is not None:
            return generator.uniform(*self.uniform)
        if self.log_uniform is not None:
            return math.exp(generator.uniform(*map(math.log, self.log_uniform)))
        if self.integer is not None:
            return generator.randint(*self.integer)
        assert self.choice is not None
        return generator.choice(self.choice)

    def ends(self) -> list[Any]:
        """Values to check a setting with: all choices, or both ends of the range."""
        return list(self.choice or self.uniform or self.log_uniform or self.integer or ())


class Scheduler(Section):
    """Which trials may go on. Decided on the validation accuracy after each epoch, never on test questions."""

    kind: Literal["fifo", "asha"] = "fifo"
    """`fifo` finishes every trial; `asha` stops the worse ones early."""
    grace_epochs: int = Field(default=1, ge=1)
    """`asha`: epochs that every trial gets."""
    reduction_factor: float = Field(default=3, gt=1)
    """`asha`: the best one in this many goes on at each rung."""


class SpaceFile(Section):
    """The file's settings; the module's text shows them together."""

    name: Name = Field(default="sweep", min_length=1, max_length=200)
    """Default: the file's own."""
    base: str | dict[str, Any] = "assets:demo.yaml"
    set: dict[str, Any] = Field(default_factory=dict)
    one_at_a_time: dict[Name, Factor] = Field(default_factory=dict)
    grid: tuple[dict[str, tuple[Any, ...]], ...] = ()
    sample: dict[str, Range] = Field(default_factory=dict)
    samples: int = Field(default=0, ge=0)
    """How many trials are drawn from `sample`."""
    search: Literal["random", "optuna"] = "random"
    """How: `random` draws them beforehand by the base's seed, `optuna` one after another from the validation accuracy."""
    seeds: tuple[int, ...] = ()
    """Seeds of training and of random neighbors; default: the base's own. What is drawn from the data stays the base's."""
    scheduler: Scheduler = Scheduler()
    max_concurrent: int | None = Field(default=None, ge=1)
    """Trials at a time; default: as many as the cluster has room for."""
    paper: Literal["auto", "olmoe", "deepseek"] | None = None
    """Which of the paper's results are drawn beside this sweep's: OLMoE's (Figures 6-10), DeepSeekMoE's (Tables 3-7), or `auto`,
    those of the model of the base configuration, by its name."""

    @model_validator(mode="before")
    @classmethod
    def _one_grid_is_a_list_of_one(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("grid"), dict):
            return {**data, "grid": [data["grid"]]}
        return data

    @model_validator(mode="after")
    def _fits(self) -> SpaceFile:
        if bool(self.sample) != bool(self.samples):
            raise ValueError("`sample` (ranges) and `samples` (how many) belong together")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("`seeds` names a seed twice")
        if taken := [name for name in self.one_at_a_time if PRODUCT.fullmatch(name)]:
            raise ValueError(
                f"`one_at_a_time`: another name than `{taken[0]}`, please: tables call grids and samples so"
            )
        varied = [*self.sample, *(key for grid in self.grid for key in grid)]
        varied += [key for factor in self.one_at_a_time.values() for _, changes in factor.changes() for key in changes]
        if "seed" in varied:
            raise ValueError("`seed` is varied by `seeds: [0, 1, 2]`, not by a factor, a grid or a sample")
        if self.search == "optuna" and not self.sample:
            raise ValueError("`search: optuna` chooses within `sample`, and there is none")
        if self.search == "optuna" and len(self.seeds) > 1:
            raise ValueError("`search: optuna` takes one seed: it would choose between settings and seeds alike")
        if any(not values for grid in self.grid for values in grid.values()):
            raise ValueError("a setting of `grid` has no values")
        return self


def grid_tag(file: SpaceFile, number: int) -> str:
    """What trials of a grid are tagged with."""
    return "grid" if len(file.grid) == 1 else f"grid {number + 1}"
