"""The report stage: figures, tables, a self-contained page, the same as Markdown, and a model card, from finished stages."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from roma_ray.engine.answers import ANSWERS, read_answers, read_routing_of
from roma_ray.engine.identity import data_seed, guard_settings
from roma_ray.engine.progress import Progress
from roma_ray.engine.question_table import matrix, read_table, table_facts
from roma_ray.engine.runners import Runners
from roma_ray.engine.setup import Setup
from roma_ray.engine.steps import Facts, Step
from roma_ray.engine.work import Job
from roma_ray.evaluation.measures import HEADER, legend_of, measure_rows
from roma_ray.evaluation.method_table import describe_oracle, oracle_and_control
from roma_ray.evaluation.results_file import RESULTS
from roma_ray.evaluation.transfer import LEGEND as CTGI_LEGEND
from roma_ray.evaluation.transfer import listed
from roma_ray.figures import projection, report_tables, report_words, result_figures, routing, training_figures
from roma_ray.figures.escaping import markdown
from roma_ray.figures.style import save
from roma_ray.manifold.diagnostics import silhouette
from roma_ray.stages.embedding import read_embeddings
from roma_ray.stages.finetuning import STEPS
from roma_ray.stages.neighborhoods import PAIRS
from roma_ray.stages.paired_evaluation import EVALUATE
from roma_ray.stages.routing_change import describe_distance
from roma_ray.stages.run_summary import summarise_run
from roma_ray.store.artifacts import CONFIG, Stage
from roma_ray.store.files import local_place, write_text

VERSION = 5
PAGE, MARKDOWN, CARD = "report.html", "report.md", "model_card.md"
FIGURES, TABLES = "figures", "tables"
ORACLE = ("base", "oracle", "oracle_control")
"""The methods whose routing the maps show where `roma-ray baselines` has run them."""


@dataclass(frozen=True)
class Picture:
    """A drawn figure with what a reader needs to read it. `width`: least width on a screen, in CSS pixels."""

    name: str
    title: str
    caption: str
    svg: bytes
    width: int

    @property
    def data_uri(self) -> str:
        """The figure as part of the page itself."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode()


def report(job: Job, runners: Runners, progress: Progress) -> Facts:
    """Write the report of finished stages, with the oracle's routing where its identity names that. Raises ArtifactError,
    StorageError.
    """
    setup, stage, stages = job.setup, job.stage, job.stages
    oracle = {name: stages[name] for name in ORACLE if name in stage.identity["inputs"]}
    inputs = {name: done for name, done in stages.items() if name not in ORACLE}
    summary = summarise_run(setup, inputs, sum(done.manifest()["seconds"] for done in inputs.values()))
    with progress.meter("report", len(_CAPTIONS), "figures") as meter:
        pictures = draw(setup, inputs, summary, stage.path / FIGURES, meter.advance, oracle)
    report_tables.write_csv_files(stage.path / TABLES, summary)
    _write_texts(setup, stage, summary, pictures)
    verdict = report_words.verdict(summary)
    return {
        "figures": len(pictures),
        "verdict": verdict.kind,
        "headline": verdict.headline,
        "detail": verdict.detail,
        "task_loss_alone": summary["task_loss_alone"],
    }


REPORT = Step(
    "report",
    VERSION,
    (EVALUATE,),
    # The run's name is printed in it, and what the guard's thresholds say.
    lambda setup: {"name": setup.config.name, **guard_settings(setup.config.finetune)},
    report,
    shown=((PAGE, None), (CARD, None)),
)


