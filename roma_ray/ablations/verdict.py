"""`roma-ray verdict`: whether it is the manifold, or whether any pull would do, or the task loss alone.

Each arm's settings are chosen by the validation accuracy of its own grid with the first seed; then every arm trains with all
seeds. Of each pair it is said whether one is better, worse, equal within a margin or not known (`evaluation/equivalence.py`), all
statements corrected together with every other evaluation on the same questions that the storage holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from roma_ray.ablations import sweep_command
from roma_ray.ablations.arms import BASE, Arms
from roma_ray.ablations.space import Trial, setting
from roma_ray.ablations.sweep import DONE, FAILED, Sweep
from roma_ray.ablations.sweep_results import FinishedTrial, SeededMean, read_finished
from roma_ray.cluster.ray_runners import Place, open_place
from roma_ray.engine.progress import Progress
from roma_ray.errors import ArtifactError, TrainingError
from roma_ray.evaluation.equivalence import Finding, findings
from roma_ray.evaluation.measures import MEASURES, ByTask, pair_by_task
from roma_ray.evaluation.results_file import read_judged
from roma_ray.evaluation.statistics import Paired, accuracy, hierarchical_interval, pair, standard_error
from roma_ray.stages.paired_evaluation import EVALUATE
from roma_ray.store.artifacts import Store, read_manifest
from roma_ray.store.files import listed

Pair = tuple[str, str]
"""(arm or base model, arm that is compared with it)."""


@dataclass(frozen=True)
class ArmResult:
    """One arm: what was chosen for it, and its answers to the test questions by seed."""

    name: str
    settings: Mapping[str, object]
    tried: int
    """Settings of its grid that were trained."""
    validation: float
    """Accuracy of the chosen setting with the first seed."""
    trials: tuple[FinishedTrial, ...]

    def values(self, measure: str) -> np.ndarray:
        """A measure's value of every question with every seed, [seeds, N]."""
        return np.array([trial.tuned[measure] for trial in self.trials])

    @property
    def accuracy(self) -> SeededMean:
        """By the configured rule."""
        verdicts = self.values(self.trials[0].measure)
        seeds = verdicts.mean(1)
        over = standard_error(seeds) if len(seeds) > 1 else None
        return SeededMean(accuracy(verdicts.ravel()), standard_error(verdicts.mean(0)), over)


@dataclass(frozen=True)
class ArmsVerdict:
    """What the arms' answers say."""

    arms: Mapping[str, ArmResult]
    missing: Mapping[str, str]
    """Arms that could not be trained, each with the reason."""
    judged: str
    measure: str
    """The one that answers are chosen by."""
    found: Mapping[str, Mapping[Pair, Finding]]
    """By measure: every statement."""
    by_task: Mapping[str, Mapping[Pair, ByTask]]
    intervals: Mapping[Pair, tuple[float, float]]
    """95 % over questions and seeds, of the configured measure."""
    others: int
    """Further evaluations on the same questions that the storage holds; the correction counts them."""

    @property
    def first(self) -> FinishedTrial:
        """Any trial: for what all share, the base model and the questions."""
        return next(iter(self.arms.values())).trials[0]


def run(arms: Arms, progress: Progress, address: str | None = None) -> tuple[ArmsVerdict, tuple[Sweep, Sweep]]:
    """Run what is missing of the grid and of the chosen settings with all seeds, on one cluster. Raises RomaError."""
    with open_place(arms.space.centre, address, progress) as place:
        return run_at(place, arms, progress)


def run_at(place: Place, arms: Arms, progress: Progress) -> tuple[ArmsVerdict, tuple[Sweep, Sweep]]:
    """As `run`, on a cluster that is open."""
    grid = sweep_command.run_at(place, arms.space, progress)
    chosen = choose(arms, grid)
    if not chosen:
        failed = "; ".join(sweep_command.failures(grid))
        raise TrainingError(f"no arm could be trained, so there is nothing to judge: {failed}")
    if arms.file.judged not in chosen:
        # Nothing could be said of the others' further seeds.
        raise TrainingError(f"{arms.file.judged} could not be trained: {_untrained(arms, grid, arms.file.judged)}")
    space, tags = arms.chosen_space(chosen)
    sweep = sweep_command.run_at(place, space, progress)
    return judge(arms, grid, chosen, sweep, tags), (grid, sweep)


def choose(arms: Arms, grid: Sweep) -> dict[str, Trial]:
    """Each arm's trial of the highest validation accuracy, of equal ones the first; arms without a finished one are left out."""
    done = {state.trial.id: state for state in grid.having(DONE)}
    found = {}
    for arm in arms.grids:
        finished = [done[trial.id] for trial in arms.trials_of(arm) if trial.id in done]
        if finished:
            found[arm] = max(finished, key=lambda state: state.validation_accuracy or 0.0).trial
    return found


