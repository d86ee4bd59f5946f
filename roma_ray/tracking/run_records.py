"""What a tracker is told of a run, read from its artifacts: parameters, metrics, inputs, files."""

from __future__ import annotations

import calendar
import contextlib
import getpass
import hashlib
import json
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from roma_ray.config.schema import Config
from roma_ray.engine.collapse import FIGURES
from roma_ray.engine.question_table import read_table
from roma_ray.engine.setup import Setup
from roma_ray.engine.steps import order
from roma_ray.figures.escaping import markdown
from roma_ray.figures.run_report import REPORT
from roma_ray.stages.embedding import VECTORS
from roma_ray.stages.finetuning import EPOCHS, STEPS, live_epochs
from roma_ray.stages.paired_evaluation import read_evaluation
from roma_ray.stages.run_summary import result_rows
from roma_ray.store.artifacts import Stage, fingerprint
from roma_ray.store.logs import whole_lines
from roma_ray.tracking.backend import COMMIT, USER, Input, MetricValue

# Settings that may differ between two runs of one identity: where things are kept and shown.
_NO_PARAMETERS = {"name", "storage", "tracking"}
_LONGEST_PARAMETER = 6000
_STEPS = {step.name: step for step in order(REPORT)}


def parameters(config: Config) -> dict[str, str]:
    """The resolved configuration, flat: `finetune.regularizer.weight`."""
    data = {k: v for k, v in config.model_dump(mode="json").items() if k not in _NO_PARAMETERS}
    return {key: str(value)[:_LONGEST_PARAMETER] for key, value in flat(data, ".")}


def stage_parameters(stage: Stage) -> dict[str, str]:
    """The settings that identify a stage, flat."""
    return {key: str(value)[:_LONGEST_PARAMETER] for key, value in flat(stage.identity.get("settings", {}), ".")}


