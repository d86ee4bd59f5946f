"""The summary of a run as documented JSON, and its table in words.

Keys: `format` (1); `name`; `model` {path, identity, dtype, device, threads, layers, trained_parameters};
`splits` {"test": {task or "all": {n, base_accuracy, base_stderr, tuned_accuracy, tuned_stderr, difference, difference_stderr, lost,
won, mcnemar_p}}}, by the configured rule; `validation` {n, base_accuracy, base_stderr, tuned_accuracy, tuned_stderr}, the tuned
ones of the exported epoch; `measures` of the test questions {configured: the one by which answers are chosen, coincide: whether acc
and acc_norm must be equal, so that one is left out, figures {measure (`evaluation/measures.py`): {micro, macro, tasks {task}: {n,
base, base_stderr, tuned, tuned_stderr, difference, difference_stderr, lost, won, mcnemar_p, t_p}}}}; `shares` {task: {positions,
labels, shift}} (`evaluation/shares.py`); `task_loss_alone`, where the same run without regularizer was judged beside this one,
else null {alone, added, tasks {task}, choice_logp (without choices gold_logp): paired figures} (`stages/task_loss_alone.py`);
`held_out`, where tasks were held out, else null {tasks, groups, ctgi} (`evaluation/transfer.py`); `free`, of free-form questions
alone {tokens of the test questions' answers, perplexity {base, tuned} of those tokens, written {base, tuned} {by what answers ended:
how many}, where answers are written};
`epochs` (one record each, `epoch` counted from 0: task_loss, manifold_loss, lambda, learning_rate, gradient_norm,
routing_entropy, validation_accuracy, validation_stderr, of free-form questions validation_logp; `routing`, figures of the
validation questions by layer (`engine/collapse.py`); `lambda_factor`, `stopped` where the guard acted); `collapse` (what the guard
found, in sentences);
`probe` (gradient norms of both terms on the gates, whether either is noise, their ratio, lambda); `selected_epoch` (from 0);
`neighborhoods` (sizes, similarities, empties);
`diagnostics` of the test questions (routing_kl and selection_overlap by layer; for base and tuned routing_entropy and expert_load by
layer, task_silhouette, neighbor_overlap), and `manifold_distance` {train, test: {questions, neighbors, random: {base, tuned,
difference, each with stderr, relative, relative_stderr}, pull}} (`stages/routing_change.py`);
`guards`; `rejected`; `errors`; `evaluation_pin`; `fingerprints` {stage: fingerprint}; `devices` {stage: kinds of devices that
computed it}; `paths` {stage: folder}; `stage_seconds`; `starting_seconds` {stage: what of them its
start took, {`workers`, `imports`, `model`, `first_batch`, `first_step`}, as far as it had them}; `wall_seconds` (of this call:
finished stages cost nothing again); `peak_memory_bytes` (largest resident set of this process); `versions` (of libraries, here),
`other_versions` (sentences about stages that others
made). Scores in results.parquet are plain log-likelihoods; `cloze` predictions follow `cloze_score`.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from typing import Any

from roma_ray.borders.text import figure
from roma_ray.engine.collapse import collapse_notes
from roma_ray.engine.devices import mixed_devices
from roma_ray.engine.setup import Setup
from roma_ray.errors import with_addresses
from roma_ray.evaluation.guards import chance_notes
from roma_ray.evaluation.shares import shift_notes
from roma_ray.evaluation.statistics import p_value
from roma_ray.evaluation.transfer import held_out_notes, listed
from roma_ray.stages.finetuning import epochs_of
from roma_ray.stages.paired_evaluation import read_evaluation
from roma_ray.stages.task_loss_alone import ALONE, what_it_adds
from roma_ray.store.artifacts import Stage
from roma_ray.versions import library_versions


def summarise_run(setup: Setup, stages: Mapping[str, Stage], wall_seconds: float) -> dict[str, Any]:
    """The documented summary of a finished run."""
    evaluation = read_evaluation(stages["evaluate"])
    manifests = {name: stage.manifest() for name, stage in stages.items()}
    outcome, epochs = manifests["finetune"]["facts"], epochs_of(stages["finetune"])
    return {
        "format": 1,
        "name": setup.config.name,
        "model": {
            "path": setup.config.model.path,
            "identity": setup.model_identity,
            "dtype": setup.model.dtype,
            "device": setup.model.device,
            "threads": setup.model.threads,
            "layers": list(setup.layers),
            "trained_parameters": outcome["trained_parameters"],
        },
        "splits": evaluation["splits"],
        "validation": evaluation["validation"],
        "measures": evaluation["measures"],
        "shares": evaluation["shares"],
        "task_loss_alone": what_it_adds(stages[ALONE], stages["evaluate"]) if ALONE in stages else None,
        "held_out": evaluation.get("held_out"),
        **({"free": evaluation["free"]} if "free" in evaluation else {}),
        "epochs": epochs,
        "collapse": collapse_notes(epochs, outcome["selected_epoch"], setup.config.finetune.guard),
        "probe": outcome["probe"],
        "selected_epoch": outcome["selected_epoch"],
        "neighborhoods": manifests["neighbors"]["facts"],
        "diagnostics": evaluation["diagnostics"],
        "guards": evaluation["guards"],
        "rejected": manifests["questions"]["facts"]["rejected"],
        "errors": manifests["extract"]["facts"]["errors"],
        "evaluation_pin": evaluation["pin"],
        "fingerprints": {name: stage.fingerprint for name, stage in stages.items()},
        "devices": {name: manifest["devices"] for name, manifest in manifests.items()},
        "paths": {name: with_addresses(str(stage.path)) for name, stage in stages.items()},
        "stage_seconds": {name: manifest["seconds"] for name, manifest in manifests.items()},
        "starting_seconds": {name: manifest.get("starting", {}) for name, manifest in manifests.items()},
        "wall_seconds": wall_seconds,
        "peak_memory_bytes": peak_memory(),
        "versions": library_versions(),
        "other_versions": [other for stage in stages.values() if (other := stage.other_versions()) is not None],
    }


def peak_memory() -> int:
    """Largest resident set of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def result_rows(
    figures: Mapping[str, Mapping[str, Any]], held_out: Mapping[str, Any] | None = None
) -> list[tuple[str, ...]]:
    """One split's comparisons as text: task, n, base, tuned, difference, p. Accuracies in percent with standard errors."""
    return [
        (
            name,
            str(one["n"]),
            *(figure(one, which) for which in ("base", "tuned", "difference")),
            p_value(one["mcnemar_p"]),
        )
        for name, one in listed(figures, held_out)
    ]


