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

import copy
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from roma_ray.ablations import paper
from roma_ray.ablations.forms import read_form
from roma_ray.ablations.naming import assigned, level_name, short_names
from roma_ray.config.loading import (
    load_config,
    meant,
    overridden,
    parse_config,
)
from roma_ray.config.schema import Config, Section
from roma_ray.config.section import Name
from roma_ray.engine.identity import aged
from roma_ray.errors import ConfigError
from roma_ray.store.artifacts import fingerprint

MOST_TRIALS = 2000
CENTRE = "centre"
# Settings that decide where a run lives and is shown, not what comes out.
_OUTSIDE = ("name", "storage", "reuse", "tracking", "ray")
# Tags of trials of a grid or a sample; trials of a factor are tagged with its name.
_PRODUCT = re.compile(r"grid( \d+)?|sample")
Values = Mapping[str, Any]


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
        if taken := [name for name in self.one_at_a_time if _PRODUCT.fullmatch(name)]:
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


@dataclass(frozen=True)
class Trial:
    """One configuration to be run."""

    id: str
    """Fingerprint of the configuration."""
    name: str
    config: Config
    factors: tuple[tuple[str, str], ...]
    """(factor, level) for each factor whose figure shows it; `centre` for a factor that does not list the centre."""
    settings: Mapping[str, Any]
    """What differs from the centre, by dotted setting."""
    group: str
    """Equal for trials that differ by their seed alone."""
    centre: bool = False

    @property
    def seed(self) -> int:
        return self.config.seed


@dataclass(frozen=True)
class Space:
    """A checked space file."""

    file: SpaceFile
    centre: Config
    trials: tuple[Trial, ...]
    """Every trial that is known beforehand, the centre first; a search by optuna adds its own."""

    @property
    def identity(self) -> str:
        """What makes two sweeps the same: their trials and how they are searched."""
        search = self.file.model_dump(mode="json", include={"sample", "samples", "search", "scheduler"})
        members = sorted([trial.id, sorted(trial.factors)] for trial in self.trials)
        return fingerprint({"name": self.file.name, "trials": members, "search": search})

    @property
    def paper(self) -> str | None:
        """The model of the paper whose results stand beside this sweep's; None for none."""
        return paper.model_of(self.centre.model.path) if self.file.paper == "auto" else self.file.paper

    def sampled(self, values: Values) -> Trial:
        """The trial of drawn values. Raises ConfigError."""
        seed = self.file.seeds[0] if self.file.seeds else self.centre.seed
        return _trial(self.centre, {**values, "seed": seed}, (("sample", _joined(values)),), self.centre)


def load_space(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    storage: str | None = None,
    base: str | None = None,
) -> Space:
    """Read a space file (default: the embedded one) and check every trial of it; `base` takes the place of the file's.

    Raises ConfigError, before any work.
    """
    source = Path(path) if path is not None else Path(__file__).parents[1] / "assets" / "ablations-demo.yaml"
    return make_space(read_form(SpaceFile, source, base), source, overrides, storage)


def seeds_space(config: Config, count: int) -> Space:
    """One configuration with `count` seeds, its own and those after it; the task loss alone beside it where that is asked for.

    Raises ConfigError.
    """
    levels = {"task loss alone": {"finetune.regularizer.kind": "none"}}
    term = config.finetune.regularizer
    beside = config.evaluation.task_loss_alone and term.kind != "none" and term.weight != 0
    file = SpaceFile(
        name=f"{config.name}, {count} seeds",
        base=config.model_dump(mode="json"),
        one_at_a_time={"trained by": Factor(levels=levels)} if beside else {},
        seeds=tuple(range(config.seed, config.seed + count)),
    )
    return make_space(file, Path())


def make_space(file: SpaceFile, source: Path, overrides: Sequence[str] = (), storage: str | None = None) -> Space:
    """The space of a file's settings, every trial checked; `source` is where its base lies beside. Raises ConfigError."""
    centre = _centre(file, source, overrides, storage)
    if _size(file) > MOST_TRIALS:
        raise ConfigError(f"{source}: more than {MOST_TRIALS} trials; a smaller grid, or `sample`, says as much")
    found: dict[str, Trial] = {}
    for trial in _listed(file, centre, str(source)):
        same = found.get(trial.id)
        factors = tuple(dict.fromkeys([*(same.factors if same else ()), *trial.factors]))
        found[trial.id] = replace(same or trial, factors=factors)
    _check_ranges(file, centre, str(source))
    return Space(file, centre, tuple(_with_centre(file, list(found.values()))))


def _centre(file: SpaceFile, source: Path, overrides: Sequence[str], storage: str | None) -> Config:
    """The configuration around which everything varies."""
    if isinstance(file.base, dict):
        base = parse_config(file.base, f"{source}: base")
    elif file.base.startswith("assets:"):
        base = load_config(Path(__file__).parents[1] / "assets" / file.base.removeprefix("assets:"))
    else:
        base = load_config(source.parent / file.base)
    data = base.model_dump(mode="json")
    for key, value in file.set.items():
        put(data, key, value, str(source))
    config = parse_config(overridden(data, overrides), str(source))
    # A trial's seed must not split the questions anew: trials are compared on the same ones.
    seed = config.questions.seed if config.questions.seed is not None else config.seed
    changes: dict[str, Any] = {"name": file.name, "questions": config.questions.model_copy(update={"seed": seed})}
    if storage is not None:
        changes["storage"] = storage
    return config.model_copy(update=changes)


