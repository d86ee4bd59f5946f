"""What `roma-ray evaluate --tasks` and `roma-ray compare` do: one call each for the judge and the comparison, and printing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from roma_ray.benchmarks.judge import Wanted, judge
from roma_ray.benchmarks.judged_model import Subject, resolve_subject
from roma_ray.cluster.ray_runners import open_place
from roma_ray.config.schema import Config
from roma_ray.engine.progress import Progress
from roma_ray.engine.question_table import TABLE, read_table
from roma_ray.engine.setup import resolve_path, save_config
from roma_ray.evaluation.benchmark_results import read_benchmarks
from roma_ray.evaluation.guards import chance_notes
from roma_ray.evaluation.measures import figure_cells, form_of
from roma_ray.evaluation.run_comparison import compare_columns, open_columns
from roma_ray.figures.comparison_page import FORMATS, render
from roma_ray.runs.pipeline import run as run_pipeline
from roma_ray.stages.finetuning import ADAPTER
from roma_ray.stages.preparation import parts_of
from roma_ray.store.artifacts import MANIFEST, Store, read_manifest, write_text
from roma_ray.store.buckets import is_object
from roma_ray.store.files import exists, is_folder
from roma_ray.terminal import open_progress, print_table, say
from roma_ray.tracking import tracked_benchmarks as tracking

LOWER_IS_BETTER = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "ter"}
Texts = list[tuple[str, list[str]]]


def evaluate_tasks(
    config: Config, address: str | None, quiet: bool, wanted: Wanted, adapter: str | None, base_only: bool
) -> Path:
    """Judge the configured model on lm-eval's tasks on Ray, print the figures; returns the evaluation's folder.

    Without `adapter` or `base_only` the tuned model is the configured run's, which is finetuned first where it is not yet.
    """
    progress = open_progress(quiet)
    with open_place(config, address, progress) as place:
        store = Store(config.storage, config.reuse)
        store.check()
        on = partial(resolve_subject, config, device=place.device, measure=place.measure)
        alone = base_only or (adapter is None and not _tunable(on(adapter=None), progress))
        training: Texts | None = None
        if not alone and adapter is None:
            run = run_pipeline(place.setup(config), progress, place.runners, "finetune")
            adapter = str(run.stages["finetune"].path / ADAPTER)
        if adapter is not None:
            training = training_texts(store, adapter)
        stage = judge(config, on(adapter=adapter), wanted, store, place.judge, progress, training)
    # For who compares it later: the run's name.
    save_config(stage, config)
    if config.tracking.enabled:
        tracking.record(config, store, stage, progress)
    return stage.path


def _tunable(subject: Subject, progress: Progress) -> bool:
    """Whether the model has routers to tune; a dense one is judged alone, and that is said."""
    if not subject.sliced:
        progress.say(f"{subject.model.path} has no routers that roma-ray tunes: it is judged alone")
    return subject.sliced


def training_texts(store: Store, adapter: str) -> Texts | None:
    """Questions that an adapter was trained on, where this storage has its run; None where that is not known."""
    place = Path(resolve_path(adapter))
    manifest = (place if is_object(place) else place.resolve()).parent / MANIFEST
    if not is_folder(place) or not exists(manifest):
        return None
    # Finetuning depends on extraction, which depends on the questions.
    inputs = read_manifest(manifest.parent)["identity"]["inputs"]
    extraction = inputs.get("extract", "")
    folder = store.root / "extract" / extraction
    if not extraction or not exists(folder / MANIFEST):
        return None
    questions = store.root / "questions" / read_manifest(folder)["identity"]["inputs"]["questions"]
    if not exists(questions / MANIFEST):
        return None
    near = store.root / "neighbors" / inputs.get("neighbors", "")
    held_out = read_manifest(near)["identity"]["settings"].get("held_out_tasks", []) if exists(near / MANIFEST) else []
    table = read_table(questions / TABLE, ["question", "choices", "task", "split"])
    rows = zip(table.to_pylist(), parts_of(table, held_out), strict=True)
    return [(row["question"], row["choices"]) for row, part in rows if part == "train"]


def print_benchmarks(folder: Path) -> None:
    """Print an evaluation's figures and what a reader must know of them."""
    found = read_benchmarks(folder)
    paired = found["model"]["adapter"] is not None
    header: tuple[str, ...] = ("benchmark", "metric", "shots", "n", "base")
    rows = []
    # Of a group that was asked for, MMLU say, the whole is shown; its tasks are in the files.
    inner = {task for group in found["groups"].values() for task in group["tasks"]}
    shown = {task: figures for task, figures in found["tasks"].items() if task not in inner} | found["groups"]
    for task, figures in shown.items():
        shots = figures.get(
            "num_fewshot", found["tasks"][figures["tasks"][0]]["num_fewshot"] if "tasks" in figures else 0
        )
        for metric, f in figures["metrics"].items():
            name = metric.removesuffix(",none")
            head = (task, name, str(shots), str(f["n"]))
            rows.append(
                (*head, *(figure_cells(name, f) if paired else [form_of(name).text(f["base"], f["base_stderr"])]))
            )
    if paired:
        header = (*header, "tuned", "difference", "p")
    print_table("lm-evaluation-harness: scores with standard errors over questions, shares in percent", header, rows)
    say(
        "gold_logp: the right choice's log-likelihood, nats a token; choice_logp: its log-probability among the choices, nats"
    )
    shown_metrics = {metric.partition(",")[0] for figures in shown.values() for metric in figures["metrics"]}
    if shown_metrics & LOWER_IS_BETTER:
        say(
            f"{', '.join(sorted(shown_metrics & LOWER_IS_BETTER))}: lower is better; errors by a bootstrap over documents, paired in "
            "differences"
        )
    for line in notes_of(found):
        say(f"note: {line}")
    speed = found["cost"]["questions_per_second"]
    if speed:
        say("questions/s: " + ", ".join(f"{name} {figure:.1f}" for name, figure in speed.items()))
    say(f"evaluation: {folder}")


def notes_of(found: dict[str, Any]) -> list[str]:
    """The guards' findings in sentences."""
    guards = found["guards"]
    lines = [*found["other_versions"], *chance_notes(guards)]
    if guards["too_many_truncated"]:
        lines.append(f"{guards['truncated']} prompts (over 1 %) were cut to the model's longest input")
    for task, hits in guards["seen_in_training"].items():
        shown = ", ".join(map(str, hits["questions"]))
        lines.append(
            f"{hits['normalised']} questions of {task} occur in the training set ({hits['exact']} letter for letter): {shown}"
        )
    if found["model"]["adapter"] is not None and not guards["training_known"]:
        lines.append(
            "what this adapter was trained on is not known here, so it was not searched for the benchmarks' questions"
        )
    return lines


def compare_runs(
    config: Config,
    names: Sequence[str],
    *,
    form: str,
    out: str | None,
    allow_different_pins: bool,
    track: bool,
) -> None:
    """Compare evaluations; print the table, or write it to `out` in the form that its suffix says."""
    store = Store(config.storage)
    columns = open_columns(names, store, lambda name: tracking.fingerprint_of(config, store, name))
    comparison = compare_columns(columns, allow_different_pins=allow_different_pins)
    if out is not None:
        suffixes = {Path(f"x.{suffix}").suffix: name for name, suffix in FORMATS.items()}
        form = suffixes[Path(out).suffix]
        write_text(out, render(comparison, form))
    if track:
        tracking.record_comparison(config, store, comparison, open_progress(quiet=False))
    say(f"written: {out}" if out is not None else render(comparison, form).removesuffix("\n"))
