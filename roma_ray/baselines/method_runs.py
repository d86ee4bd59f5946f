"""Running methods: a stage a method and seed, resumable trial by trial, one method's failure never another's.

A method that trains is fitted once for each learning rate of the grid; the rate whose validation accuracy is highest (of
equals the smallest) answers the test questions. Further seeds use the rate that the first chose.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from roma_ray.baselines.bench import Bench, QuestionCost, open_bench
from roma_ray.baselines.contract import Fitted, Method
from roma_ray.baselines.method_costs import counted, trunk_cost
from roma_ray.baselines.method_parts import PARTS, all_parts, do_part, missing_parts, plan_parts, read_parts
from roma_ray.baselines.method_parts import given as as_given
from roma_ray.baselines.method_registry import METHODS
from roma_ray.engine.answers import ANSWERS, write_answers
from roma_ray.engine.model_spec import set_threads
from roma_ray.engine.progress import Progress, Silence
from roma_ray.engine.runners import LOCAL, Runners
from roma_ray.engine.setup import Setup
from roma_ray.engine.steps import Step, complete, order
from roma_ray.engine.work import Executor, Job, Report
from roma_ray.errors import ArtifactError
from roma_ray.stages.embedding import EMBED
from roma_ray.stages.extraction import EXTRACT
from roma_ray.stages.neighborhoods import NEIGHBORS
from roma_ray.store.artifacts import Stage, fingerprint, write_json
from roma_ray.store.files import exists, read_json, remove, remove_folder
from roma_ray.store.tensors import DAMAGED, read_tensors, write_tensors

VERSION = 2
STAGE = "baselines"
FAILURE = "failure.json"
_PREPARED = "prepared.safetensors"


def method_step(name: str, seed: int, bench: Bench | None = None) -> Step:
    """One method with one seed; with an open `bench` it can be run."""
    return Step(
        STAGE,
        VERSION,
        (EXTRACT, EMBED, NEIGHBORS),
        partial(_settings, name, seed),
        partial(_answer, METHODS[name], seed, bench),
        others=partial(_first, name, seed),
        reads_states=True,
    )


def method_stage(setup: Setup, stages: Mapping[str, Stage], name: str, seed: int) -> Stage:
    """Where one method's answers with one seed live."""
    return method_step(name, seed).at(setup, stages)


def _settings(name: str, seed: int, setup: Setup) -> dict[str, Any]:
    method = METHODS[name]
    return {
        **setup.numeric_identity(),
        "method": name,
        "layers": list(setup.layers),
        "tokens": setup.config.routing.tokens,
        "batch_tokens": setup.config.extraction.batch_tokens,
        "seed": seed if method.seeded else None,
        **method.configure(setup.config),
    }


