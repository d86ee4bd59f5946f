"""lm-evaluation-harness as the one judge: its tasks, prompts and metrics; our sharded answers; base and tuned side by side.

A finished evaluation is a folder `benchmarks/<fingerprint>/`: `lm_eval_base.json` and `lm_eval_tuned.json` (lm-eval's own
results), `metrics.parquet` (one value of one metric of one question a row, so that acc and acc_norm never mix; of
multiple choice also gold_logp and choice_logp of `measures`, by the plain log-likelihoods),
`responses.parquet` (what each model answered) and `evaluation.json` (`read_benchmarks` documents its keys).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from roma_ray.benchmarks.aggregated import RESAMPLES, aggregated_figures
from roma_ray.benchmarks.benchmark_values import measured
from roma_ray.benchmarks.cost import cost_of
from roma_ray.benchmarks.findings import findings
from roma_ray.benchmarks.judged_model import Subject
from roma_ray.benchmarks.requests import answer
from roma_ray.config.schema import Config
from roma_ray.engine.identity import refuse_free_form
from roma_ray.engine.progress import Progress
from roma_ray.engine.question_table import write_table
from roma_ray.engine.steps import Facts, make
from roma_ray.engine.tokenizer import load_tokenizer
from roma_ray.engine.work import Executor
from roma_ray.errors import ConfigError
from roma_ray.evaluation.benchmark_results import METRIC_COLUMNS, METRICS, RESPONSE_COLUMNS, RESPONSES, SUMMARY
from roma_ray.evaluation.statistics import pair, summarise_values
from roma_ray.questions.prompts import PromptBuilder
from roma_ray.store.artifacts import Stage, Store, fingerprint, write_json
from roma_ray.versions import library_versions

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

VERSION = 3
# lm-eval's own default, for examples drawn at random.
_FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class Wanted:
    """What is to be judged."""

    tasks: tuple[str, ...]
    """lm-eval's names, `.yaml` task files, question files."""
    data_dir: str | None = None
    num_fewshot: int | None = None
    """None: what each task says."""
    limit: int | None = None
    """At most this many questions of each task."""
    chat_template: bool = False
    allow_code: bool = False
    """Let task files of the user's own, and stock tasks marked unsafe, execute code."""


def judge(
    config: Config,
    subject: Subject,
    wanted: Wanted,
    store: Store,
    execute: Executor,
    progress: Progress,
    training: Sequence[tuple[str, Sequence[str]]] | None = None,
) -> Stage:
    """Judge the subject, base and tuned, on the wanted tasks; what is there already is not computed again.

    `training`: texts and choices of the questions that the tuned model was trained on, to be looked for in the benchmarks;
    None where that is not known.
    Raises ConfigError, QuestionError, ModelError, CheckpointError, GuardError, StorageError, WorkerError; ArtifactError where
    what is there is damaged.
    """
    from roma_ray.benchmarks.language_model import JudgeLM
    from roma_ray.benchmarks.tasks import leaves, load_tasks

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    started = time.monotonic()

    def builder() -> PromptBuilder:
        refuse_free_form(config, "a question file as a benchmark's task")
        tokenizer = load_tokenizer(subject.model.path, subject.model.revision)
        return PromptBuilder(tokenizer, config.questions.prompt)

    tasks = load_tasks(wanted.tasks, data_dir=wanted.data_dir, builder=builder, allow_code=wanted.allow_code)
    single = leaves(tasks)
    configure(single, wanted)
    lm = JudgeLM(subject, lambda kind, asked: answer(kind, asked, subject, store, execute, progress))
    results = {}
    for name in subject.names:
        lm.which, lm.truncated = name, 0
        results[name] = run_lm_eval(lm, tasks, wanted)
    aggregated = aggregated_figures(results, single)
    pins = {name: pin_of(single[name], samples) for name, samples in results["base"]["samples"].items()}
    known = None if training is None else fingerprint([[text, list(choices)] for text, choices in training])
    settings: dict[str, Any] = {"pins": pins, "limit": wanted.limit, "training": known}
    if aggregated:
        # Figures of theirs came after storages were filled: older evaluations without them are others.
        settings["aggregated"] = 1
    inputs = {f"requests{n}": a.stage.fingerprint for n, a in enumerate(lm.answered)}
    stage = store.stage("benchmarks", settings, inputs, VERSION)

    def write() -> Facts:
        for name, found in results.items():
            write_json(stage.path / f"lm_eval_{name}.json", published(found, subject, wanted))
        rows = metric_rows(results, single, lm.tokens)
        write_table(stage.path / METRICS, rows, METRIC_COLUMNS)
        write_table(stage.path / RESPONSES, response_rows(results), RESPONSE_COLUMNS)
        summary = {
            "model": model_facts(config, subject),
            "tasks": task_figures(rows, single, pins, results, aggregated),
            "groups": group_figures(rows, members_of(tasks), pins, paired="tuned" in results),
            "guards": findings(subject, single, results, lm.truncated, training),
            "cost": cost_of(subject, lm.answered, sum(len(s) for s in _by_doc(results["base"]))),
            "versions": library_versions(),
        }
        write_json(stage.path / SUMMARY, summary)
        return {"tasks": sorted(single), "pins": pins}

    return make(stage, write, verify=True, since=started)


