"""Four measures of the same answers, from the stored log-likelihoods of each question's choices; paired, by task and together.

acc           share answered rightly by the highest log-likelihood
acc_norm      the same by the log-likelihood per character of the choice
gold_logp     the right answer's log-likelihood, in nats a token of its continuation
choice_logp   the right answer's log-probability among the choices, in nats: log-softmax of the scores that the configured
              rule compares

One of the first two is what the run's answers are chosen by (`prompt.cloze_score`). The last two move with every question, not
only with those whose answer changes, so they tell models apart where accuracy cannot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from roma_ray.evaluation.statistics import Paired, macro, p_value, pair, with_error
from roma_ray.questions.prompts import Prompt, rule_scores

RULES = {"raw": "acc", "normalized": "acc_norm"}
"""The measure of each rule by which an answer is chosen; lm-evaluation-harness's names."""


_HUGE = 1e6
"""From here on digits after the point say nothing: the perplexity of a text that a model cannot read at all."""


@dataclass(frozen=True)
class Measure:
    """How a measure is named and written."""

    title: str
    unit: str
    scale: float
    digits: int
    finer: int
    """Digits of a difference."""

    def figure(self, record: Mapping[str, Any], name: str) -> str:
        """A record's figure with the error beside it."""
        return self.text(record[name], record[f"{name}_stderr"], signed=name == "difference")

    def text(self, value: float, error: float | None, *, signed: bool = False) -> str:
        """A figure of this measure with its error; a `signed` one is a difference."""
        if abs(self.scale * value) >= _HUGE:
            shown = f"{self.scale * value:{'+' if signed else ''}.3g}"
            return shown if error is None else f"{shown} ± {self.scale * error:.2g}"
        return with_error(value, error, scale=self.scale, digits=self.finer if signed else self.digits, signed=signed)


MEASURES: Mapping[str, Measure] = {
    "acc": Measure("accuracy by log-likelihood", "%", 100.0, 2, 2),
    "acc_norm": Measure("accuracy by log-likelihood per character", "%", 100.0, 2, 2),
    "gold_logp": Measure("right answer's log-likelihood", "nats a token", 1.0, 3, 4),
    "choice_logp": Measure("right answer's log-probability among the choices", "nats", 1.0, 3, 4),
}
FREE_MEASURES: Mapping[str, Measure] = {
    "exact_match": Measure("written answers that match exactly, normalised", "%", 100.0, 2, 2),
    "f1": Measure("F1 of the written answer's words", "%", 100.0, 2, 2),
    "contains": Measure("written answers that contain the right one", "%", 100.0, 2, 2),
    "numeric": Measure("written answers with the right number", "%", 100.0, 2, 2),
    "bleu": Measure("sentence BLEU of the written answer", "of 100", 1.0, 2, 2),
    "rouge_l": Measure("ROUGE-L of the written answer", "%", 100.0, 2, 2),
    "greedy": Measure("answers that greedy decoding writes token for token", "%", 100.0, 2, 2),
    "likelihood": Measure("answers whose log-likelihood a token reaches the threshold", "%", 100.0, 2, 2),
}


@dataclass(frozen=True)
class Asked:
    """What the measures need to know of some questions beside the scores, in their order."""

    tasks: Sequence[str]
    answers: Sequence[int]
    tokens: Sequence[Sequence[int]]
    """Of each choice's continuation."""
    chars: Sequence[Sequence[int]]
    """Of each choice's text."""
    rule: str
    """`raw` or `normalized`."""

    @classmethod
    def of(cls, prompts: Sequence[Prompt], rule: str, *, letter: bool) -> Asked:
        """What the measures need of encoded questions; a `letter` prompt's choices are its letters, one character each."""
        chars = [[1] * len(p.choice_chars) if letter else list(p.choice_chars) for p in prompts]
        tokens = [[len(ids) for ids in p.choice_ids] for p in prompts]
        return cls([p.task for p in prompts], [p.answer for p in prompts], tokens, chars, rule)

    @property
    def coincide(self) -> bool:
        """Whether both rules must choose the same: no question's choices differ in length (letters, say)."""
        return all(len(set(chars)) <= 1 for chars in self.chars)

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures that differ on these questions, in their order."""
        left_out = next(name for rule, name in RULES.items() if rule != self.rule) if self.coincide else None
        return tuple(name for name in MEASURES if name != left_out)


def measure(scores: Sequence[Sequence[float]], asked: Asked) -> dict[str, np.ndarray]:
    """Each measure's value of every question, [N] fp64, from one model's `scores`."""
    values: dict[str, list[float]] = {name: [] for name in asked.measures}
    for own, gold, tokens, chars in zip(scores, asked.answers, asked.tokens, asked.chars, strict=True):
        for rule, name in RULES.items():
            if name in values:
                # The first of equals, as everywhere.
                values[name].append(float(int(rule_scores(own, chars, rule).argmax()) == gold))
        values["gold_logp"].append(own[gold] / tokens[gold])
        values["choice_logp"].append(float(log_softmax(rule_scores(own, chars, asked.rule))[gold]))
    return {name: np.array(found) for name, found in values.items()}


def log_softmax(values: np.ndarray) -> np.ndarray:
    """Log-probabilities of a question's choices."""
    shifted = values - values.max()
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return result