def _size(file: SpaceFile) -> int:
    """How many trials the file names, repeats counted."""
    levels = sum(len(factor.values) + len(factor.levels) for factor in file.one_at_a_time.values())
    products = sum(math.prod(len(values) for values in grid.values()) for grid in file.grid)
    return (1 + levels + products + file.samples) * max(1, len(file.seeds))


def _listed(file: SpaceFile, centre: Config, origin: str) -> Iterator[Trial]:
    """Every trial that the file names, the centre first, with repeats."""
    seeds = file.seeds or (centre.seed,)
    generator = random.Random(centre.seed)
    drawn = [{key: r.draw(generator) for key, r in file.sample.items()} for _ in range(file.samples)]
    for seed in seeds:
        yield _trial(centre, {"seed": seed}, (), centre, origin)
        for factor, what in file.one_at_a_time.items():
            for level, changes in what.changes():
                yield _trial(
                    centre, {**changes, "seed": seed}, ((factor, level),), centre, f"{origin}: {factor}, {level}"
                )
        for number, grid in enumerate(file.grid):
            for values in itertools.product(*grid.values()):
                changes = dict(zip(grid, values, strict=True))
                tag = grid_tag(file, number)
                yield _trial(centre, {**changes, "seed": seed}, ((tag, _joined(changes)),), centre, f"{origin}: {tag}")
        for sample in drawn if file.search == "random" else []:
            yield _trial(centre, {**sample, "seed": seed}, (("sample", _joined(sample)),), centre, f"{origin}: sample")


def grid_tag(file: SpaceFile, number: int) -> str:
    """What trials of a grid are tagged with."""
    return "grid" if len(file.grid) == 1 else f"grid {number + 1}"


def _trial(
    base: Config, changes: Values, factors: tuple[tuple[str, str], ...], centre: Config, origin: str = "the space"
) -> Trial:
    data = base.model_dump(mode="json")
    for key, value in changes.items():
        put(data, key, value, origin)
    config = parse_config(data, origin)
    mine, theirs = identifying(config), dict(_flat(identifying(centre)))
    differing = {key: value for key, value in _flat(mine) if theirs.get(key, _ABSENT) != value}
    seedless = {key: value for key, value in mine.items() if key != "seed"}
    others = {key: value for key, value in differing.items() if key != "seed"}
    name = (
        ", ".join(level if _PRODUCT.fullmatch(f) else assigned(f, level) for f, level in factors) if others else CENTRE
    )
    if config.seed != centre.seed:
        name += f", seed {config.seed}"
    identity, group = fingerprint(aged(mine)), fingerprint(aged(seedless))
    return Trial(identity, name, config, factors, differing, group=group, centre=not others)


def _with_centre(file: SpaceFile, trials: list[Trial]) -> Iterator[Trial]:
    """The trials, the centre tagged for every factor that varies around it."""
    for trial in trials:
        missing = [f for f in file.one_at_a_time if f not in dict(trial.factors)] if trial.centre else []
        yield replace(trial, factors=(*trial.factors, *((factor, CENTRE) for factor in missing)))


def _check_ranges(file: SpaceFile, centre: Config, origin: str) -> None:
    """Every end of every range must be a valid setting."""
    for key, drawn in file.sample.items():
        for value in drawn.ends():
            _trial(centre, {key: value}, (), centre, f"{origin}: sample")


def possible_extractions(space: Space) -> Iterator[Config]:
    """Configurations with every layer and token choice that optuna may draw: what is extracted must be known beforehand."""
    choices = {key: r.choice for key, r in space.file.sample.items() if key.startswith("routing.") and r.choice}
    if space.file.search == "optuna":
        for values in itertools.product(*choices.values()):
            yield space.sampled(dict(zip(choices, values, strict=True))).config


def put(data: dict[str, Any], key: str, value: Any, origin: str) -> None:
    """Set `a.b` in nested settings. Raises ConfigError for one that is none, or that no trial can vary."""
    parts = key.split(".")
    if parts[0] in _OUTSIDE:
        raise ConfigError(f"{origin}: `{key}` changes no result; give it in the base configuration or with --set")
    node: Any = data
    for part in parts[:-1]:
        if not isinstance(node, dict) or not isinstance(node.get(part), dict):
            known = ", ".join(node) if isinstance(node, dict) else "none"
            raise ConfigError(f"{origin}: `{key}`: there is no section `{part}`; known: {known}")
        node = node[part]
    if not isinstance(node, dict) or parts[-1] not in node:
        raise ConfigError(f"{origin}: unknown setting `{key}`; {meant(parts)}")
    node[parts[-1]] = copy.deepcopy(value)


def identifying(config: Config) -> dict[str, Any]:
    """The settings that decide a result, as plain data."""
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in _OUTSIDE}


_ABSENT = object()


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _joined(changes: Values) -> str:
    """Several settings as one level."""
    return ", ".join(map(assigned, short_names(list(changes)), map(level_name, changes.values())))
