"""The trials of a space file (`space_file.py`): its base with what is varied, checked, each with a name and an identity."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from roma_ray.ablations import paper
from roma_ray.ablations.forms import read_form
from roma_ray.ablations.naming import assigned, level_name, short_names
from roma_ray.ablations.space_file import PRODUCT, Factor, SpaceFile, grid_tag
from roma_ray.config.loading import (
    load_config,
    meant,
    overridden,
    parse_config,
)
from roma_ray.config.schema import Config
from roma_ray.engine.identity import aged
from roma_ray.errors import ConfigError
from roma_ray.store.artifacts import fingerprint

MOST_TRIALS = 2000
CENTRE = "centre"
# Settings that decide where a run lives and is shown, not what comes out.
_OUTSIDE = ("name", "storage", "reuse", "tracking", "ray")
Values = Mapping[str, Any]


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
    data = changed(base, file.set, str(source))
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


def _trial(
    base: Config, changes: Values, factors: tuple[tuple[str, str], ...], centre: Config, origin: str = "the space"
) -> Trial:
    config = parse_config(changed(base, changes, origin), origin)
    mine, theirs = identifying(config), dict(_flat(identifying(centre)))
    differing = {key: value for key, value in _flat(mine) if theirs.get(key, _ABSENT) != value}
    seedless = {key: value for key, value in mine.items() if key != "seed"}
    others = {key: value for key, value in differing.items() if key != "seed"}
    name = (
        ", ".join(level if PRODUCT.fullmatch(f) else assigned(f, level) for f, level in factors) if others else CENTRE
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


def changed(config: Config, changes: Values, origin: str) -> dict[str, Any]:
    """A configuration's plain data with dotted settings changed. Raises ConfigError."""
    data = config.model_dump(mode="json")
    for key, value in changes.items():
        put(data, key, value, origin)
    return data


def setting(config: Config, key: str) -> Any:
    """A dotted setting of a configuration, as plain data."""
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    return value


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
