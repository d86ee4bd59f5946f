"""What a sweep's trials share, where each of their stages lives, and what the whole costs; nothing is computed here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from roma_ray.ablations.factors import centre_text
from roma_ray.ablations.space import Space, Trial, possible_extractions
from roma_ray.borders.text import duration_text
from roma_ray.config.schema import Config
from roma_ray.engine.identity import answer_rule, refuse_chain, refuse_free_form
from roma_ray.engine.model_spec import ModelSpec
from roma_ray.engine.setup import Setup, resolve, resolve_path
from roma_ray.engine.steps import locate, order
from roma_ray.errors import ConfigError, ModelError, UnmeasuredError
from roma_ray.questions.counts import SourceCount, describe_sources
from roma_ray.questions.held_out import check_names
from roma_ray.stages.extraction import EXTRACT, known_extractions
from roma_ray.stages.neighborhoods import NEIGHBORS
from roma_ray.stages.paired_evaluation import EVALUATE
from roma_ray.stages.preparation import QUESTIONS, expected_sources, sources_of
from roma_ray.store.artifacts import Stage, Store
from roma_ray.store.files import exists, local_place

# A backward pass through the head costs about two forward passes.
_TRAINING_PASSES = 3


@dataclass(frozen=True)
class Planned:
    """A trial with its set-up and the place of each of its stages."""

    trial: Trial
    setup: Setup
    stages: Mapping[str, Stage]

    @classmethod
    def on(cls, trial: Trial, setup: Setup) -> Planned:
        """The trial with the places that its set-up gives."""
        return cls(trial, setup, locate(EVALUATE, setup))

    @property
    def complete(self) -> bool:
        # Of a removed stage the evaluation alone may be left: the trial is done again up to it.
        return self.stages["finetune"].complete and self.stages["evaluate"].complete

    @property
    def epochs(self) -> int:
        return self.setup.config.finetune.epochs


@dataclass(frozen=True)
class Plan:
    """A sweep that is ready to run."""

    space: Space
    device: str
    trials: tuple[Planned, ...]
    later: tuple[Setup, ...]
    """A set-up for every layer and token choice that optuna may draw."""

    @property
    def store(self) -> Store:
        return self.trials[0].setup.store

    def beside(self, config: Config) -> Setup:
        """The set-up of a trial that optuna draws: on an extraction of this plan. Raises ConfigError."""
        setup = with_config(self.later[0], config)
        near = next(other for other in self.later if _reads(other) == _reads(setup))
        return dataclasses.replace(setup, cuts=near.cuts, token_rules=near.token_rules)

    def stages(self, name: str) -> list[tuple[Planned, Stage]]:
        """The distinct stages of that name, each with the first trial that needs it."""
        found: dict[str, tuple[Planned, Stage]] = {}
        for planned in self.trials:
            stage = planned.stages[name]
            found.setdefault(stage.fingerprint, (planned, stage))
        return list(found.values())


Measure = Callable[[ModelSpec], dict[str, Any]]


def unmeasured(spec: ModelSpec) -> dict[str, Any]:
    """In place of measuring a GPU's experts backends, where nothing may be started. Raises UnmeasuredError."""
    raise UnmeasuredError("no run of this model has measured its experts implementation in this storage")


def make_plan(space: Space, device: str | None = None, measure: Measure = unmeasured) -> Plan:
    """Resolve every trial against the model, with `measure` for what a GPU has not told yet.

    Raises ModelError, ConfigError, QuestionError, StorageError.
    """
    for trial in space.trials:
        refuse_free_form(trial.config, "a sweep, a verdict or a run of several seeds")
        refuse_chain(trial.config, "a trial of a sweep, a verdict or a run of several seeds")
    check_searchable(space)
    setups, later = resolve_all(space, device, measure)
    merged: dict[str, Planned] = {}
    for trial, setup in zip(space.trials, setups, strict=True):
        planned = Planned.on(trial, setup)
        # Different words for the same run, such as All and L5 of a model with five layers.
        key = planned.stages["evaluate"].fingerprint
        if key in merged:
            kept = merged[key].trial
            factors = tuple(dict.fromkeys([*kept.factors, *trial.factors]))
            planned = dataclasses.replace(merged[key], trial=dataclasses.replace(kept, factors=factors))
        merged[key] = planned
    return Plan(space, setups[0].model.device, tuple(merged.values()), tuple(later))


