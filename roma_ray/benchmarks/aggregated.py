"""Metrics that are no mean over questions (perplexity, BLEU, chrF ...): lm-eval's own value, errors by a paired bootstrap.

lm-eval computes each from all questions at once. Base and tuned are drawn on the same questions, so the error of their
difference is a paired one, as that of every other metric here; no test is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from roma_ray.benchmarks.benchmark_values import number
from roma_ray.evaluation.statistics import Paired

if TYPE_CHECKING:
    from lm_eval.api.task import Task

RESAMPLES = 1000
FEW_RESAMPLES = 100
"""Of what takes long to compute, as in lm-eval."""
_SLOW = ("bleu", "chrf", "chrf++", "ter")
_SEED = 1234
Aggregate = Callable[[Sequence[Any]], float]


def aggregated_figures(
    results: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Task]
) -> dict[str, dict[str, dict[str, Any]]]:
    """{task: {"metric,filter": figures}} of the metrics whose value of one question is no number; {} where there are none.

    Those alone that lm-eval itself knows how to put together: a task's own code may take any time and return anything.
    """
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    known = list(AGGREGATION_REGISTRY.values())
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, samples in results["base"]["samples"].items():
        others = results["tuned"]["samples"][name] if "tuned" in results else None
        for key, metric, own in _items(samples):
            aggregate, count = tasks[name].aggregation()[metric], FEW_RESAMPLES if metric in _SLOW else RESAMPLES
            if aggregate not in known:
                continue
            theirs = None if others is None else next(t for k, m, t in _items(others) if (k, m) == (key, metric))
            figures = bootstrapped(aggregate, own, theirs, resamples=count)
            for who in ("base", "tuned") if theirs is not None else ("base",):
                judged = results[who]["results"][name][f"{metric},{key}"]
                same = np.isclose(figures[who], judged, rtol=1e-9, equal_nan=True)
                assert same, f"{name}: lm-eval says {judged}, we {figures[who]}"
            found.setdefault(name, {})[f"{metric},{key}"] = figures
    return found


def _items(samples: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[Any]]]:
    """(filter, metric, every question's value) of those metrics."""
    keys = dict.fromkeys((s["filter"], m) for s in samples for m in s["metrics"] if number(s[m]) is None)
    return [(key, m, [s[m] for s in samples if s["filter"] == key]) for key, m in keys]


def bootstrapped(
    aggregate: Aggregate, base: Sequence[Any], tuned: Sequence[Any] | None, *, resamples: int, seed: int = _SEED
) -> dict[str, Any]:
    """The value of one or two models with standard errors over questions: {n, base, base_stderr}, or as `Paired`.

    Of a single question the errors are null.
    """
    drawn = np.random.default_rng(seed).integers(len(base), size=(resamples, len(base))).tolist()
    before = np.array([aggregate([base[n] for n in rows]) for rows in drawn])
    value, error = float(aggregate(base)), float(before.std(ddof=1))
    if tuned is None:
        return _with_errors({"n": len(base), "base": value, "base_stderr": error})
    after = np.array([aggregate([tuned[n] for n in rows]) for rows in drawn])
    other, gap = float(aggregate(tuned)), float((after - before).std(ddof=1))
    return _with_errors(Paired(len(base), value, error, other, float(after.std(ddof=1)), other - value, gap).plain())


def _with_errors(figures: dict[str, Any]) -> dict[str, Any]:
    alone = figures["n"] < 2
    return {name: None if alone and name.endswith("_stderr") else value for name, value in figures.items()}
