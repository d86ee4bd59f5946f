"""What a sweep's finished trials say together: accuracies over seeds, and paired differences to the centre."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from roma_ray.ablations.space import Trial
from roma_ray.ablations.sweep import DONE, State, Sweep
from roma_ray.engine.tables import read_table
from roma_ray.engine.training import is_idle
from roma_ray.evaluation.judged import RESULTS
from roma_ray.evaluation.paired import read_evaluation
from roma_ray.evaluation.statistics import accuracy, holm, mcnemar, standard_error
from roma_ray.moe.reach import is_unreached


@dataclass(frozen=True)
class Finished:
    """One finished trial's answers to the test questions."""

    trial: Trial
    ids: tuple[str, ...]
    base: np.ndarray
    tuned: np.ndarray
    """Verdicts, bool, in the order of `ids`."""
    validation: float
    base_validation: float
    gradient_ratio: float | None
    """The regularizer's gradient over the task's, at the start; None where none was asked for (none, or λ = 0)."""
    idle: bool
    pin: str


@dataclass(frozen=True)
class Paired:
    """A paired difference of two models' accuracies on the same test questions."""

    difference: float
    stderr: float
    p: float
    """One seed: McNemar's exact test. Several: t-test over the questions' mean differences."""
    corrected_p: float = math.nan
    """Holm's, over all settings that are compared to the centre."""


@dataclass(frozen=True)
class Result:
    """One setting, over its seeds."""

    name: str
    factors: tuple[tuple[str, str], ...]
    centre: bool
    seeds: tuple[int, ...]
    validation: float
    accuracy: float
    stderr: float
    """Over seeds where there are several, else over questions."""
    gain: Paired
    """To the base model."""
    to_centre: Paired | None
    """None for the centre itself, and where the two were not asked the same questions."""
    gradient_ratio: float | None
    finished: tuple[Finished, ...]

    @property
    def idle(self) -> bool:
        """Whether the regularizer was idle with any seed."""
        return any(f.idle for f in self.finished)

    @property
    def key(self) -> str:
        """What tells it from every other setting."""
        return self.finished[0].trial.group


@dataclass(frozen=True)
class Findings:
    """Everything that the report shows; fractions, not percent."""

    results: tuple[Result, ...]
    """By validation accuracy, best first: settings are chosen on validation questions, never on test questions."""
    base_accuracy: float
    base_stderr: float
    base_validation: float
    questions: int

    @property
    def centre(self) -> Result | None:
        return next((result for result in self.results if result.centre), None)

    def of(self, factor: str, level: str) -> Result | None:
        """The setting that a factor's level names."""
        return next((result for result in self.results if (factor, level) in result.factors), None)


def read_findings(sweep: Sweep) -> Findings | None:
    """The findings of the trials that are finished; None where there are none. Raises ArtifactError."""
    groups: dict[str, list[Finished]] = {}
    for state in sweep.having(DONE):
        groups.setdefault(state.trial.group, []).append(read_finished(state))
    if not groups:
        return None
    centre = next((group for group in groups.values() if group[0].trial.centre), None)
    results = [_result(group, centre) for group in groups.values()]
    corrected = holm({r.key: r.to_centre.p for r in results if r.to_centre})
    results = [_with_corrected(result, corrected) for result in results]
    results.sort(key=lambda result: (-result.validation, not result.centre, result.name))
    first = (centre or next(iter(groups.values())))[0]
    return Findings(
        tuple(results), accuracy(first.base), standard_error(first.base), first.base_validation, len(first.ids)
    )


def read_finished(state: State) -> Finished:
    """A finished trial's answers. Raises ArtifactError."""
    stages = state.planned.stages
    table = read_table(stages["evaluate"].path / RESULTS, ["id", "split", "base_correct", "tuned_correct"])
    test = np.array([split == "test" for split in table.column("split").to_pylist()])
    columns = {name: np.array(table.column(name).to_pylist()) for name in ("id", "base_correct", "tuned_correct")}
    evaluation = read_evaluation(stages["evaluate"])
    probe = stages["finetune"].manifest()["facts"]["probe"]
    regularizer = state.planned.setup.config.finetune.regularizer
    asked = regularizer.kind != "none" and regularizer.weight != 0
    return Finished(
        trial=state.trial,
        ids=tuple(columns["id"][test].tolist()),
        base=columns["base_correct"][test].astype(bool),
        tuned=columns["tuned_correct"][test].astype(bool),
        validation=state.validation_accuracy or 0.0,
        base_validation=evaluation["validation"]["base_accuracy"],
        gradient_ratio=probe["gradient_ratio"] if asked and not is_unreached(probe) else None,
        idle=is_idle(probe, regularizer),
        pin=evaluation["pin"],
    )


def _result(group: Sequence[Finished], centre: Sequence[Finished] | None) -> Result:
    trial = group[0].trial
    accuracies = [accuracy(f.tuned) for f in group]
    error = _over_seeds(accuracies) if len(group) > 1 else standard_error(group[0].tuned)
    ratios = [f.gradient_ratio for f in group if f.gradient_ratio is not None]
    to_centre = None
    if centre is not None and not trial.centre:
        of_seed = {f.trial.seed: f for f in centre}
        pairs = [(of_seed[f.trial.seed], f) for f in group if f.trial.seed in of_seed]
        if pairs and all(a.ids == b.ids for a, b in pairs):
            to_centre = paired([a.tuned for a, _ in pairs], [b.tuned for _, b in pairs])
    return Result(
        name=trial.name.removesuffix(f", seed {trial.seed}"),
        factors=trial.factors,
        centre=trial.centre,
        seeds=tuple(f.trial.seed for f in group),
        validation=float(np.mean([f.validation for f in group])),
        accuracy=float(np.mean(accuracies)),
        stderr=error,
        gain=paired([f.base for f in group], [f.tuned for f in group]),
        to_centre=to_centre,
        gradient_ratio=float(np.mean(ratios)) if ratios else None,
        finished=tuple(group),
    )


def _over_seeds(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def paired(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> Paired:
    """The mean difference of verdicts, seed by seed on the same questions, with its standard error over questions."""
    mean = np.mean([b.astype(float) - a.astype(float) for a, b in zip(before, after, strict=True)], axis=0)
    spread = float(mean.std(ddof=1) / math.sqrt(len(mean))) if len(mean) > 1 else 0.0
    difference = float(mean.mean())
    if len(before) == 1:
        return Paired(difference, spread, mcnemar(before[0], after[0]))
    if not spread:
        return Paired(difference, spread, 1.0)
    from scipy.stats import t

    return Paired(difference, spread, float(2 * t.sf(abs(difference) / spread, len(mean) - 1)))


def _with_corrected(result: Result, corrected: Mapping[str, float]) -> Result:
    if result.to_centre is None:
        return result
    from dataclasses import replace

    return replace(result, to_centre=replace(result.to_centre, corrected_p=corrected[result.key]))