def resolve_all(space: Space, device: str | None, measure: Measure) -> tuple[list[Setup], list[Setup]]:
    """Each trial's set-up, and one for all that optuna may draw; what they share is extracted once.

    Raises ConfigError (when a trial's layers or tokens do not fit the model), ModelError.
    """
    models: dict[str, Setup] = {}

    def of_model(config: Config) -> Setup:
        # All trials of one model share its facts: reading and hashing a checkpoint takes seconds.
        parts = config.model_dump_json(include={"model", "device", "threads", "storage"})
        if parts not in models:
            models[parts] = resolve(config, device=device, measure=measure)
        return with_config(models[parts], config)

    setups = []
    for trial in space.trials:
        try:
            setups.append(of_model(trial.config))
        except ConfigError as error:
            raise ConfigError(f"{trial.name}: {error}") from None
    # What optuna may still draw is extracted beforehand too.
    later = [of_model(config) for config in possible_extractions(space)]
    shared = share([*setups, *later])
    return shared[: len(setups)], shared[len(setups) :]


def with_config(near: Setup, config: Config) -> Setup:
    """The set-up of another configuration of the same model, on the same shared extraction. Raises ConfigError."""
    from roma_ray.moe.layers import check_tokens, select_layers

    check_tokens(config.routing.tokens)
    layers = select_layers(config.routing.layers, near.moe_layers)
    return dataclasses.replace(near, config=config, layers=layers)


def _reads(setup: Setup) -> tuple[int, str]:
    """What a trial reads of an extraction."""
    return setup.cut, setup.config.routing.tokens


def share(setups: Sequence[Setup]) -> list[Setup]:
    """The set-ups on as few extractions as can be: finished ones that hold what they read, and one new one for the others.

    An extraction cannot stand for one that keeps more or less: the last layer runs at the tokens that are read alone, and how
    many they are moves its last digits. So what it keeps is part of its identity, and a trial stays with the one it has.
    """
    kept = known_extractions(setups[0].store)
    questions = [QUESTIONS.at(setup, {}) for setup in setups]
    found = [_on_finished(*each, kept) for each in zip(setups, questions, strict=True)]
    missing: dict[str, set[tuple[int, str]]] = {}
    keys = [
        f"{asked.fingerprint} {setup.model_identity} {setup.model} {setup.config.extraction} "
        + answer_rule(setup.config.questions.prompt)
        for setup, asked in zip(setups, questions, strict=True)
    ]
    for key, setup, on_finished in zip(keys, setups, found, strict=True):
        if on_finished is None:
            missing.setdefault(key, set()).add(_reads(setup))
    return [
        on_finished or setup.shared(*zip(*missing[key], strict=True))
        for key, setup, on_finished in zip(keys, setups, found, strict=True)
    ]


def _on_finished(
    setup: Setup, questions: Stage, kept: Sequence[tuple[tuple[int, ...], tuple[str, ...]]]
) -> Setup | None:
    """The set-up on the finished extraction where its trial has come furthest, the oldest of equals; None without one."""
    able = [(each := setup.shared(*place), locate(EVALUATE, each, {QUESTIONS.name: questions})) for place in kept]

    def come(found: tuple[Setup, Mapping[str, Stage]]) -> tuple[bool, bool]:
        stages = found[1]
        # What is trained and judged stays so without the extraction, which is large and may be removed.
        return stages["finetune"].complete and stages["evaluate"].complete, exists(stages["finetune"].path)

    able = [found for found in able if found[1]["extract"].complete or come(found)[0]]
    return max(able, key=come)[0] if able else None


