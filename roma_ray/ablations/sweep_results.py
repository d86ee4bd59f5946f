"""What a sweep's finished trials say together: figures over seeds and questions, and paired differences to base and centre."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from roma_ray.ablations.space import Trial
from roma_ray.ablations.sweep import DONE, State, Sweep
from roma_ray.engine.objective import is_idle
from roma_ray.engine.question_table import TABLE, read_table
from roma_ray.evaluation.measures import RULES, ByTask, pair_by_task
from roma_ray.evaluation.results_file import Judged, read_judged
from roma_ray.evaluation.shares import answer_shares, shift_notes
from roma_ray.evaluation.statistics import Paired, accuracy, hierarchical_interval, holm, significant, standard_error
from roma_ray.moe.reach import is_unreached
from roma_ray.stages.paired_evaluation import read_evaluation

Values = Mapping[str, np.ndarray]
"""Each measure's value of every test question."""


@dataclass(frozen=True)
class SeededMean:
    """A mean with two standard errors, over questions and over seeds, kept apart."""

    mean: float
    questions: float
    """Standard error over the questions drawn; of several seeds that of their mean, of validation at most that."""
    seeds: float | None = None
    """Standard error over seeds; None for a single one."""


@dataclass(frozen=True)
class FinishedTrial:
    """One finished trial's answers to the test questions."""

    trial: Trial
    judged: Judged
    base: Values
    tuned: Values
    validation: SeededMean
    base_validation: SeededMean
    validation_questions: int
    shares: Mapping[str, Any]
    """Which answers base and tuned model give, as `evaluation/shares.py` has them."""
    choices: Sequence[Sequence[str]]
    gradient_ratio: float | None
    """The regularizer's gradient over the task's, at the start; None where none was asked for (none, or λ = 0)."""
    idle: bool
    pin: str
    held_out: Mapping[str, Any] | None = None
    """Its figures of trained and held-out tasks (`evaluation/transfer.py`); None where it holds none out."""

    @property
    def measure(self) -> str:
        """The measure that its answers are chosen by."""
        return RULES[self.judged.asked.rule]


@dataclass(frozen=True)
class Compared:
    """A setting against the base model, or against the centre, question by question, seed by seed."""

    judged: ByTask
    """By the accuracy that each one's answers are chosen by."""
    measures: Mapping[str, ByTask]
    """By every measure that both have."""
    seeds: float | None
    """Standard error of the judged difference over seeds; None for a single one."""
    interval: tuple[float, float] | None = None
    """95 % of the judged difference, seeds and questions both drawn; None for a single seed."""
    corrected: Mapping[str, float] = field(default_factory=dict)
    """Holm's p over all settings that are compared to the centre, by measure; under the empty name the judged accuracy's."""

    @property
    def p(self) -> float:
        """Of the judged difference. One seed: McNemar's exact test. Several: t-test over the questions' mean differences."""
        return _p(self.judged.micro)

    @property
    def corrected_p(self) -> float:
        """Holm's."""
        return self.corrected.get("", math.nan)

    def plain(self) -> dict[str, float | None]:
        """The judged difference as data: with errors over questions and over seeds, and the interval over both; None for a single seed."""
        low, high = self.interval or (None, None)
        micro = self.judged.micro
        return {
            "difference": micro.difference,
            "stderr": micro.difference_stderr,
            "stderr_seeds": self.seeds,
            "low": low,
            "high": high,
            "p": self.p,
        }

    @property
    def clear(self) -> int:
        """1 where it is better after Holm's correction, -1 where it is worse, else 0."""
        return int(math.copysign(1, self.judged.micro.difference)) if significant(self.corrected_p) else 0


@dataclass(frozen=True)
class SettingResult:
    """One setting, over its seeds."""

    name: str
    centre: bool
    seeds: tuple[int, ...]
    validation: SeededMean
    accuracy: SeededMean
    gain: Compared
    """To the base model."""
    to_centre: Compared | None
    """None for the centre itself, and where the two were not asked the same questions."""
    gradient_ratio: float | None
    finished: tuple[FinishedTrial, ...]
    shifted: Mapping[str, str] = field(default_factory=dict)
    """Tasks whose difference to the centre lives in a shift between answers alone, with the sentence."""

    @property
    def trial(self) -> Trial:
        """The first seed's, which stands for the setting."""
        return self.finished[0].trial

    @property
    def idle(self) -> bool:
        """Whether the regularizer was idle with any seed."""
        return any(f.idle for f in self.finished)

    @property
    def key(self) -> str:
        """What tells it from every other setting."""
        return self.trial.group


