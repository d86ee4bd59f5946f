"""The report's tables, as header and rows of text, and as CSV files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from roma_ray.borders.text import figure
from roma_ray.engine.collapse import FIGURES
from roma_ray.evaluation.measures import HEADER, figure_cells, form_of
from roma_ray.evaluation.statistics import Paired
from roma_ray.evaluation.transfer import HEADER as CTGI
from roma_ray.evaluation.transfer import ctgi_rows, listed
from roma_ray.figures.escaping import csv_text
from roma_ray.stages.run_summary import result_rows
from roma_ray.stages.task_loss_alone import HEADER as STEPS
from roma_ray.stages.task_loss_alone import added_rows
from roma_ray.store.files import write_text

_MOST_ANSWERS = 6
_FIGURES = (
    "n",
    "base_accuracy",
    "base_stderr",
    "tuned_accuracy",
    "tuned_stderr",
    "difference",
    "difference_stderr",
    "lost",
    "won",
    "mcnemar_p",
)


@dataclass(frozen=True)
class Table:
    """Text to show. The first column holds names, the others figures."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    names: int = 1
    """How many of the columns hold names."""


def result_table(figures: Mapping[str, Mapping[str, Any]], held_out: Mapping[str, Any] | None = None) -> Table:
    """One split's comparisons for a reader: percent with standard errors."""
    rows = [
        ("all tasks" if name == "all" else name, *middle, f"{one['lost']} / {one['won']}", p)
        for (name, *middle, p), (_, one) in zip(result_rows(figures, held_out), listed(figures, held_out), strict=True)
    ]
    return Table(("task", "n", "base %", "tuned %", "difference", "lost / won", "McNemar p"), rows)


def measure_tables(found: Mapping[str, Any]) -> dict[str, Table]:
    """Each measure's figures by task, by the measure's name in words; the last rows are over all questions and all tasks."""
    tables = {}
    for name, figures in found["figures"].items():
        form = form_of(name)
        rows = [(task, str(one["n"]), *figure_cells(name, one)) for task, one in figures["tasks"].items()]
        rows.append(("all tasks", str(figures["micro"]["n"]), *figure_cells(name, figures["micro"])))
        if figures["macro"]:
            rows.append(("mean of the tasks", str(figures["macro"]["n"]), *figure_cells(name, figures["macro"])))
        tables[f"{form.title}, {form.unit}"] = Table(("task", "n", *HEADER[1:]), rows)
    return tables


def added_table(found: Mapping[str, Any] | None) -> Table | None:
    """From base to the task loss alone, and from there to both terms; None where that was not judged."""
    return Table(STEPS, added_rows(found)) if found else None


def ctgi_table(found: Mapping[str, Any] | None) -> Table | None:
    """The cross-task generalization index by measure; None where no task was held out."""
    return Table(CTGI, ctgi_rows(found)) if found else None


def share_table(shares: Mapping[str, Any]) -> Table:
    """Which answers were given, a row a task, by label where the choices recur and by position elsewhere."""
    rows = []
    for task, found in shares.items():
        by = found["shift"][-1]
        names = found["labels"] or found["positions"]
        shown = sorted(names, key=lambda name: (-abs(names[name]["tuned"] - names[name]["base"]), name))[:_MOST_ANSWERS]
        cells = (
            " · ".join(f"{100 * names[name][who]:.0f}" for name in sorted(shown)) for who in ("gold", "base", "tuned")
        )
        differences = (figure(by[key], "difference") for key in ("plain", "corrected"))
        rows.append((task, " · ".join(sorted(shown)), *cells, *differences))
    return Table(("task", "answers", "right %", "base %", "tuned %", "difference", "without preference"), rows)