@dataclass(frozen=True)
class ByTask:
    """A measure's paired figures: over all questions, over the tasks with equal weight, and of each task."""

    micro: Paired
    macro: Paired | None
    """None for fewer than two tasks."""
    tasks: Mapping[str, Paired]

    def plain(self) -> dict[str, Any]:
        """As data: {micro, macro, tasks: {task: figures}}."""
        return {
            "micro": self.micro.plain(),
            "macro": self.macro.plain() if self.macro else None,
            "tasks": {name: found.plain() for name, found in self.tasks.items()},
        }


def pair_by_task(base: np.ndarray, tuned: np.ndarray, tasks: Sequence[str]) -> ByTask:
    """Paired figures of one measure's values, question by question in one order."""
    names = np.asarray(tasks)
    found = {str(name): pair(base[names == name], tuned[names == name]) for name in sorted(set(tasks))}
    return ByTask(pair(base, tuned), macro(found.values()), found)


def pair_measures(
    base: Mapping[str, np.ndarray], tuned: Mapping[str, np.ndarray], tasks: Sequence[str]
) -> dict[str, ByTask]:
    """Every measure that both have, paired."""
    return {name: pair_by_task(base[name], tuned[name], tasks) for name in base if name in tuned}


HEADER = ("measure", "base", "tuned", "difference", "p")
LEGEND = (
    "acc, acc_norm: accuracy in percent by log-likelihood and by log-likelihood per character; gold_logp: the right answer's "
    "log-likelihood, nats a token; choice_logp: its log-probability among the choices, nats. *: the answers are chosen by it. "
    "Standard errors over questions, differences paired; macro: mean of the tasks; p: McNemar's exact test, of logp a t-test."
)


FREE_LEGEND = (
    "Of what greedy decoding writes, in percent: exact_match, f1, contains, numeric, rouge_l; bleu of 100. In percent too, greedy: "
    "answers of which each token is the likeliest; likelihood: answers whose log-likelihood a token reaches "
    "extraction.success.threshold. gold_logp: the answer's log-likelihood, nats a token. *: the answers are judged by it. Standard "
    "errors over questions, differences paired; macro: mean of the tasks; p: McNemar's exact test, of other values a t-test."
)


def legend_of(summary: Mapping[str, Any]) -> list[str]:
    """The lines below a run's table of measures: of free-form questions with the perplexity of their answers."""
    free = summary.get("free")
    if free is None:
        return [line for line in (LEGEND, coincidence(summary["measures"])) if line]
    base, tuned = (free["perplexity"][which] for which in ("base", "tuned"))
    told = f"Perplexity of the answers' {free['tokens']:,} tokens: base {base:.4g}, tuned {tuned:.4g}."
    if written := free.get("written"):
        cut = (f"{which} {written[which]['length']:,}" for which in ("base", "tuned"))
        told += f" Written answers that were cut at extraction.success.max_new_tokens: {', '.join(cut)}."
    return [FREE_LEGEND, told]


def measure_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """`measures` of a summary as text under `HEADER`: each over all questions, then over tasks with equal weight."""
    rows: list[tuple[str, ...]] = []
    for name, figures in found["figures"].items():
        mark = "*" if name == found["configured"] else ""
        rows.append((f"{name}{mark}", *figure_cells(name, figures["micro"])))
        if figures["macro"] is not None:
            rows.append(("  macro", *figure_cells(name, figures["macro"])))
    return rows


_PLAIN = Measure("lm-eval's own scale", "", 1.0, 3, 4)
_OTHER_FORMS = {
    **dict.fromkeys(("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"), _PLAIN),
    **dict.fromkeys(("bleu", "chrf", "chrf++", "ter"), Measure("of 100", "", 1.0, 2, 2)),
}


def form_of(metric: str) -> Measure:
    """How a metric, with or without its filter, is written; lm-eval's other ones are shares, as accuracy is."""
    name = metric.partition(",")[0]
    return MEASURES.get(name) or FREE_MEASURES.get(name) or _OTHER_FORMS.get(name, MEASURES["acc"])


def figure_cells(name: str, figures: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Base, tuned, difference and p of one record as text."""
    form = form_of(name)
    p = figures["t_p"] if figures["mcnemar_p"] is None else figures["mcnemar_p"]
    base, tuned, difference = (form.figure(figures, which) for which in ("base", "tuned", "difference"))
    return base, tuned, difference, "" if p is None else p_value(p)


def coincidence(found: Mapping[str, Any]) -> str:
    """Why one of the two accuracies is not shown, where that is so."""
    if not found["coincide"]:
        return ""
    return "no question's choices differ in length (letters do not), so acc and acc_norm are the same and stand once"