@dataclass(frozen=True)
class WorkLeft:
    """What is left to do, in forward passes of the whole model over all questions; seconds where they are known."""

    extraction: float
    trials: float
    seconds: float | None
    """Of one worker."""


Counts = Mapping[str, Sequence[SourceCount] | None]
"""What the sources give to each part, by the questions' fingerprint; None where only the run will know."""


def count_questions(plan: Plan) -> Counts:
    """Counts of all questions that trials are asked: of finished stages as they are, else as the files declare them.

    Raises QuestionError, ConfigError.
    """
    return {
        stage.fingerprint: (sources_of(stage) if stage.complete else None) or expected_sources(planned.setup)
        for planned, stage in plan.stages("questions")
    }


def check_tasks(plan: Plan, known: Counts) -> None:
    """Every trial's held-out tasks must be among those that its sources have, as far as these are known. Raises ConfigError."""
    for planned in plan.trials:
        sources = known[planned.stages["questions"].fingerprint]
        if sources:
            try:
                check_names(
                    planned.setup.config.questions.held_out_tasks, (task for one in sources for task in one.tasks)
                )
            except ConfigError as error:
                raise ConfigError(f"{planned.trial.name}: {error}") from None


def cost(plan: Plan, known: Counts) -> WorkLeft:
    """Estimate what the trials and stages that are not complete will take."""
    unfinished = [each.stages["extract"] for each in plan.trials if not each.complete]
    unfinished += [locate(EXTRACT, setup)["extract"] for setup in plan.later]
    extraction = float(len({stage.fingerprint for stage in unfinished if not stage.complete}))
    trials = sum(_passes(planned, known) for planned in plan.trials if not planned.complete)
    seconds = [stage.manifest()["seconds"] for _, stage in plan.stages("extract") if stage.complete]
    return WorkLeft(extraction, trials, (extraction + trials) * min(seconds) if seconds else None)


def _passes(planned: Planned, known: Counts) -> float:
    """One trial: training steps, a validation each epoch, and the tuned answers to the test questions, all on the head alone."""
    questions = planned.setup.config.questions
    parts = questions.splits
    held_out = {
        "validation": questions.validation_fraction if parts is None else parts.validation,
        "test": questions.test_fraction if parts is None else parts.test,
    }
    if sources := known[planned.stages["questions"].fingerprint]:
        total = sum(c.train + c.validation + c.test for c in sources)
        held_out = {name: sum(getattr(c, name) for c in sources) / total for name in held_out}
    train = (1 - sum(held_out.values())) * questions.fraction
    setup = planned.setup
    head = 1 - setup.cut / setup.num_layers
    return head * (planned.epochs * (_TRAINING_PASSES * train + held_out["validation"]) + held_out["test"])


def describe(plan: Plan) -> list[str]:
    """What the user is told before anything starts."""
    trials, space = plan.trials, plan.space
    setups = [planned.setup for planned in trials]
    done = sum(planned.complete for planned in trials)
    seeds = sorted({setup.config.seed for setup in setups})
    merged = len(space.trials) - len(trials)
    searched = f", and {space.file.samples} that optuna chooses" if space.file.search == "optuna" else ""
    known = count_questions(plan)
    check_tasks(plan, known)
    lines = [
        f"{space.file.name}: {len(trials)} trials{searched} ({done} complete), seeds {listed(seeds)}"
        + (f"; {merged} more are the same as others on this model" if merged else "")
    ]
    told = dict.fromkeys(line for sources in known.values() if sources for line in describe_sources(sources))
    return [*lines, f"centre: {centre_text(space)}", *describe_shared(plan), *told, describe_cost(plan, known)]