def layer_table(found: Mapping[str, Any]) -> Table:
    """Routing before and after, by layer."""
    rows = [
        (
            f"layer {layer}",
            f"{found['base']['routing_entropy'][n]:.3f}",
            f"{found['tuned']['routing_entropy'][n]:.3f}",
            f"{100 * max(found['base']['expert_load'][n]):.1f}",
            f"{100 * max(found['tuned']['expert_load'][n]):.1f}",
            f"{found['routing_kl'][n]:.4f}",
            f"{100 * found['selection_overlap'][n]:.1f}",
        )
        for n, layer in enumerate(found["layers"])
    ]
    header = (
        "",
        "entropy base",
        "entropy tuned",
        "largest load base %",
        "largest load tuned %",
        "moved from base (KL, nats)",
        "experts kept %",
    )
    return Table(header, rows)


def manifold_table(found: Mapping[str, Any]) -> Table:
    """How far embedding and routing space agree, before and after."""

    def shown(value: float | None, digits: int = 3) -> str:
        return "not defined" if value is None else f"{value:.{digits}f}"

    rows: list[tuple[str, ...]] = [
        ("task silhouette, embedding", shown(found["embedding_silhouette"]), shown(found["embedding_silhouette"])),
        ("task silhouette, routing", shown(found["base"]["task_silhouette"]), shown(found["tuned"]["task_silhouette"])),
    ]
    overlaps = [found[key]["neighbor_overlap"] for key in ("base", "tuned")]
    if all(overlaps):
        before, after = overlaps
        rows.append(
            (
                f"shared nearest questions, embedding and routing (chance {before['chance']:.3f})",
                shown(before["recall"]),
                shown(after["recall"]),
            )
        )
    for split, words in (("train", "trained"), ("test", "test")):
        one = found["manifold_distance"][split]
        for key, whom in (("neighbors", "the successful neighbors"), ("random", "random successes")) if one else ():
            label = (
                f"squared distance of routing to {whom} (Σ_j W_ij ‖r_i − r_j‖²), {one['questions']:,} {words} questions"
            )
            rows.append((label, *(shown(one[key][who], 4) for who in ("base", "tuned"))))
    return Table(("", "base", "tuned"), rows)


def neighborhood_table(facts: Mapping[str, Any]) -> Table:
    """Quantiles of size and similarity."""
    keys = list(facts["sizes"])
    rows: list[tuple[str, ...]] = [("size", *(f"{facts['sizes'][key]:.0f}" for key in keys))]
    if facts["similarities"]:
        rows.append(("similarity", *(f"{facts['similarities'][key]:.3f}" for key in keys)))
    return Table(("", *(f"{key.removeprefix('q')} %" for key in keys)), rows)


def epoch_table(epochs: Sequence[Mapping[str, Any]]) -> Table:
    """One row an epoch."""
    rows = [
        (
            str(e["epoch"] + 1),
            f"{e['task_loss']:.4f}",
            f"{e['manifold_loss']:.5f}",
            f"{e['lambda']:.3g}",
            f"{e['gradient_norm']:.3g}",
            f"{e['routing_entropy']:.3f}",
            figure(e, "validation"),
        )
        for e in epochs
    ]
    header = ("epoch", "task loss", "manifold loss", "its weight λ", "gate gradient", "routing entropy", "validation %")
    return Table(header, rows)


def routing_table(epochs: Sequence[Mapping[str, Any]]) -> Table | None:
    """A row an epoch and tuned layer, the base model's before the first epoch; None where no epoch was measured."""
    rows: list[tuple[str, ...]] = []
    for epoch in measured(epochs):
        found = epoch["routing"]
        for n, layer in enumerate(found["layers"]) if not rows else ():
            before = {name: _figure(name, found[f"base_{name}"][n]) for name in FIGURES if f"base_{name}" in found}
            rows.append(("base", f"layer {layer}", *(before.get(name, "") for name in FIGURES)))
        for n, layer in enumerate(found["layers"]):
            cells = (_figure(name, found[name][n]) for name in FIGURES)
            rows.append((str(epoch["epoch"] + 1), f"layer {layer}", *cells))
    return Table(("epoch", "", *FIGURES.values()), rows, names=2) if rows else None


