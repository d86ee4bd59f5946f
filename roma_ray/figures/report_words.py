"""What the figures say, in sentences that are derived from them: a gain only where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from shlex import quote
from typing import Any

from roma_ray.borders.text import figure
from roma_ray.config.finetune_settings import GuardConfig, RegularizerConfig
from roma_ray.engine.objective import is_idle, is_noise
from roma_ray.evaluation.statistics import SIGNIFICANCE, holm, p_value, significant
from roma_ray.evaluation.transfer import transfer_words
from roma_ray.moe.reach import is_unreached
from roma_ray.stages.run_summary import warnings_of
from roma_ray.stages.task_loss_alone import added_words

AUXILIARY = (
    "Auxiliary loss: 0. The load-balancing loss that mixture-of-experts models are pretrained with is not added to the objective: the "
    "routers follow the task loss and the regularizer alone, and nothing keeps the load on the experts even. So the load is watched."
)


@dataclass(frozen=True)
class Verdict:
    """The result in words. `kind`: gain, loss, none (nothing shown), void (at chance level or below)."""

    kind: str
    headline: str
    detail: str


def verdict(summary: Mapping[str, Any]) -> Verdict:
    """What the test questions say of the tuned routers."""
    figures = summary["splits"]["test"]["all"]
    p = figures["mcnemar_p"]
    detail = (
        f"On {figures['n']} test questions the base model answers {figure(figures, 'base')} % rightly and the tuned one "
        f"{figure(figures, 'tuned')} %: {figure(figures, 'difference')} percentage points (standard errors). Answers won: "
        f"{figures['won']}, lost: {figures['lost']}; McNemar's exact p is {p_value(p)}."
    )
    if summary["held_out"]:
        detail += f" {transfer_words(summary['held_out'])}"
    if summary["task_loss_alone"]:
        detail += f" {added_words(summary['task_loss_alone'])}"
    both, guards = {"base/all", "tuned/all"}, summary["guards"]
    if both <= set(guards["below_chance"]):
        return Verdict(
            "void",
            "Nothing can be concluded: both models are below chance level, which points at the prompt.",
            f"{detail} A model that prefers wrong answers misreads how it is asked: try another questions.prompt.format, and "
            "look at the answer key.",
        )
    if both <= {*guards["at_chance"], *guards["below_chance"]}:
        return Verdict(
            "void",
            "Nothing can be concluded: both models are at chance level.",
            f"{detail} A comparison of two models that guess says nothing about the method.",
        )
    if not significant(p):
        return Verdict(
            "none", "No significant difference between tuned and base routers.", f"{detail} No gain or loss is shown."
        )
    if figures["difference"] > 0:
        return Verdict("gain", "The tuned routers answer significantly more questions rightly.", detail)
    return Verdict("loss", "The tuned routers answer significantly fewer questions rightly.", detail)


def by_task(summary: Mapping[str, Any]) -> str:
    """How many tasks changed significantly after Holm's correction; empty for a single task."""
    tasks = {name: f for name, f in summary["splits"]["test"].items() if name != "all"}
    if len(tasks) < 2:
        return ""
    corrected = holm({name: figures["mcnemar_p"] for name, figures in tasks.items()})
    changed = [name for name, p in corrected.items() if significant(p)]
    better = sorted(name for name in changed if tasks[name]["difference"] > 0)
    worse = sorted(set(changed) - set(better))
    if not changed:
        return (
            f"None of the {len(tasks)} tasks changed significantly on its own (Holm's correction, {SIGNIFICANCE:.0%})."
        )
    parts = [f"{label}: {', '.join(names)}" for label, names in (("better", better), ("worse", worse)) if names]
    return f"Tasks that changed significantly (Holm's correction for {len(tasks)} tasks, {SIGNIFICANCE:.0%}): {'; '.join(parts)}."


