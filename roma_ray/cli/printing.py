"""Finding and printing results: base against tuned routers, and the methods of Table 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roma_ray.config.schema import Config


def compare_methods(config: Any, names: Sequence[str], seeds: int | None, address: str | None, quiet: bool) -> Any:
    """Run the named methods, in this process if the address is `local`, else on Ray, and judge them. Raises RomaError."""
    from contextlib import nullcontext

    from roma_ray.cluster.ray_runners import open_place
    from roma_ray.engine.observers import UNOBSERVED
    from roma_ray.runs.method_comparison import compare
    from roma_ray.terminal import open_progress
    from roma_ray.tracking import ComparisonTracker

    progress = open_progress(quiet)
    with open_place(config, address, progress) as place:
        setup = place.setup(config)
        with ComparisonTracker(setup, progress) if config.tracking.enabled else nullcontext(UNOBSERVED) as observer:
            return compare(setup, names, seeds or config.baselines.seeds, progress, place.runners, observer)


def print_comparison(summary: Mapping[str, Any]) -> None:
    """Print the table of all methods, what was equal for all, and what the oracle means."""
    from roma_ray.evaluation.measures import coincidence
    from roma_ray.evaluation.method_table import (
        COST_LEGEND,
        COSTS,
        HELD_OUT_HEADER,
        budget_line,
        cost_rows,
        describe_oracle,
        held_out_rows,
        measure_differences,
        measure_header,
        result_header,
        result_legend,
        result_rows,
    )
    from roma_ray.evaluation.transfer import LEGEND as CTGI_LEGEND
    from roma_ray.terminal import print_table, say

    title = f"{summary['name']}: {summary['questions']} test questions"
    print_table(title, result_header(summary), result_rows(summary))
    print_table("all measures, differences to the base model", measure_header(summary), measure_differences(summary))
    for line in filter(None, (result_legend(summary), coincidence(summary))):
        say(line)
    if rows := held_out_rows(summary):
        print_table("held-out tasks: gains over the base model", HELD_OUT_HEADER, rows)
        say(CTGI_LEGEND)
    print_table("costs", COSTS, cost_rows(summary))
    say(COST_LEGEND)
    say(budget_line(summary))
    if summary["oracle"]:
        say(describe_oracle(summary["oracle"]))


def print_result(summary: Mapping[str, Any]) -> None:
    """Print the result table on the test questions, diagnostics, and what a reader must know."""
    from roma_ray.borders.text import figure
    from roma_ray.evaluation.measures import HEADER, legend_of, measure_rows
    from roma_ray.evaluation.transfer import HEADER as CTGI
    from roma_ray.evaluation.transfer import LEGEND as CTGI_LEGEND
    from roma_ray.evaluation.transfer import ctgi_rows, transfer_words
    from roma_ray.stages.routing_change import describe_distance
    from roma_ray.stages.run_summary import result_rows, warnings_of
    from roma_ray.stages.task_loss_alone import HEADER as STEPS
    from roma_ray.stages.task_loss_alone import added_rows, added_words
    from roma_ray.terminal import print_table, say

    header = ("task", "n", "base %", "RoMA %", "difference", "p")
    title = f"{summary['name']}: accuracy on test questions, standard errors over questions, McNemar's exact p"
    print_table(title, header, result_rows(summary["splits"]["test"], summary["held_out"]))
    if summary["held_out"]:
        print_table("held-out tasks", CTGI, ctgi_rows(summary["held_out"]))
        say(CTGI_LEGEND)
        say(transfer_words(summary["held_out"]))
    if summary["task_loss_alone"]:
        print_table("what the regularizer adds", STEPS, added_rows(summary["task_loss_alone"]))
        say(added_words(summary["task_loss_alone"]))
    print_table("all measures on the same questions", HEADER, measure_rows(summary["measures"]))
    for line in legend_of(summary):
        say(line)
    found = summary["diagnostics"]
    rows = [
        (
            str(layer),
            f"{found['base']['routing_entropy'][n]:.3f} -> {found['tuned']['routing_entropy'][n]:.3f}",
            f"{max(found['base']['expert_load'][n]):.3f} -> {max(found['tuned']['expert_load'][n]):.3f}",
            f"{found['routing_kl'][n]:.4f}",
            f"{found['selection_overlap'][n]:.3f}",
        )
        for n, layer in enumerate(found["layers"])
    ]
    print_table(
        "routing of the last prompt token, base -> tuned",
        ("layer", "entropy", "largest load", "KL to base", "top-k kept"),
        rows,
    )
    for line in describe_distance(found["manifold_distance"]):
        say(line)
    valid = summary["validation"]
    say(
        f"validation: base {figure(valid, 'base')} %, exported epoch {figure(valid, 'tuned')} %, {valid['n']:,} questions"
        + (
            f" (answers written token for token); log-likelihood {valid['base_logp']:.3f} -> {valid['tuned_logp']:.3f} nats a token"
            if "free" in summary
            else ""
        )
    )
    for line in warnings_of(summary):
        say(f"note: {line}")
    say(f"adapter: {summary['paths']['finetune']}/adapter")


def config_of(run: str, storage: str | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run of the storage, by name or id, with overrides. Raises ArtifactError, ConfigError, StorageError."""
    from roma_ray.config.loading import load_config
    from roma_ray.errors import ArtifactError
    from roma_ray.store.artifacts import CONFIG, Store
    from roma_ray.store.contents import Storage
    from roma_ray.store.files import exists, local

    found = Storage(Store(storage))
    item = found.find(run)
    files = (part.stage.path / CONFIG for part in found.needs(item))
    file = next(filter(exists, files), None)
    if file is None:
        raise ArtifactError(f"{item.kind}/{item.id} has no configuration beside it: give the run's own with --config")
    return load_config(str(local(file)), overrides).model_copy(update={"storage": storage})


def setup_of_finished(config: Any) -> Any:
    """The set-up whose run has come furthest: `device: auto` may have meant a cluster's GPUs, which this machine need not have,
    and a sweep's trial stands on an extraction that it shares with others.
    """
    from roma_ray.ablations.plan import share
    from roma_ray.engine.setup import resolve
    from roma_ray.errors import ModelError
    from roma_ray.runs.pipeline import locate

    def nothing_kept(spec: Any) -> dict[str, Any]:
        raise ModelError("no run of this model has measured its experts implementation in this storage")

    first, others = resolve(config), []
    for device in ("cuda", "cpu") if config.device == "auto" else ():
        with suppress(ModelError):
            others.append(resolve(config, device=device, measure=nothing_kept))

    def come(setup: Any) -> tuple[bool, int]:
        stages = locate(setup)
        return stages["evaluate"].complete, sum(stage.complete for stage in stages.values())

    found = (first, *others)
    return max((*found, *(shared for setup in found for shared in share([setup]))), key=come)