def _figure(name: str, value: float) -> str:
    if name == "unused_experts":
        return str(value)
    return f"{100 * value:.1f}" if name.startswith("load") else f"{value:.3g}"


def measured(epochs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The epochs whose routing was measured: an earlier version did not."""
    return [epoch for epoch in epochs if "routing" in epoch]


def write_csv_files(folder: Path, summary: Mapping[str, Any]) -> None:
    """The unrounded figures as CSV files. Raises StorageError."""
    results = [
        (split, name, *(one[key] for key in _FIGURES))
        for split, figures in summary["splits"].items()
        for name, one in listed(figures, summary["held_out"])
    ]
    write_csv(folder / "results.csv", ("split", "task", *_FIGURES), results)
    measured = [
        (measure, over, *one.values())
        for measure, by in summary["measures"]["figures"].items()
        for over, one in (("all", by["micro"]), ("macro average", by["macro"]), *by["tasks"].items())
        if one
    ]
    write_csv(folder / "measures.csv", ("measure", "task", *(f.name for f in fields(Paired))), measured)
    if alone := summary["task_loss_alone"]:
        added = [("base", "task loss alone", "all", *alone["alone"].values())]
        added += [
            ("task loss alone", "both terms", task, *one.values())
            for task, one in {"all": alone["added"], **alone["tasks"]}.items()
        ]
        write_csv(folder / "task_loss_alone.csv", ("from", "to", "task", *(f.name for f in fields(Paired))), added)
    if transfer := summary["held_out"]:
        indices = [(measure, *one.values()) for measure, one in transfer["ctgi"].items()]
        write_csv(folder / "ctgi.csv", ("measure", *next(iter(transfer["ctgi"].values()))), indices)
    shares = [
        (task, by, name, *one.values())
        for task, found in summary["shares"].items()
        for by, names in (("position", found["positions"]), ("label", found["labels"] or {}))
        for name, one in names.items()
    ]
    write_csv(folder / "answer_shares.csv", ("task", "by", "answer", "right", "base", "tuned"), shares)
    _write_epochs(folder, summary["epochs"])
    found = summary["diagnostics"]
    layers = [
        (
            layer,
            *(found[key]["routing_entropy"][n] for key in ("base", "tuned")),
            found["routing_kl"][n],
            found["selection_overlap"][n],
        )
        for n, layer in enumerate(found["layers"])
    ]
    header = ("layer", "base_routing_entropy", "tuned_routing_entropy", "routing_kl", "selection_overlap")
    write_csv(folder / "layers.csv", header, layers)
    loads = [
        (layer, expert, found["base"]["expert_load"][n][expert], found["tuned"]["expert_load"][n][expert])
        for n, layer in enumerate(found["layers"])
        for expert in range(len(found["base"]["expert_load"][n]))
    ]
    write_csv(folder / "expert_load.csv", ("layer", "expert", "base", "tuned"), loads)
    near = summary["neighborhoods"]
    quantiles = [(key, near["sizes"][key], near["similarities"].get(key, "")) for key in near["sizes"]]
    write_csv(folder / "neighborhoods.csv", ("quantile", "size", "similarity"), quantiles)


def _write_epochs(folder: Path, epochs: Sequence[Mapping[str, Any]]) -> None:
    """The epochs, and their routing by layer."""
    # Where the guard acted, and there alone, a record says so.
    header = list(dict.fromkeys(key for epoch in epochs for key in epoch if key != "routing"))
    write_csv(folder / "epochs.csv", header, [tuple(epoch.get(key, "") for key in header) for epoch in epochs])
    routing = [
        (epoch["epoch"], layer, *(epoch["routing"][name][n] for name in FIGURES))
        for epoch in measured(epochs)
        for n, layer in enumerate(epoch["routing"]["layers"])
    ]
    write_csv(folder / "epoch_routing.csv", ("epoch", "layer", *FIGURES), routing)


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write one CSV file. Raises StorageError."""
    write_text(path, csv_text([header, *rows]))