def warnings_of(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know, in sentences."""
    guards = summary["guards"]
    lines = [*summary.get("collapse", []), *held_out_notes(summary["held_out"]), *chance_notes(guards)]
    figures = summary["splits"]["test"]["all"]
    if "free" in summary and figures["base_accuracy"] == figures["tuned_accuracy"] == 0:
        lines.append(
            f"no test answer of either model is right by `{summary['measures']['configured']}`, so its difference says nothing; "
            "gold_logp moves with every question"
        )
    if guards["too_many_truncated"]:
        lines.append(f"{guards['truncated']} prompts were shortened (over 1 %): raise questions.prompt.max_tokens")
    found = guards["test_questions_in_training"]
    if found["normalised"]:
        lines.append(
            f"{found['normalised']} test questions also occur in training ({found['exact']} letter for letter)"
        )
    if summary["rejected"]:
        lines.append(f"{summary['rejected']} rows were rejected: see {summary['paths']['questions']}/rejected.parquet")
    if summary["errors"]:
        lines.append(f"{summary['errors']} questions failed in extraction and are left out")
    for name, kinds in summary.get("devices", {}).items():
        mixed = mixed_devices(name, kinds)
        lines += [mixed] if mixed else []
    return [*lines, *summary.get("other_versions", []), *shift_notes(summary["shares"])]