def notes(summary: Mapping[str, Any], regularizer: RegularizerConfig) -> list[str]:
    """What a reader must know before using the result."""
    lines = warnings_of(summary)
    probe = summary["probe"]
    if is_unreached(probe):
        lines.append(
            "the task loss does not reach these routers (one expert a token, its weight scaled to 1): its gradient is rounding noise, "
            f"{probe['task_gradient']:.1g} against {probe['regularizer_gradient']:.2g}. So the task term was left out and the "
            "regularizer alone moved them"
        )
    if is_noise(probe, regularizer):
        lines.append(
            f"the regularizer's gradient began as rounding noise ({probe['regularizer_gradient']:.1g} against the task term's "
            f"{probe['task_gradient']:.2g}): the task term moved the routers first; at the end the ratio was "
            f"{probe['final_gradient_ratio']:.2%}"
        )
    if is_idle(probe, regularizer):
        lines.append(
            f"the regularizer was idle: its gradient on the gates was {probe['gradient_ratio']:.2%} of the task term's at the start, "
            "so this run says little about it"
        )
    before, after = (summary["diagnostics"][key]["task_silhouette"] for key in ("base", "tuned"))
    if before is not None and after is not None and after < before:
        lines.append(
            f"tasks lie less apart in routing space than before (silhouette {before:+.3f} to {after:+.3f}): the manifold was not aligned"
        )
    lines.append(
        "one training seed: the standard errors are those of the questions drawn, not of the training's own randomness"
    )
    return lines


def guard_words(summary: Mapping[str, Any], guard: GuardConfig) -> str:
    """What watched the routing of each epoch, and what it found."""
    if not any("routing" in epoch for epoch in summary["epochs"]):
        return "The routing of the epochs was not measured: an earlier version trained these routers."
    if guard.action == "none":
        return "Nothing was judged by thresholds (finetune.guard.action: none)."
    if not summary["collapse"]:
        return f"No epoch was past a threshold of the guard (finetune.guard.action: {guard.action})."
    return f"The guard (finetune.guard.action: {guard.action}): {'; '.join(summary['collapse'])}."


def next_commands(summary: Mapping[str, Any], storage: str, config: str) -> list[tuple[str, str]]:
    """What can be done with the result, and the command that does it with this run's own paths."""
    adapter, place = quote(f"{summary['paths']['finetune']}/adapter"), quote(storage)
    run, base = summary["fingerprints"]["evaluate"], f"{summary['fingerprints']['evaluate']}:base"
    return [
        ("What the adapter holds, and how far each layer moved", f"roma-ray inspect {adapter}"),
        ("A whole model for vLLM or lm-eval", f"roma-ray export {adapter} tuned-model --format merged"),
        (
            "Benchmarks, base and tuned (name the tasks that you want)",
            f"roma-ray evaluate --tasks arc_easy,piqa --config {quote(config)} --storage {place}",
        ),
        (
            "This run beside its base; add the runs that you want to compare",
            f"roma-ray compare {base} {run} --storage {place}",
        ),
        (
            "Where its stages lie and what they take",
            f"roma-ray show {summary['fingerprints']['evaluate']} --storage {place}",
        ),
    ]


def safety(summary: Mapping[str, Any]) -> str:
    """What was risked for the result: answers lost, and how far the routing moved."""
    figures, found = summary["splits"]["test"]["all"], summary["diagnostics"]
    right = round(figures["base_accuracy"] * figures["n"])
    share = f" ({figures['lost'] / right:.1%} of {right})" if right else ""
    kept, moved = found["selection_overlap"], found["routing_kl"]
    return (
        f"Test answers that the base model had right and tuning lost: {figures['lost']}{share}; won: {figures['won']}. "
        f"The last prompt token keeps {min(kept):.1%} to {max(kept):.1%} of its experts, by layer; KL to the base routing is "
        f"at most {max(moved):.3g} nats. Only these questions were measured: other uses of the model (long text, other "
        "languages, safety behaviour) were not."
    )