@dataclass(frozen=True)
class Findings:
    """Everything that the report shows; fractions, not percent."""

    results: tuple[SettingResult, ...]
    """By validation accuracy, best first: settings are chosen on validation questions, never on test questions."""

    @property
    def centre(self) -> SettingResult | None:
        return next((result for result in self.results if result.centre), None)

    @property
    def first(self) -> FinishedTrial:
        """Any trial: for what all of them share, the base model and the questions."""
        return (self.centre or self.results[0]).finished[0]

    @property
    def base(self) -> SeededMean:
        """The base model's accuracy on the test questions."""
        verdicts = self.first.base[self.first.measure]
        return SeededMean(accuracy(verdicts), standard_error(verdicts))

    @property
    def questions(self) -> int:
        return len(self.first.judged.ids)

    @property
    def several_seeds(self) -> bool:
        """Whether any setting has more than one."""
        return any(len(result.seeds) > 1 for result in self.results)

    def of(self, factor: str, level: str) -> SettingResult | None:
        """The setting that a factor's level names."""
        return next((result for result in self.results if (factor, level) in result.trial.factors), None)


def read_findings(sweep: Sweep) -> Findings | None:
    """The findings of the trials that are finished; None where there are none. Raises ArtifactError."""
    groups: dict[str, list[FinishedTrial]] = {}
    for state in sweep.having(DONE):
        groups.setdefault(state.trial.group, []).append(read_finished(state))
    return find(list(groups.values())) if groups else None


def find(groups: Sequence[Sequence[FinishedTrial]]) -> Findings:
    """What the groups, each a setting's seeds, say together."""
    centre = next((group for group in groups if group[0].trial.centre), None)
    results = _corrected([_result(group, centre) for group in groups])
    results.sort(key=lambda result: (-result.validation.mean, not result.centre, result.name))
    return Findings(tuple(results))


def read_finished(state: State) -> FinishedTrial:
    """A finished trial's answers. Raises ArtifactError."""
    stages = state.planned.stages
    judged = read_judged(stages["evaluate"].path)
    evaluation = read_evaluation(stages["evaluate"])
    probe = stages["finetune"].manifest()["facts"]["probe"]
    regularizer = state.planned.setup.config.finetune.regularizer
    asked = regularizer.kind != "none" and regularizer.weight != 0
    valid = evaluation["validation"]
    return FinishedTrial(
        trial=state.trial,
        judged=judged,
        base=judged.values("base"),
        tuned=judged.values("tuned"),
        validation=SeededMean(valid["tuned_accuracy"], valid["tuned_stderr"]),
        base_validation=SeededMean(valid["base_accuracy"], valid["base_stderr"]),
        validation_questions=valid["n"],
        shares=evaluation["shares"],
        choices=_choices(stages["questions"].path / TABLE, tuple(judged.rows)),
        gradient_ratio=probe["gradient_ratio"] if asked and not is_unreached(probe) else None,
        idle=is_idle(probe, regularizer),
        pin=evaluation["pin"],
        held_out=evaluation.get("held_out"),
    )


@lru_cache(maxsize=4)
def _choices(table: Path, rows: tuple[int, ...]) -> Sequence[Sequence[str]]:
    """The choices' texts of some questions, read once for all trials that were asked them."""
    found: list[list[str]] = (
        read_table(table, ["choices"]).column("choices").take(pa.array(rows, pa.int64())).to_pylist()
    )
    return found


