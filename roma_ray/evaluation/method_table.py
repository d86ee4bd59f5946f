"""The comparison of Table 1: every method's answers judged on the same test questions, against the base model's.

`compare_methods` returns plain data, also written by `roma-ray baselines --summary FILE`:

pin               hash of the judged questions with their answers: tables with another pin are not comparable
questions         number of test questions
budget            what is equal for all methods that train
methods           one object a method, in order: name, title, sees_labels, seeds, n, accuracy, stderr (over questions, of the
                  mean over seeds), seed_deviation (of the accuracy over seeds; null for one), difference and
                  difference_stderr (to the base model, paired), first_seed (lost, won and mcnemar_p of the first seed alone: the test
                  takes verdicts, and a mean over seeds is none), tasks (accuracy by task), measures {measure of
                  `evaluation/measures.py`: {micro, macro, tasks}: the mean over seeds as tuned, paired with the base model as base},
                  held_out (where tasks are held out, else null: see `evaluation/transfer.py`), learning_rate or chosen (what a
                  method without a rate chose by itself), validation_accuracy, trials (validation accuracy by learning rate, or by
                  what else was tried),
                  trained_parameters, train_seconds (of the chosen learning rate, preparation included), selection_seconds (of the
                  whole grid), flops_per_question, questions_per_second, fingerprints. A failed one: name, title, failure
configured        the measure by which answers are chosen: that of accuracy, difference and first_seed
coincide          whether acc and acc_norm must be equal on these questions, so that one is left out
oracle            the oracle beside its control (null when it was not run): see `oracle_and_control`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np
import pyarrow as pa

from roma_ray.borders.text import figure, with_error
from roma_ray.config.schema import PromptConfig
from roma_ray.engine.answers import ANSWERS, read_answers
from roma_ray.engine.identity import answer_rule
from roma_ray.errors import GuardError
from roma_ray.evaluation.measures import MEASURES, RULES, Asked, measure, pair_measures
from roma_ray.evaluation.statistics import changes, mcnemar, p_value, pair, standard_error
from roma_ray.evaluation.transfer import by_group, ctgi_cell, gain_text
from roma_ray.questions.prompts import Prompt
from roma_ray.store.artifacts import Stage, fingerprint

SPLIT = "test"
_FACTS = (
    "learning_rate",
    "chosen",
    "validation_accuracy",
    "trials",
    "trained_parameters",
    "train_seconds",
    "selection_seconds",
    "flops_per_question",
    "questions_per_second",
)


@dataclass(frozen=True)
class Entry:
    """A method that was run: its finished stages, one a seed, or why it has none."""

    name: str
    title: str
    sees_labels: bool
    stages: Sequence[Stage]
    failure: str = ""


def compare_methods(
    entries: Sequence[Entry],
    budget: Mapping[str, Any],
    prompts: Sequence[Prompt],
    prompt: PromptConfig,
    held_out: Sequence[str] = (),
) -> dict[str, Any]:
    """Judge every method on the questions of the base model; `prompts` is the whole question table, `prompt` how it was made.

    With tasks `held_out` each method is also told by group: what it gives to trained tasks, and to those.

    Raises GuardError when a method answered other questions.
    """
    done = [entry for entry in entries if not entry.failure]
    answers = {entry.name: [read_answers(stage.path / ANSWERS, SPLIT) for stage in entry.stages] for entry in done}
    if "base" not in answers:
        failure = next(entry.failure for entry in entries if entry.name == "base")
        raise GuardError(f"the base model failed ({failure}), and without it there is nothing to compare with")
    base = answers["base"][0]
    keys = ("row", "answer")
    for name, tables in answers.items():
        if any(not table.select(keys).equals(base.select(keys)) for table in tables):
            raise GuardError(f"{name} answered other questions than the base model; remove its folder and run again")
    kept = [prompts[row] for row in base.column("row").to_pylist()]
    asked = Asked.of(kept, answer_rule(prompt), letter=prompt.format == "letter")
    groups = (frozenset(p.task for p in prompts if p.split == "train"), held_out) if held_out else None
    return {
        "pin": fingerprint({"rows": base.select(["id", "task", "answer"]).to_pylist()}),
        "questions": len(base),
        "configured": RULES[asked.rule],
        "coincide": asked.coincide,
        "budget": dict(budget),
        "methods": [
            {"name": entry.name, "title": entry.title, "failure": entry.failure}
            if entry.failure
            else _row(entry, answers[entry.name], base, asked, groups)
            for entry in entries
        ],
        "oracle": oracle_and_control(answers["oracle"][0], answers["oracle_control"], base)
        if {"oracle", "oracle_control"} <= set(answers)
        else None,
    }


def _row(
    entry: Entry,
    tables: Sequence[pa.Table],
    base: pa.Table,
    asked: Asked,
    groups: tuple[frozenset[str], Sequence[str]] | None,
) -> dict[str, Any]:
    right_SN = np.stack([_right(table) for table in tables])
    base_N, mean_N = _right(base), right_SN.mean(0)
    figures = pair(base_N, mean_N)
    lost, won = changes(base_N, right_SN[0])
    facts = entry.stages[0].manifest()["facts"]
    tasks = np.array(base.column("task").to_pylist())
    before, *measured = (measure(table.column("scores").to_pylist(), asked) for table in (base, *tables))
    after = {name: np.mean([one[name] for one in measured], axis=0) for name in before}
    return {
        "name": entry.name,
        "title": entry.title,
        "sees_labels": entry.sees_labels,
        "seeds": len(tables),
        "n": figures.n,
        "accuracy": figures.tuned,
        "stderr": figures.tuned_stderr,
        "seed_deviation": stdev(map(float, right_SN.mean(1))) if len(tables) > 1 else None,
        "difference": figures.difference,
        "difference_stderr": figures.difference_stderr,
        "first_seed": {"lost": lost, "won": won, "mcnemar_p": mcnemar(base_N, right_SN[0])},
        "tasks": {str(task): float(mean_N[tasks == task].mean()) for task in sorted(set(tasks))},
        "measures": {name: found.plain() for name, found in pair_measures(before, after, asked.tasks).items()},
        "held_out": by_group(before, after, asked.tasks, *groups, RULES[asked.rule]) if groups else None,
        **{key: facts.get(key) for key in _FACTS},
        "train_seconds": mean(stage.manifest()["facts"]["train_seconds"] for stage in entry.stages),
        "fingerprints": [stage.fingerprint for stage in entry.stages],
    }


def oracle_and_control(oracle: pa.Table, controls: Sequence[pa.Table], base: pa.Table) -> dict[str, float]:
    """How much more often routing reaches the right answer than a random wrong one, each beyond what the base gives anyway.

    oracle_accuracy, base_accuracy, oracle_gain: with the right answer as the aim. control_reached, base_at_aim,
    control_gain: how often the control gives its wrong aim, and the base model gives that same choice. difference: the one
    gain less the other, with its standard error over questions. Only the difference speaks of accuracy that is to be had.
    """
    right_N, base_N = _right(oracle), _right(base)
    chosen = np.array(base.column("prediction").to_pylist())
    reached_N = np.mean([_reached(table) for table in controls], axis=0)
    anyway_N = np.mean([np.array(table.column("aim").to_pylist()) == chosen for table in controls], axis=0)
    gain_N, control_N = right_N - base_N, reached_N - anyway_N
    return {
        "oracle_accuracy": float(right_N.mean()),
        "base_accuracy": float(base_N.mean()),
        "oracle_gain": float(gain_N.mean()),
        "oracle_gain_stderr": standard_error(gain_N),
        "control_reached": float(reached_N.mean()),
        "base_at_aim": float(anyway_N.mean()),
        "control_gain": float(control_N.mean()),
        "control_gain_stderr": standard_error(control_N),
        "difference": float((gain_N - control_N).mean()),
        "difference_stderr": standard_error(gain_N - control_N),
    }


def describe_oracle(found: Mapping[str, float]) -> str:
    """The sentence that stands beside every oracle figure."""
    raised, control, difference = (figure(found, n, digits=1) for n in ("oracle_gain", "control_gain", "difference"))
    return (
        f"The oracle raises accuracy by {raised} points (to {100 * found['oracle_accuracy']:.1f} %); its control, "
        f"optimized in the same way towards a random wrong choice, gives that choice {control} points more often "
        f"than the base model. Difference: {difference} points. The oracle alone shows that routing "
        "steers answers; only what it has over its control speaks of accuracy that is to be had."
    )


def _right(table: pa.Table) -> np.ndarray:
    return np.asarray(table.column("correct").to_pylist(), dtype=float)


def _reached(table: pa.Table) -> np.ndarray:
    aims, chosen = table.column("aim").to_pylist(), table.column("prediction").to_pylist()
    return np.asarray(np.array(aims) == np.array(chosen), dtype=float)


COSTS = ("method", "rate", "trained", "train s", "MFLOPs each", "questions/s")
COST_LEGEND = (
    "rate: the learning rate that was chosen (of expert_steering: experts promoted and demoted); trained: parameters; "
    "each, /s: a question, trunk included"
)
_SEES_LABELS = " †"


def result_header(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of `result_rows`; with several seeds McNemar's test is of the first, which its heading says."""
    several = summary["seeds"] > 1
    return ("method", "accuracy %", "to base", f"p (seed {summary['seed']})" if several else "p", "sd of seeds")