def judge(arms: Arms, grid: Sweep, chosen: Mapping[str, Trial], sweep: Sweep, tags: Mapping[str, str]) -> ArmsVerdict:
    """What the finished trials say. Raises ArtifactError, TrainingError where the judged arm or a seed of it is missing."""
    results, missing = {}, {}
    for arm in arms.grids:
        trials = arms.trials_of(arm)
        if arm not in chosen:
            missing[arm] = _untrained(arms, grid, arm)
            continue
        states = [s for s in sweep.states.values() if tags[arm] in dict(s.trial.factors)]
        broken = [s for s in states if s.state != DONE]
        if broken:
            missing[arm] = f"seed {broken[0].trial.seed}: {_first_line(broken[0].error) or broken[0].state}"
            continue
        finished = tuple(sorted(map(read_finished, states), key=lambda f: f.trial.seed))
        done = {s.trial.id: s for s in grid.having(DONE)}
        results[arm] = ArmResult(
            arm,
            {key: setting(chosen[arm].config, key) for key in arms.grids[arm]},
            sum(trial.id in done for trial in trials),
            done[chosen[arm].id].validation_accuracy or 0.0,
            finished,
        )
    if arms.file.judged not in results:
        raise TrainingError(f"{arms.file.judged} could not be trained: {missing.get(arms.file.judged)}")
    tried = tried_on(sweep.plan.store, results)
    return state_of(results, missing, arms.file.judged, (arms.file.margin / 100, arms.file.margin_nats), tried)


def _untrained(arms: Arms, grid: Sweep, arm: str) -> str:
    """Why no setting of an arm's grid is finished."""
    mine = {trial.id for trial in arms.trials_of(arm)}
    failed = [state.error for state in grid.having(FAILED) if state.trial.id in mine]
    return _first_line(failed[0]) if failed else "nothing of it is finished"


def _first_line(error: str) -> str:
    """Without the place of a traceback, which is another each time."""
    return error.partition("\n")[0]


def state_of(
    arms: Mapping[str, ArmResult],
    missing: Mapping[str, str],
    judged: str,
    margins: tuple[float, float],
    tried: Mapping[str, Mapping[str, Paired]],
) -> ArmsVerdict:
    """Every arm against the base model, and the judged one against every other. `tried` by measure: what else the storage holds."""
    first = arms[judged].trials[0]
    pairs: list[Pair] = [(BASE, arm) for arm in arms] + [(arm, judged) for arm in arms if arm != judged]
    seeds = {arm: [f.trial.seed for f in result.trials] for arm, result in arms.items()}
    assert len({tuple(s) for s in seeds.values()}) == 1, "every arm has the same seeds"
    found, by_task = {}, {}
    for measure in first.tuned:
        margin = margins[0] if MEASURES[measure].unit == "%" else margins[1]

        def mean(name: str, measure: str = measure) -> np.ndarray:
            return first.base[measure] if name == BASE else arms[name].values(measure).mean(0)

        by_task[measure] = {(a, b): pair_by_task(mean(a), mean(b), first.judged.asked.tasks) for a, b in pairs}
        statements: dict[object, Paired] = {key: one.micro for key, one in by_task[measure].items()}
        corrected = findings({**statements, **tried.get(measure, {})}, margin)
        found[measure] = {key: corrected[key] for key in by_task[measure]}
    intervals = {}
    for a, b in pairs:
        after = arms[b].values(first.measure)
        before = np.broadcast_to(first.base[first.measure], after.shape) if a == BASE else arms[a].values(first.measure)
        intervals[a, b] = hierarchical_interval(after - before, seed=0)
    return ArmsVerdict(
        arms, missing, judged, first.measure, found, by_task, intervals, len(tried.get(first.measure, {}))
    )


def tried_on(store: Store, arms: Mapping[str, ArmResult]) -> dict[str, dict[str, Paired]]:
    """Every other evaluation on the same questions in the storage against its base, by measure and fingerprint.

    All that was tried there counts for the correction, be it in this sweep or not; what cannot be read counts for nothing.
    """
    first = next(iter(arms.values())).trials[0]
    mine = {tuple(map(tuple, f.judged.scores["tuned"])) for result in arms.values() for f in result.trials}
    found: dict[str, dict[str, Paired]] = {measure: {} for measure in first.tuned}
    for folder in listed(store.root / EVALUATE.name, "*"):
        with suppress(ArtifactError, KeyError):
            if read_manifest(folder)["facts"]["pin"] != first.pin:
                continue
            judged = read_judged(folder)
            if tuple(map(tuple, judged.scores["tuned"])) in mine:
                continue
            base, tuned = judged.values("base"), judged.values("tuned")
            for measure in found:
                found[measure][folder.name] = pair(base[measure], tuned[measure])
    return found