def _result(group: Sequence[FinishedTrial], centre: Sequence[FinishedTrial] | None) -> SettingResult:
    trial = group[0].trial
    verdicts = [f.tuned[f.measure] for f in group]
    ratios = [f.gradient_ratio for f in group if f.gradient_ratio is not None]
    pairs: list[tuple[FinishedTrial, FinishedTrial]] = []
    if centre is not None and not trial.centre:
        of_seed = {f.trial.seed: f for f in centre}
        pairs = [(of_seed[f.trial.seed], f) for f in group if f.trial.seed in of_seed]
        pairs = pairs if all(a.judged.ids == b.judged.ids for a, b in pairs) else []
    name = trial.name.removesuffix(f", seed {trial.seed}")
    return SettingResult(
        name=name,
        centre=trial.centre,
        seeds=tuple(f.trial.seed for f in group),
        validation=SeededMean(
            accuracy([f.validation.mean for f in group]),
            accuracy([f.validation.questions for f in group]),
            _over_seeds([f.validation.mean for f in group]),
        ),
        accuracy=SeededMean(
            accuracy(np.concatenate(verdicts)),
            standard_error(np.mean(verdicts, axis=0)),
            _over_seeds([accuracy(own) for own in verdicts]),
        ),
        gain=_compared([f.base for f in group], group, [f.measure for f in group]),
        to_centre=_compared([a.tuned for a, _ in pairs], [b for _, b in pairs], [a.measure for a, _ in pairs])
        if pairs
        else None,
        gradient_ratio=accuracy(ratios) if ratios else None,
        finished=tuple(group),
        shifted=_shifted(pairs, name),
    )


def _compared(before: Sequence[Values], after: Sequence[FinishedTrial], measures: Sequence[str]) -> Compared:
    """Differences of the means over seeds; `measures` are those that the former's answers are chosen by."""
    tasks = after[0].judged.asked.tasks
    names = [name for name in before[0] if all(name in values for values in (*before, *(f.tuned for f in after)))]
    verdicts = [(values[name], f.tuned[f.measure]) for values, name, f in zip(before, measures, after, strict=True)]
    paired = {
        name: pair_by_task(
            np.mean([v[name] for v in before], axis=0), np.mean([f.tuned[name] for f in after], axis=0), tasks
        )
        for name in names
    }
    judged = pair_by_task(np.mean([a for a, _ in verdicts], axis=0), np.mean([b for _, b in verdicts], axis=0), tasks)
    differences_SN = np.array([after - before for before, after in verdicts])
    interval = hierarchical_interval(differences_SN, seed=0) if len(verdicts) > 1 else None
    return Compared(judged, paired, _over_seeds(differences_SN.mean(1).tolist()), interval)


def _over_seeds(values: Sequence[float]) -> float | None:
    return standard_error(values) if len(values) > 1 else None


def _shifted(pairs: Sequence[tuple[FinishedTrial, FinishedTrial]], name: str) -> dict[str, str]:
    """Tasks whose difference to the centre lives in a shift between answers alone with every seed, each in a sentence."""
    if not pairs or any(a.pin != b.pin for a, b in pairs):
        return {}
    found = [
        answer_shares(a.judged.scores["tuned"], b.judged.scores["tuned"], b.judged.asked, b.choices) for a, b in pairs
    ]
    alone = [task for task in found[0] if all(any(by["alone"] for by in shares[task]["shift"]) for shares in found)]
    return {task: shift_notes({task: found[0][task]}, before="the centre", after=name)[0] for task in alone}


def _p(figures: Paired) -> float:
    p = figures.p
    assert p is not None, "a test is made of every figure but macro averages"
    return p


def _corrected(results: Sequence[SettingResult]) -> list[SettingResult]:
    """The results with Holm's correction over all that are compared to the centre, measure by measure."""
    near = {r.key: r.to_centre for r in results if r.to_centre}
    names = dict.fromkeys(name for compared in near.values() for name in compared.measures)
    corrected = {"": holm({key: compared.p for key, compared in near.items()})}
    for name in names:
        corrected[name] = holm({k: _p(c.measures[name].micro) for k, c in near.items() if name in c.measures})
    return [
        replace(
            r, to_centre=replace(r.to_centre, corrected={n: by[r.key] for n, by in corrected.items() if r.key in by})
        )
        if r.to_centre
        else r
        for r in results
    ]