def model_facts(config: Config, subject: Subject) -> dict[str, Any]:
    """Which model was judged."""
    return {
        "path": config.model.path,
        "identity": subject.model_identity,
        "dtype": subject.model.dtype,
        "adapter": subject.adapter,
        "adapter_identity": subject.adapter_identity,
        "layers": list(subject.layers),
    }


def configure(tasks: Mapping[str, Task], wanted: Wanted) -> None:
    """Set few-shot counts and seeds as lm-eval's own command does. Raises ConfigError where examples are missing."""
    from roma_ray.benchmarks.tasks import has_examples

    for name, task in tasks.items():
        own = task.get_config("num_fewshot")
        # A task that says 0 itself keeps it.
        if wanted.num_fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=wanted.num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        shots = task.get_config("num_fewshot")
        if shots and not has_examples(task):
            split = task.get_config("fewshot_split") or task.get_config("training_split") or "train"
            raise ConfigError(
                f"{name} shows {shots} examples, but its {split} split has none: add its file to --data-dir, or use "
                "--num-fewshot 0 (another score than the usual one)"
            )


def run_lm_eval(lm: Any, tasks: Sequence[Task | Group], wanted: Wanted) -> dict[str, Any]:
    """lm-eval's results, with its samples, for one of the judged models. Raises ConfigError."""
    import random

    import numpy as np
    from jinja2 import TemplateError
    from lm_eval.api.group import Group
    from lm_eval.evaluator import evaluate

    groups = {g.name: g for item in tasks if isinstance(item, Group) for g in [item, *item.get_all_groups()]}
    single = {t.task_name: t for item in tasks for t in (item.get_all_tasks() if isinstance(item, Group) else [item])}
    # As lm-eval's own command seeds them.
    random.seed(0)
    np.random.seed(_FEWSHOT_SEED)
    try:
        found = evaluate(
            lm,
            {"tasks": single, "groups": groups},
            limit=wanted.limit,
            apply_chat_template=wanted.chat_template,
            fewshot_as_multiturn=wanted.chat_template,
            confirm_run_unsafe_code=wanted.allow_code,
            # Of texts its own errors are drawn so often as ours; as it would by itself they take minutes.
            **({"bootstrap_iters": RESAMPLES} if any(map(_rolling, single.values())) else {}),
        )
    except TemplateError as error:
        raise ConfigError(f"a template of the tasks or of the model's chat cannot be rendered: {error}") from None
    except ValueError as error:
        if "unsafe" in str(error):
            raise ConfigError(f"{error}. If you trust it, allow it with --allow-code.") from None
        raise
    result: dict[str, Any] = dict(found)
    return result


def _rolling(task: Task) -> bool:
    return bool(task.get_config("output_type") == "loglikelihood_rolling")


def published(found: Mapping[str, Any], subject: Subject, wanted: Wanted) -> dict[str, Any]:
    """lm-eval's results as it writes them, without the samples and without what differs between equal runs."""
    from lm_eval import __version__
    from lm_eval.utils import handle_non_serializable

    kept = {key: value for key, value in found.items() if key != "samples"}
    kept["config"] = {
        "model": "roma-ray",
        "model_args": {"pretrained": subject.model.path, "peft": subject.adapter, "dtype": subject.model.dtype},
        "limit": wanted.limit,
        "fewshot_seed": _FEWSHOT_SEED,
        "apply_chat_template": wanted.chat_template,
    }
    kept["lm_eval_version"] = __version__
    for config in kept["configs"].values():
        # A question file's rows are in the table of answers already; they would make this file huge.
        if isinstance(config.get("dataset_kwargs"), dict):
            config["dataset_kwargs"] = {k: v for k, v in config["dataset_kwargs"].items() if k != "rows"}
    cleaned: dict[str, Any] = _finite(json.loads(json.dumps(kept, default=handle_non_serializable)))
    return cleaned


def _finite(value: Any) -> Any:
    """Plain data with null for what is no number, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def members_of(tasks: Sequence[Task | Group]) -> dict[str, list[str]]:
    """The single tasks of each group that was asked for."""
    from lm_eval.api.group import Group

    return {item.name: [t.task_name for t in item.get_all_tasks()] for item in tasks if isinstance(item, Group)}


def pin_of(task: Task, samples: Sequence[Mapping[str, Any]]) -> str:
    """Hash of a task's rows, prompts, metrics and version: scores with different pins are not comparable."""
    rows = sorted({(s["doc_id"], s["doc_hash"], s["target_hash"], _arguments(s)) for s in samples})
    metrics = sorted({(s["filter"], metric) for s in samples for metric in s["metrics"]})
    return fingerprint({"task": task.task_name, "version": str(task.VERSION), "rows": rows, "metrics": metrics})