def draw(
    setup: Setup,
    stages: Mapping[str, Stage],
    summary: Mapping[str, Any],
    folder: Path,
    advance: Callable[[int], None] = lambda count: None,
    oracle: Mapping[str, Stage] = MappingProxyType({}),
) -> list[Picture]:
    """Draw every figure into `folder`, in the report's order."""
    test, found, epochs = summary["splits"]["test"], summary["diagnostics"], summary["epochs"]
    base = summary["validation"]
    steps = read_table(stages["finetune"].path / STEPS).to_pydict()
    near = read_table(stages["neighbors"].path / PAIRS, ["neighbors", "similarities"])
    sizes = np.array([len(n) for n in near.column("neighbors").to_pylist()])
    similarities = near.column("similarities").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    watched = report_tables.measured(epochs)
    figures: dict[str, Callable[[], Figure]] = {
        "accuracy": lambda: result_figures.accuracy_bars(test, summary["held_out"]),
        "loss_curves": lambda: training_figures.loss_curves(steps, epochs),
        "validation_accuracy": lambda: training_figures.validation_accuracy(epochs, base, summary["selected_epoch"]),
        **({"routing_by_epoch": lambda: training_figures.routing_by_epoch(watched)} if watched else {}),
        "routing_entropy": lambda: routing.routing_entropy(found),
        "expert_load": lambda: routing.expert_load(found),
        "neighborhoods": lambda: routing.neighborhoods(summary["neighborhoods"], sizes, similarities),
        "drift": lambda: result_figures.drift(found, test["all"]),
        "task_maps": lambda: task_maps(setup, stages, found, oracle),
    }
    captions = dict(_CAPTIONS)
    if "free" in summary:
        captions["validation_accuracy"] = ("Validation log-likelihood", captions["validation_accuracy"][1])
    if oracle:
        title, caption = captions["task_maps"]
        captions["task_maps"] = (title, f"{caption} {oracle_sentence(oracle)}")
    pictures = []
    for name, make in figures.items():
        figure = make()
        pictures.append(Picture(name, *captions[name], save(figure, folder, name), round(76 * figure.get_figwidth())))
        advance(1)
    return pictures


_CAPTIONS = {
    "accuracy": (
        "Accuracy by task",
        "Test questions, both models on the same ones. Bars show one standard error of each accuracy; the comparison is "
        "paired, so judge it by the table's difference and p-value, not by whether bars overlap.",
    ),
    "loss_curves": (
        "Finetuning",
        "How well the training questions are answered (task loss, lower is better), how far their routing lies from that of their "
        "neighbors (manifold loss), how much that counts (its weight λ), and how strongly the gates are pulled. Each optimizer step "
        "(pale) and each epoch's mean.",
    ),
    "validation_accuracy": (
        "Validation accuracy",
        "Questions held out of training and of all neighborhoods. The ring marks the epoch whose routers were exported.",
    ),
    "routing_by_epoch": (
        "Routing by epoch",
        "What the guard against a collapse of the routing looks at, by tuned layer (dark to light from below): the validation "
        "questions' routing after each epoch, at the token that training reads, and the mean gradient norm on the layer's gate. A "
        "load is an expert's share of the selections.",
    ),
    "task_maps": (
        "Task embedding and routing in the plane (Figure 3 of the paper)",
        "The same test questions in each panel. Directions, distances between groups and sizes of groups mean nothing in such a "
        "map; the silhouette above each panel is measured in the whole space (1: tasks apart, 0: mixed).",
    ),
    "routing_entropy": (
        "Routing entropy",
        "How evenly the routing spreads over the experts: the mean entropy of the weights of all of them, at the last prompt token of "
        "the test questions. Zero is one expert alone; the dotted line is an even spread.",
    ),
    "expert_load": ("Expert load", "How often each expert is among the selected ones at that token."),
    "neighborhoods": (
        "Successful neighborhoods",
        "The rightly answered questions that each training question is pulled to: how similar they are, and how many, where that "
        "differs from question to question.",
    ),
    "drift": (
        "Is tuning the router safe?",
        "How far the routing moved from the base model's (Kullback-Leibler divergence, "
        "0 is not at all), how many of the selected experts stayed, and which answers changed.",
    ),
}


def oracle_sentence(oracle: Mapping[str, Stage]) -> str:
    """What the oracle reached, never without its control. Raises ArtifactError."""
    base, best, control = (read_answers(oracle[n].path / ANSWERS, "test") for n in ("base", "oracle", "oracle_control"))
    return describe_oracle(oracle_and_control(best, [control], base))


def task_maps(
    setup: Setup, stages: Mapping[str, Stage], found: Mapping[str, Any], oracle: Mapping[str, Stage]
) -> Figure:
    """The figure of the three spaces, and the oracle's where it was run, over at most 2000 test questions.

    Raises ArtifactError.
    """
    table = read_table(stages["evaluate"].path / RESULTS, ["row", "task", "split", "base_routing", "tuned_routing"])
    facts = table_facts(table)
    test = [n for n, split in enumerate(table.column("split").to_pylist()) if split == "test"]
    seed = data_seed(setup.config)
    drawn = projection.draw_rows(len(test), torch.Generator().manual_seed(seed))
    chosen = table.take([test[n] for n in drawn])
    width = facts["layers"] * facts["experts"]
    spaces = {
        "task embedding": read_embeddings(stages["embed"])[chosen.column("row").to_pylist()].numpy(),
        "routing, base": matrix(chosen, "base_routing", width),
        "routing, tuned": matrix(chosen, "tuned_routing", width),
    }
    silhouettes = {
        "task embedding": found["embedding_silhouette"],
        "routing, base": found["base"]["task_silhouette"],
        "routing, tuned": found["tuned"]["task_silhouette"],
    }
    tasks = chosen.column("task").to_pylist()
    if oracle:
        rows, routing = read_routing_of(oracle["oracle"].path / ANSWERS, "test")
        place = {row: n for n, row in enumerate(rows)}
        points = routing[[place[row] for row in chosen.column("row").to_pylist()]]
        spaces["routing, oracle"] = points
        silhouettes["routing, oracle"] = silhouette(
            torch.from_numpy(points.copy()), tasks, torch.Generator().manual_seed(seed)
        )
    maps = {name: projection.lay_out(features, seed) for name, features in spaces.items()}
    return projection.task_maps(maps, tasks, silhouettes)