def describe_shared(plan: Plan) -> list[str]:
    """What the trials have in common, and how much of it is done."""
    setups = [planned.setup for planned in plan.trials]
    lines = [
        f"cuts: {listed(sorted({setup.cut for setup in setups}))} of {setups[0].num_layers} layers; token rules: "
        f"{listed(sorted({setup.config.routing.tokens for setup in setups}))}; training fractions: "
        f"{listed(sorted({setup.config.questions.fraction for setup in setups}))}"
    ]
    counts = []
    for step in order(NEIGHBORS):
        stages = [stage for _, stage in plan.stages(step.name)]
        counts.append(f"{step.name} {len(stages)} ({sum(stage.complete for stage in stages)} complete)")
    return [*lines, f"shared stages: {', '.join(counts)}"]


def describe_cost(plan: Plan, known: Counts) -> str:
    """The line about what is left to do."""
    left = cost(plan, known)
    uncounted = ["embedding", *["what optuna chooses"] * bool(plan.later)]
    uncounted += ["splits that data sets of the hub declare"] * (None in known.values())
    if not left.extraction + left.trials:
        return "cost: nothing is left to do" + (", beside what optuna chooses" if plan.later else "")
    text = (
        f"cost: about {left.extraction + left.trials:.1f} forward passes of the whole model over all questions "
        f"({left.extraction:.0f} to extract, {left.trials:.1f} for the trials' heads; not counted: {listed(uncounted)})"
    )
    if left.seconds is not None:
        return f"{text}; about {duration_text(left.seconds)} of one worker at the speed of the finished extraction"
    return text


def listed(values: Iterable[Any]) -> str:
    """Values separated by commas."""
    return ", ".join(str(value) for value in values)


def without_model(space: Space, reason: Exception) -> list[str]:
    """What can be said of a sweep whose model is not at hand: names are checked, layers too where its config.json is here.

    Raises ConfigError.
    """
    known = [_check_layers(trial) for trial in space.trials]
    configs = [trial.config for trial in space.trials]
    unchecked = (
        [] if all(known) else ["whether the model has these layers is not known either: only their names were checked"]
    )
    return [
        f"{space.file.name}: {len(configs)} trials, seeds {listed(sorted({config.seed for config in configs}))}",
        f"layers: {listed(dict.fromkeys(json.dumps(config.routing.layers).strip(chr(34)) for config in configs))}; token "
        f"rules: {listed(sorted({config.routing.tokens for config in configs}))}; training fractions: "
        f"{listed(sorted({config.questions.fraction for config in configs}))}",
        f"cuts and cost are not known without the model: {reason}",
        *unchecked,
    ]


def _check_layers(trial: Trial) -> bool:
    """Whether a local config.json says that the model has a trial's layers. Raises ConfigError."""
    from roma_ray.moe.layers import check_names, select_layers
    from roma_ray.moe.slices import model_facts

    routing, path = trial.config.routing, resolve_path(trial.config.model.path)
    try:
        check_names(routing.layers, routing.tokens)
        # Of the hub nothing more is asked: it is out of reach, or the model would be known.
        with suppress(ModelError):
            if local_place(path).is_dir():
                select_layers(routing.layers, model_facts(path)["moe_layers"])
                return True
    except ConfigError as error:
        raise ConfigError(f"{trial.name}: {error}") from None
    return False


def check_searchable(space: Space) -> None:
    """A search that goes on while trials run cannot change what is extracted beforehand. Raises ConfigError."""
    if space.file.search != "optuna":
        return
    for key, drawn in space.file.sample.items():
        section = key.partition(".")[0]
        fixed = section in {"model", "extraction", "embedding", "seed", "device", "threads"}
        split = section == "questions" and key != "questions.fraction"
        continuous = section == "routing" and drawn.choice is None
        if fixed or split or continuous:
            raise ConfigError(
                f"`sample`: {key} decides what is extracted, before any trial; vary it by `grid`, or draw it with `search: random`"
            )