def result_legend(summary: Mapping[str, Any]) -> str:
    """What stands in the tables of accuracies and measures."""
    seeds = (
        "of the mean over seeds; sd of seeds: how far the accuracies of single seeds spread"
        if summary["seeds"] > 1
        else ""
    )
    return (
        f"Accuracy is {summary['configured']}. ±: standard error over questions, paired in differences"
        + (f", {seeds}" if seeds else "")
        + f". p: McNemar's exact test.{_SEES_LABELS}: sees the label. gold_logp: the right answer's log-likelihood, nats a token; "
        "choice_logp: its log-probability among the choices, nats."
    )


def measure_header(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of `measure_differences`; the measure that answers are chosen by is marked."""
    names = next(found["measures"] for found in summary["methods"] if "failure" not in found)
    return ("method", *(f"{name}*" if name == summary["configured"] else name for name in names))


def measure_differences(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Every measure's paired difference to the base model as text, a row a method; the base model's own level in its row."""
    rows = []
    for found in summary["methods"]:
        if "failure" in found:
            continue
        which = "base" if found["name"] == "base" else "difference"
        cells = (MEASURES[name].figure(one["micro"], which) for name, one in found["measures"].items())
        rows.append((_named(found), *cells))
    return rows


HELD_OUT_HEADER = ("method", "trained tasks", "held-out tasks", "CTGI")


def held_out_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What each method gives to trained and to held-out tasks, by the accuracy of the table; no rows where none are held out."""
    measure = summary["configured"]
    return [
        (
            _named(found),
            *(
                gain_text(measure, found["held_out"]["ctgi"][measure], f"{which}_gain")
                for which in ("trained", "held_out")
            ),
            ctgi_cell(found["held_out"]["ctgi"][measure]),
        )
        for found in summary["methods"]
        if found.get("held_out") and found["name"] != "base"
    ]


def _named(found: Mapping[str, Any]) -> str:
    return found["name"] + (_SEES_LABELS if found["sees_labels"] else "")


def result_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Accuracies as text, a row a method, failed ones too."""
    rows = []
    for found in summary["methods"]:
        if "failure" in found:
            rows.append((found["name"], "failed", *[""] * (len(result_header(summary)) - 2)))
            continue
        base = found["name"] == "base"
        deviation = found["seed_deviation"]
        rows.append(
            (
                _named(found),
                with_error(found["accuracy"], found["stderr"]),
                "" if base else figure(found, "difference"),
                "" if base else p_value(found["first_seed"]["mcnemar_p"]),
                "" if deviation is None else f"{100 * deviation:.2f} ({found['seeds']})",
            )
        )
    return rows


def cost_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What each method costs as text, a row a method (Figure 5)."""
    return [
        (
            _named(found),
            found["chosen"] or "" if found["learning_rate"] is None else f"{found['learning_rate']:g}",
            f"{found['trained_parameters']:,}",
            f"{found['train_seconds']:.1f}",
            f"{found['flops_per_question'] / 1e6:,.1f}",
            f"{found['questions_per_second']:,.0f}",
        )
        for found in summary["methods"]
        if "failure" not in found
    ]


def budget_line(summary: Mapping[str, Any]) -> str:
    """What all methods that train have in common."""
    budget = summary["budget"]
    rates = ", ".join(f"{rate:g}" for rate in budget["learning_rates"])
    return (
        f"equal budgets: {budget['epochs']} epochs over the same {budget['training_questions']:,} training questions in batches of "
        f"{budget['batch_size']}; learning rate chosen on {budget['validation_questions']:,} validation questions from {rates}"
    )