def _first(name: str, seed: int, setup: Setup, stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """The first seed's stage, whose choice the learning rate of a further one is."""
    first = setup.config.seed
    return {"first": method_stage(setup, stages, name, first)} if METHODS[name].trains and seed != first else {}


def seeds_of(setup: Setup, name: str, count: int) -> list[int]:
    """The seeds that a method runs with; one where its result depends on none."""
    first = setup.config.seed
    return list(range(first, first + (count if METHODS[name].seeded else 1)))


@dataclass(frozen=True, eq=False)
class MethodsWork:
    """The methods as planned batches: batch n is method n with all its seeds."""

    setup: Setup
    stages: dict[str, Stage]
    methods: tuple[str, ...]
    seeds: int
    name: str = STAGE

    @property
    def folder(self) -> str:
        return str(self.setup.store.root / STAGE)

    @property
    def identity(self) -> str:
        """What makes two of these the same work."""
        stages = [method_stage(self.setup, self.stages, name, self.setup.config.seed) for name in self.methods]
        kind = type(self).__name__
        return fingerprint({"kind": kind, "stages": [str(stage.path) for stage in stages], "seeds": self.seeds})

    def open(self) -> Callable[[int], Report]:
        """Open the bench; returns the function that runs one method."""
        return partial(self.run, self.bench())

    def bench(self) -> Bench:
        """What the methods work on, in this process."""
        set_threads(self.setup.model.threads)
        return open_bench(self.setup, self.stages)

    def next_stage(self, batch: int) -> Stage:
        """The first stage of a method that is not complete, or its last."""
        seeds = seeds_of(self.setup, self.methods[batch], self.seeds)
        stages = [method_stage(self.setup, self.stages, self.methods[batch], seed) for seed in seeds]
        return next((stage for stage in stages if not stage.complete), stages[-1])

    def ahead(self, batch: int) -> list[Stage]:
        """The stages of a method, one a seed, whose questions others may work on before it is run."""
        name = self.methods[batch]
        if METHODS[name].works_on is None:
            return []
        return [method_stage(self.setup, self.stages, name, seed) for seed in seeds_of(self.setup, name, self.seeds)]

    def plan(self, bench: Bench, batch: int, number: int) -> Report:
        """Plan the parts of a method with its nth seed, unless they were done, or it is to be refused; `rows`: how many parts are left."""
        method, stage = METHODS[self.methods[batch]], self.ahead(batch)[number]

        def do() -> int:
            if stage.reusable or exists(stage.path / _PREPARED):
                return 0
            with stage.exclusive():
                remove(stage.path / FAILURE)
                method.check(as_given(bench, method))
                return len(missing_parts(stage, len(plan_parts(stage, method, bench))))

        return self._attempt(bench, batch, stage, do)

    def part(self, bench: Bench, batch: int, number: int, part: int) -> Report:
        """Work on a part of a method's questions with its nth seed."""
        method, stage = METHODS[self.methods[batch]], self.ahead(batch)[number]
        seed = seeds_of(self.setup, self.methods[batch], self.seeds)[number]

        def do() -> int:
            stage.note_makers()
            do_part(stage, method, bench, seed, part)
            return len(read_parts(stage)[part])

        return self._attempt(bench, batch, stage, do)

    def _attempt(self, bench: Bench, batch: int, stage: Stage, do: Callable[[], int]) -> Report:
        """A report of what `do` does, which returns its rows; a failure is written down and named by the driver."""
        started = time.monotonic()
        try:
            return Report(batch, do(), 0, 0, time.monotonic() - started)
        # Whatever one method's fault is, the others' rows are kept; it is named, and the command ends with 1.
        except Exception as error:  # noqa: BLE001 - the border between methods
            bench.drop_models()
            note_failure(stage, error)
            return Report(batch, 0, 0, 1, time.monotonic() - started)

    def run(self, bench: Bench, batch: int) -> Report:
        """Run one method with all its seeds; a failure is written down and named by the driver."""
        started, name = time.monotonic(), self.methods[batch]
        for seed in seeds_of(self.setup, name, self.seeds):
            stage = method_stage(self.setup, self.stages, name, seed)
            report = self._attempt(bench, batch, stage, partial(_answered, bench, name, seed))
            if report.errors:
                break
        return replace(report, seconds=time.monotonic() - started)


def note_failure(stage: Stage, error: BaseException) -> None:
    """Keep what went wrong in the stage's folder. Raises StorageError."""
    text = "".join(traceback.format_exception(error))
    write_json(stage.path / FAILURE, {"kind": type(error).__name__, "text": str(error), "traceback": text})


def read_failure(stage: Stage) -> dict[str, str] | None:
    """What went wrong in the last attempt at an incomplete stage."""
    path = stage.path / FAILURE
    if stage.complete or not exists(path):
        return None
    found: dict[str, str] = read_json(path)
    return found


def _answered(bench: Bench, name: str, seed: int) -> int:
    """How many questions a method has answered, now or before."""
    run_method(bench, name, seed)
    return len(bench.rows["test"])


def run_method(bench: Bench, name: str, seed: int) -> Stage:
    """Fit one method with one seed and let it answer the test questions. Raises RomaError."""
    step = method_step(name, seed, bench)
    return complete(step, step.job(bench.setup, bench.stages), LOCAL, Silence())


def _answer(
    method: Method, seed: int, bench: Bench | None, job: Job, runners: Runners, progress: Progress
) -> dict[str, Any]:
    assert bench is not None
    stage = job.stage
    remove(stage.path / FAILURE)
    given = as_given(bench, method)
    prepared, preparing = _prepared(stage, method, bench, seed)
    if method.trains:
        fitted, chosen = _choose(bench, given, job, method, prepared, seed)
    else:
        clock = time.monotonic()
        fitted = method.fit(given, prepared, 0.0, seed)
        # What a method without a learning rate chose on the validation questions by itself, and from what.
        chosen = {"fit_seconds": time.monotonic() - clock, **fitted.facts}
    if method.works_on == "test":
        answers, predicting = all_parts(stage, method, bench, seed)
    else:
        # Loaded before the clock starts: reading a model from disk is no part of a question's time.
        _ = bench.whole if method.runs_whole_model else bench.head
        clock = time.monotonic()
        answers = method.predict(given, fitted, bench.rows["test"], seed)
        predicting = time.monotonic() - clock
    write_answers(stage.path / ANSWERS, answers, bench.data.prompts, bench.data.rule)
    remove_folder(stage.path / PARTS)
    return {
        "method": method.name,
        "seed": seed,
        "questions": len(answers.rows),
        "trained_parameters": fitted.trained_parameters,
        **chosen,
        "train_seconds": preparing + chosen["fit_seconds"],
        **_costs(bench, given, method, fitted, seed, predicting / len(answers.rows)),
    }


def _prepared(stage: Stage, method: Method, bench: Bench, seed: int) -> tuple[dict[str, Tensor], float]:
    """What all trials share, from an earlier attempt where there was one, and the seconds that it took."""
    path, given = stage.path / _PREPARED, as_given(bench, method)
    if not exists(path):
        clock = time.monotonic()
        if method.works_on == "train":
            method.check(given)
            found, seconds = all_parts(stage, method, bench, seed)
            made = method.learned(given, found)
        else:
            made = method.prepare(given, seed)
            seconds = time.monotonic() - clock
        if not made:
            return {}, 0.0
        _save(path, made, {"seconds": seconds})
    tensors, facts = _load(path)
    return tensors, float(facts["seconds"])


def _choose(
    bench: Bench, given: Bench, job: Job, method: Method, prepared: dict[str, Tensor], seed: int
) -> tuple[Fitted, dict[str, Any]]:
    """Fit with every rate of the grid (or the one that the first seed chose) and keep the best on validation."""
    grid = sorted(bench.config.learning_rates)
    if "first" in job.stages:
        grid = [float(job.stages["first"].manifest()["facts"]["learning_rate"])]
    trials = []
    for rate in grid:
        path = job.stage.path / "trials" / f"{rate:g}.safetensors"
        if not exists(path):
            clock = time.monotonic()
            fitted = method.fit(given, prepared, rate, seed)
            seconds = time.monotonic() - clock
            accuracy = bench.accuracy(method.predict(given, fitted, bench.rows["validation"], seed))
            facts = {"learning_rate": rate, "validation_accuracy": accuracy, "seconds": seconds}
            _save(path, fitted.tensors, {**facts, "parameters": fitted.trained_parameters, "facts": fitted.facts})
        trials.append(_load(path))
    tensors, best = max(trials, key=lambda trial: (trial[1]["validation_accuracy"], -trial[1]["learning_rate"]))
    return Fitted(tensors, best["parameters"], best["facts"]), {
        "learning_rate": best["learning_rate"],
        "validation_accuracy": best["validation_accuracy"],
        "trials": {f"{t['learning_rate']:g}": t["validation_accuracy"] for _, t in trials},
        "fit_seconds": best["seconds"],
        "selection_seconds": sum(t["seconds"] for _, t in trials),
    }


def _costs(bench: Bench, given: Bench, method: Method, fitted: Fitted, seed: int, seconds: float) -> dict[str, float]:
    """Operations and time of one question; what starts from cached activations pays for the trunk too."""
    rows = bench.rows["test"]
    flops = counted(rows, lambda sample: method.predict(given, fitted, sample, seed))
    trunk = QuestionCost(0.0, 0.0) if method.runs_whole_model else _trunk(bench)
    return {"flops_per_question": flops + trunk.flops, "questions_per_second": 1 / (seconds + trunk.seconds)}


def _trunk(bench: Bench) -> QuestionCost:
    """The trunk's cost, measured once a process."""
    if bench.trunk is None:
        bench.trunk = trunk_cost(bench, bench.rows["test"])
    return bench.trunk


def _save(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_tensors(path, whole, {"facts": json.dumps(facts)})


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        tensors, metadata = read_tensors(path)
        return tensors, json.loads(metadata["facts"])
    except (*DAMAGED, KeyError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); remove it and run again") from None


def other_versions(stages: Iterable[Stage]) -> list[str]:
    """A sentence for each kind of these stages that other library versions made."""
    return list(dict.fromkeys(other for stage in stages if (other := stage.other_versions()) is not None))


def run_methods(
    setup: Setup,
    stages: Mapping[str, Stage],
    methods: Sequence[str],
    seeds: int,
    execute: Executor,
    progress: Progress,
    on_method: Callable[[str], None] = lambda name: None,
) -> dict[str, list[Stage]]:
    """Run the methods that are not complete with `execute`; each method's stages, one a seed, complete or failed."""
    planned = {name: [method_stage(setup, stages, name, s) for s in seeds_of(setup, name, seeds)] for name in methods}
    inputs = {step.name: stages[step.name] for step in order(NEIGHBORS)}
    work = MethodsWork(setup, inputs, tuple(methods), seeds)
    pending = [n for n, name in enumerate(methods) if not all(stage.complete for stage in planned[name])]
    for name in methods:
        if all(stage.complete for stage in planned[name]):
            for stage in planned[name]:
                stage.verify()
            progress.say(f"{name}: already complete")
            for other in other_versions(planned[name]):
                progress.say(f"note: {name}, {other}")
            on_method(name)
    with progress.meter("baselines", len(methods), "methods", len(methods) - len(pending)) as meter:
        for report in execute(work, pending):
            name = methods[report.batch]
            meter.advance(1, name)
            progress.say(f"{name}: {'failed' if report.errors else 'done'} ({report.seconds:.1f} s)")
            on_method(name)
    return planned