def _write_texts(setup: Setup, stage: Stage, summary: Mapping[str, Any], pictures: list[Picture]) -> None:
    config = setup.config
    values = {
        "name": config.name,
        "summary": summary,
        "config": config,
        "setup": setup,
        "model_name": base_model_name(setup),
        "verdict": report_words.verdict(summary),
        "by_task": report_words.by_task(summary),
        "notes": report_words.notes(summary, config.finetune.regularizer),
        "safety": report_words.safety(summary),
        "commands": report_words.next_commands(summary, str(setup.store.root), str(stage.path / CONFIG)),
        "pictures": pictures,
        "splits": {
            split: report_tables.result_table(figures, summary["held_out"])
            for split, figures in summary["splits"].items()
        },
        "ctgi": report_tables.ctgi_table(summary["held_out"]),
        "ctgi_legend": CTGI_LEGEND,
        "added": report_tables.added_table(summary["task_loss_alone"]),
        "measures": report_tables.Table(HEADER, measure_rows(summary["measures"])),
        "measure_legend": " ".join(legend_of(summary)),
        "measure_tables": report_tables.measure_tables(summary["measures"]),
        "share_table": report_tables.share_table(summary["shares"]) if summary["shares"] else None,
        "distances": describe_distance(summary["diagnostics"]["manifold_distance"]),
        "layer_table": report_tables.layer_table(summary["diagnostics"]),
        "manifold_table": report_tables.manifold_table(summary["diagnostics"]),
        "neighborhood_table": report_tables.neighborhood_table(summary["neighborhoods"]),
        "epoch_table": report_tables.epoch_table(summary["epochs"]),
        "routing_table": report_tables.routing_table(summary["epochs"]),
        "auxiliary": report_words.AUXILIARY,
        "guard": report_words.guard_words(summary, config.finetune.guard),
        "card_header": card_header(setup, summary),
    }
    for name in (PAGE, MARKDOWN, CARD):
        text = environment().get_template(name).render(values)
        write_text(stage.path / name, text)


def environment() -> Environment:
    """The templates of pages (escaped) and Markdown texts."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["md"] = markdown
    return made


def base_model_name(setup: Setup) -> str:
    """The model's hub id, or its folder's name: a published card names no path of this machine."""
    path = setup.config.model.path
    if path.startswith("assets:"):
        return f"roma_ray/assets/{path.removeprefix('assets:')}"
    return path if not local_place(setup.model.path).is_dir() else Path(path).name


def card_header(setup: Setup, summary: Mapping[str, Any]) -> str:
    """The model card's YAML header in Hugging Face form, with every test result."""
    test = summary["splits"]["test"]
    entries = []
    for name, figures in listed(test, summary["held_out"]):
        entries.append(
            {
                "task": {"type": "text-generation", "name": "Text generation"}
                if "free" in summary
                else {"type": "multiple-choice", "name": "Multiple-choice question answering"},
                "dataset": {
                    "type": re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-") or "task",
                    "name": "all tasks" if name == "all" else name,
                    "split": "test",
                },
                "metrics": [
                    {"type": "accuracy", "name": "accuracy, tuned routers", "value": figures["tuned_accuracy"]},
                    {"type": "accuracy_stderr", "name": "its standard error", "value": figures["tuned_stderr"]},
                    {"type": "base_accuracy", "name": "accuracy, base model", "value": figures["base_accuracy"]},
                    {"type": "mcnemar_p", "name": "McNemar's exact p", "value": figures["mcnemar_p"]},
                ],
            }
        )
    header = {
        "base_model": base_model_name(setup),
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "router-tuning", "roma", "roma-ray"],
        "model-index": [{"name": setup.config.name, "results": entries}],
    }
    text: str = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    return text