def flat(value: Any, joint: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested data with their joined keys; long lists of plain values stay whole."""
    if isinstance(value, Mapping) and (value or not prefix):
        for key, part in value.items():
            yield from flat(part, joint, f"{prefix}{joint}{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        for number, part in enumerate(value):
            yield from flat(part, joint, f"{prefix}{joint}{number}")
    else:
        yield prefix, value


def stage_metrics(stage: Stage) -> list[MetricValue]:
    """Every metric of a stage in its present state: of a complete one its facts, of a finetuning its epochs so far."""
    found: list[MetricValue] = []
    at = finish_time(stage) if stage.complete else now()
    if stage.name == "finetune":
        found += _epoch_metrics(stage, at)
    if stage.complete:
        manifest = stage.manifest()
        facts = {**manifest["facts"], "seconds": manifest["seconds"], "starting": manifest.get("starting", {})}
        if "selected_epoch" in facts:
            facts["selected_epoch"] += 1  # as the epochs' steps here count: from 1
        numbers = [(key, v) for key, v in flat(facts, "/") if isinstance(v, int | float) and not isinstance(v, bool)]
        found += [MetricValue(metric_name(key), float(value), 0, at) for key, value in numbers]
    if stage.complete and stage.name == "finetune":
        found += _step_metrics(stage, at)
    if stage.complete and stage.name == "evaluate":
        found += [MetricValue(key, value, 0, at) for key, value in _layers(read_evaluation(stage)["diagnostics"])]
        found += accuracies(stage)
    return found


def accuracies(evaluation: Stage) -> list[MetricValue]:
    """All comparisons: by split and task (`test/all/difference`), by measure (`measures/gold_logp/micro/difference`), and of held-out
    tasks (`transfer/held-out_tasks/difference`, `transfer/ctgi/acc/value`).
    """
    at = finish_time(evaluation)
    found = read_evaluation(evaluation)
    named = [
        (f"{split}/{task_name(task)}", figures)
        for split, tasks in found["splits"].items()
        for task, figures in tasks.items()
    ]
    for name, figures in found["measures"]["figures"].items():
        named += [(f"measures/{name}/{over}", figures[over]) for over in ("micro", "macro") if figures[over]]
    named.append(("validation", found["validation"]))
    if transfer := found.get("held_out"):
        for group, one in transfer["groups"].items():
            named.append((f"transfer/{group.replace(' ', '_')}", one["accuracy"]))
        named += [(f"transfer/ctgi/{name}", one) for name, one in transfer["ctgi"].items()]
    return [
        MetricValue(f"{place}/{key}", float(number), 0, at)
        for place, figures in named
        for key, number in figures.items()
        if number is not None
    ]


def headline(evaluation: Stage) -> list[MetricValue]:
    """What a table of pipelines shows: the whole test comparison by every measure, the difference of each task, held-out tasks."""
    return [
        value
        for value in accuracies(evaluation)
        if value.key.startswith(("test/all/", "measures/", "transfer/"))
        or (value.key.startswith("test/") and value.key.endswith("/difference"))
    ]


def added(report: Stage) -> list[MetricValue]:
    """What the regularizer adds to the task loss, where that was judged (`task_loss_alone/added/difference`)."""
    return [value for value in stage_metrics(report) if value.key.startswith("task_loss_alone/")]


def _epoch_metrics(stage: Stage, at: int) -> list[MetricValue]:
    """The epochs so far, numbered from 1, at the time when each was reported."""
    records = {record["epoch"]: record for record in live_epochs(stage)}
    for line in whole_lines(stage.path / EPOCHS)[0]:
        record = json.loads(line)
        records[record["epoch"]] = {**records.get(record["epoch"], {}), **record}
    return [
        MetricValue(f"epoch/{key}", float(value), number + 1, round(1000 * record["time"]) if "time" in record else at)
        for number, record in sorted(records.items())
        for key, value in _epoch_figures(record)
    ]


def _epoch_figures(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """An epoch's figures, those by layer as `layer_11/entropy`."""
    for key, value in record.items():
        if key == "routing":
            for name in FIGURES:
                yield from ((f"layer_{n}/{name}", one) for n, one in zip(value["layers"], value[name], strict=True))
        elif key not in {"epoch", "step", "time"}:
            yield key, value


def _step_metrics(stage: Stage, at: int) -> list[MetricValue]:
    table = read_table(stage.path / STEPS).to_pydict()
    return [
        MetricValue(f"step/{key}", value, step + 1, at)
        for key, values in table.items()
        if key != "step"
        for step, value in zip(table["step"], values, strict=True)
    ]


def _layers(found: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for n, layer in enumerate(found["layers"]):
        yield f"layer_{layer}/routing_kl", found["routing_kl"][n]
        yield f"layer_{layer}/selection_overlap", found["selection_overlap"][n]
        for who in ("base", "tuned"):
            yield f"layer_{layer}/routing_entropy_{who}", found[who]["routing_entropy"][n]
            yield f"layer_{layer}/largest_load_{who}", max(found[who]["expert_load"][n])
    for who in ("base", "tuned"):
        if found[who]["task_silhouette"] is not None:
            yield f"task_silhouette_{who}", found[who]["task_silhouette"]


def metric_name(key: str) -> str:
    """A key in the characters that MLflow takes."""
    return re.sub(r"[^A-Za-z0-9_\-. /]", "_", key)


def task_name(task: str) -> str:
    """A task as part of a metric's key; names that had to change get a digest, so that no two fall together."""
    plain = re.sub(r"[^A-Za-z0-9_\-]", "_", task)[:100]
    return plain if plain == task else f"{plain}-{hashlib.sha256(task.encode()).hexdigest()[:6]}"


def inputs(setup: Setup, planned: Mapping[str, Stage], name: str) -> list[Input]:
    """The data that a run read: question files (the pipeline, `questions`), embeddings (the pipeline, `neighbors`)."""
    found = []
    questions, embeddings = planned["questions"], planned["embed"]
    if name in ("pipeline", "questions"):
        for source, identity in zip(
            setup.config.questions.sources, questions.identity["settings"]["sources"], strict=True
        ):
            origin = source.path or f"hf://datasets/{source.dataset}"
            found.append(
                Input(
                    Path(origin).name, fingerprint(identity), json.dumps({"uri": origin}), source.split or "questions"
                )
            )
    if name in ("pipeline", "neighbors") and embeddings.complete:
        digest = embeddings.manifest()["files"][VECTORS]["sha256"][:16]
        uri = str(embeddings.path / VECTORS)
        found.append(Input(VECTORS, digest, json.dumps({"uri": uri}), "task embedding"))
    return found


def files(stage: Stage) -> list[tuple[Path, str | None]]:
    """What of a complete stage is stored in MLflow (path, folder there): small files, the adapter; no activations, no model."""
    step = _STEPS.get(stage.name)
    names = [*(step.shown if step else ()), ("manifest.json", None)]
    return [(stage.path / name, folder) for name, folder in names]


def tags(setup: Setup, planned: Mapping[str, Stage]) -> dict[str, str]:
    """Facts about the whole run that are no settings."""
    found = {
        "roma.model": setup.config.model.path,
        "roma.model_revision": setup.config.model.revision or "none",
        "roma.model_identity": setup.model_identity,
        "roma.storage": str(setup.store.root),
        **{f"roma.stage.{name}": stage.fingerprint for name, stage in planned.items()},
    }
    with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
        found[USER] = getpass.getuser()
    if planned["evaluate"].complete:
        found["roma.evaluation_pin"] = planned["evaluate"].manifest()["facts"]["pin"]
    return found | git_tags()


def git_tags() -> dict[str, str]:
    """The commit of roma-ray's own source where it is a git checkout; nothing where it is an installed package."""
    package = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=5, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # A package installed inside somebody's repository would give that repository's commit.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return {}
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no", "--", ".")
    if commit is None or changes is None:
        return {}
    return {COMMIT: commit, "roma.git_changed": "yes" if changes else "no"}


def note(report: Stage, evaluation: Stage) -> str:
    """The run's description, in Markdown: the verdict and the figures behind it."""
    facts, found = report.manifest()["facts"], read_evaluation(evaluation)
    lines = [
        f"**{markdown(facts['headline'])}** {markdown(facts['detail'])}",
        "",
        "| task | n | base | tuned | difference | p |",
    ]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    lines += [
        f"| {' | '.join(map(markdown, row))} |" for row in result_rows(found["splits"]["test"], found.get("held_out"))
    ]
    return "\n".join([*lines, "", "Open report.html among the artifacts for figures and limits."])[:7900]


def now() -> int:
    """Milliseconds since 1970."""
    return round(1000 * time.time())


def finish_time(stage: Stage) -> int:
    """When a complete stage ended, in milliseconds since 1970."""
    return 1000 * calendar.timegm(time.strptime(stage.manifest()["finished"], "%Y-%m-%dT%H:%M:%SZ"))


def start_time(stage: Stage) -> int:
    """When the work on a stage began: of a complete one its end less its duration, else now."""
    return finish_time(stage) - duration(stage) if stage.complete else now()


def duration(stage: Stage) -> int:
    """How long the work on a complete stage took, in milliseconds."""
    return round(1000 * stage.manifest()["seconds"])