def _arguments(sample: Mapping[str, Any]) -> str:
    return json.dumps(sample["arguments"], sort_keys=True, default=str)


def _by_doc(result: Mapping[str, Any]) -> list[set[int]]:
    return [{s["doc_id"] for s in samples} for samples in result["samples"].values()]


def metric_rows(
    results: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Task], tokens: Mapping[tuple[str, str], int]
) -> dict[str, list[Any]]:
    """One value a row, of every metric that is a number for each question, and of its right choice's log-likelihood.

    `tokens`: those of each continuation, by (context, continuation).
    """
    rows: dict[str, list[Any]] = {name: [] for name in METRIC_COLUMNS.names}
    for task, samples in results["base"]["samples"].items():
        others = results["tuned"]["samples"][task] if "tuned" in results else [None] * len(samples)
        for sample, other in zip(samples, others, strict=True):
            tuned = None if other is None else measured(other, tasks[task], tokens)
            for metric, value in measured(sample, tasks[task], tokens).items():
                rows["task"].append(task)
                rows["doc"].append(sample["doc_id"])
                rows["filter"].append(sample["filter"])
                rows["metric"].append(metric)
                rows["base"].append(value)
                rows["tuned"].append(None if tuned is None else tuned.get(metric))
    return rows


def response_rows(results: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """What the models answered to each question: choices' log-likelihoods, or a text."""
    rows: dict[str, list[Any]] = {name: [] for name in RESPONSE_COLUMNS.names}
    for task, samples in results["base"]["samples"].items():
        seen: set[int] = set()
        others = results["tuned"]["samples"][task] if "tuned" in results else [None] * len(samples)
        for sample, other in zip(samples, others, strict=True):
            if sample["doc_id"] in seen:
                continue
            seen.add(sample["doc_id"])
            doc = sample["doc"]
            rows["task"].append(task)
            rows["doc"].append(sample["doc_id"])
            rows["id"].append(str(doc.get("id", "")) if isinstance(doc, Mapping) else "")
            rows["target"].append(str(sample["target"]))
            rows["base"].append(_responses(sample))
            rows["tuned"].append(None if other is None else _responses(other))
    return rows


def _responses(sample: Mapping[str, Any]) -> list[str]:
    """Every response as text: a log-likelihood with all its digits, or what was written."""
    flat = [one for repeats in sample["resps"] for one in repeats]
    return [repr(one[0]) if isinstance(one, tuple) else str(one) for one in flat]


def task_figures(
    rows: Mapping[str, Sequence[Any]],
    tasks: Mapping[str, Task],
    pins: Mapping[str, str],
    results: Mapping[str, Mapping[str, Any]],
    aggregated: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """{task: {pin, version, num_fewshot, metrics: {"metric,filter": figures}}}; with a tuned model the figures are paired."""
    figures: dict[str, Any] = {
        name: {
            "pin": pins[name],
            "version": results["base"]["versions"].get(name),
            "num_fewshot": task.get_config("num_fewshot"),
            "metrics": dict(aggregated.get(name, {})),
        }
        for name, task in tasks.items()
    }
    for (name, metric), (base, tuned) in _values(rows, {}).items():
        figures[name]["metrics"][metric] = _figures(base, tuned, paired="tuned" in results)
    return figures


def group_figures(
    rows: Mapping[str, Sequence[Any]], members: Mapping[str, Sequence[str]], pins: Mapping[str, str], *, paired: bool
) -> dict[str, Any]:
    """{group: {pin, tasks, metrics}}, over all questions of its tasks: as lm-eval weighs tasks by their size."""
    figures: dict[str, Any] = {
        name: {"pin": fingerprint({t: pins[t] for t in tasks}), "tasks": list(tasks), "metrics": {}}
        for name, tasks in members.items()
    }
    group_of = {task: name for name, tasks in members.items() for task in tasks}
    for (name, metric), (base, tuned) in _values(rows, group_of).items():
        if name in figures:
            figures[name]["metrics"][metric] = _figures(base, tuned, paired=paired)
    return figures


def _values(
    rows: Mapping[str, Sequence[Any]], group_of: Mapping[str, str]
) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """Base and tuned values by (task or its group, "metric,filter")."""
    values: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    columns = (rows[name] for name in ("task", "filter", "metric", "base", "tuned"))
    for task, key, metric, base, tuned in zip(*columns, strict=True):
        pair = values.setdefault((group_of.get(task, task), f"{metric},{key}"), ([], []))
        pair[0].append(base)
        pair[1].append(tuned)
    return values


def _figures(base: Sequence[float], tuned: Sequence[float], *, paired: bool) -> dict[str, Any]:
    return pair(base, tuned).plain() if paired else summarise_values(base)
