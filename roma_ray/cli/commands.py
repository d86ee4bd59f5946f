"""The `roma-ray` command. Each command parses, calls one function and prints; heavy imports wait until they are needed."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import Any

import click

import roma_ray
from roma_ray.cli.grids import tune, verdict
from roma_ray.cli.housekeeping import explain, gc, ls, rm, show
from roma_ray.cli.mending import repair
from roma_ray.cli.options import (
    Commands,
    check,
    in_use,
    keep_what_is_there,
    quiet_libraries,
    quiet_ray,
    ray_options,
    run_options,
    said_when_slow,
    say,
)
from roma_ray.cli.proving import control


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(roma_ray.__version__)
def main() -> None:
    """Routing Manifold Alignment (RoMA) for mixture-of-experts language models."""


@main.command()
@run_options
@click.option("--summary", "summary_path", type=click.Path(dir_okay=False), help="Write the run's summary as JSON.")
@click.option("--quiet", is_flag=True, help="No progress, only the result.")
@click.option("--track", is_flag=True, help="Write the report and record the run in MLflow, as `run` does.")
def local(config: Any, summary_path: str | None, quiet: bool, track: bool) -> None:
    """Run the whole method in this process and print base against tuned routers."""
    finished = _run(config, "local", summary_path, quiet, "report" if track else "evaluate", track=track)
    _say_result(finished)


def _run(config: Any, address: str | None, summary_path: str | None, quiet: bool, until: str, *, track: bool) -> Any:
    check(config, summary_path)
    with said_when_slow(quiet):
        pass
    from roma_ray.api import run_pipeline

    finished = run_pipeline(config, address, until, quiet=quiet, track=track)
    _write_summary(summary_path, finished)
    return finished


def _write_summary(summary_path: str | None, finished: Any) -> None:
    """Write what was made: the summary, or of a part of the pipeline its stages' folders."""
    from roma_ray.store.artifacts import write_json

    if summary_path:
        write_json(summary_path, finished.summary or {name: str(s.path) for name, s in finished.stages.items()})


def _say_result(finished: Any) -> None:
    """Print the result where the run went so far, and where its report or its last stage is."""
    if finished.summary:
        from roma_ray.cli.printing import print_result

        print_result(finished.summary)
    if "report" in finished.stages:
        say(f"report: {finished.stages['report'].path / 'report.html'}")
    elif not finished.summary:
        say(str(list(finished.stages.values())[-1].path))


@main.command()
@click.argument("sweep", required=False, type=click.Path())
@run_options
def report(config: Any, sweep: str | None) -> None:
    """Write the report of a finished run, where there is none yet, and print where it is.

    With SWEEP, the space file or the folder of a sweep: the report of its trials as far as they are.
    """
    given = click.get_current_context().params
    if sweep is not None:
        if given["config_path"]:
            raise click.UsageError("a sweep's configuration is in its space file: leave --config out")
        quiet_ray()
        from roma_ray.cli.sweeping import report_sweep

        report_sweep(sweep, given["overrides"], given["storage"])
        return
    check(config)
    from roma_ray.cli.printing import setup_of_finished
    from roma_ray.runs.pipeline import revisit
    from roma_ray.terminal import open_progress

    finished = revisit(setup_of_finished(config), open_progress(quiet=False))
    say(f"report: {finished.stages['report'].path / 'report.html'}")


@main.command()
@run_options
def track(config: Any) -> None:
    """Deliver to MLflow what it lacks of a run, finished or not (after an outage, or of a run that was not recorded)."""
    check(config)
    from roma_ray.cli.printing import setup_of_finished
    from roma_ray.runs.pipeline import replay
    from roma_ray.terminal import open_progress
    from roma_ray.tracking import Tracker

    setup = setup_of_finished(config)
    with Tracker(setup, open_progress(quiet=False)) as tracker:
        replay(setup, tracker)
    if tracker.lacking:
        # The tracker has said what, and why.
        sys.exit(1)


@main.command()
@ray_options
@click.option(
    "--seeds",
    type=click.IntRange(min=2),
    help="Train with so many seeds, on one extraction, and tell both sources of error.",
)
def run(config: Any, address: str | None, summary_path: str | None, quiet: bool, seeds: int | None) -> None:
    """Run the whole method, on Ray where that is worth it, and print base against tuned routers."""
    if seeds is not None:
        if address == "local":
            raise click.UsageError(
                "several seeds train on Ray Tune, also on one machine: --address new starts a cluster here"
            )
        check(config, summary_path)
        quiet_ray()
        from roma_ray.cli.sweeping import run_seeds

        sys.exit(run_seeds(config, seeds, address, quiet, summary_path))
    _say_result(_on_ray(config, address, summary_path, quiet, "report"))


def _on_ray(config: Any, address: str | None, summary_path: str | None, quiet: bool, until: str) -> Any:
    return _run(config, address, summary_path, quiet, until, track=config.tracking.enabled)


def _until(stage: str, text: str) -> None:
    """Add the command that runs the pipeline up to a stage."""

    @main.command(stage, help=text)
    @ray_options
    def command(config: Any, address: str | None, summary_path: str | None, quiet: bool) -> None:
        _say_result(_on_ray(config, address, summary_path, quiet, stage))


for _stage, _text in {
    "extract": "Run up to extraction on Ray: routing weights, answers and activations of every question.",
    "embed": "Run up to the task embeddings on Ray.",
    "neighbors": "Run up to the successful neighborhoods on Ray.",
    "finetune": "Run up to the finetuned routers on Ray.",
}.items():
    _until(_stage, _text)


@main.command()
@ray_options
@click.option("--tasks", help="lm-eval's tasks by name, .yaml task files, question files; separated by commas.")
@click.option(
    "--data-dir",
    help="Folder with the tasks' rows in place of the hub: DIR/<task>/<split>.jsonl or .parquet, or the hub's own files.",
)
@click.option("--adapter", help="Routers to judge beside the base (adapter or router_ft.pt); default: the run's own.")
@click.option("--base-only", is_flag=True, help="Judge the model alone.")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples in the prompt; default: what each task says.")
@click.option("--limit", type=click.IntRange(min=1), help="At most this many questions of each task.")
@click.option("--apply-chat-template", is_flag=True, help="Wrap prompts in the tokenizer's chat template.")
@click.option("--allow-code", is_flag=True, help="Let your own task files, and tasks marked unsafe, execute code.")
def evaluate(
    config: Any,
    address: str | None,
    summary_path: str | None,
    quiet: bool,
    tasks: str | None,
    data_dir: str | None,
    adapter: str | None,
    base_only: bool,
    num_fewshot: int | None,
    limit: int | None,
    apply_chat_template: bool,
    allow_code: bool,
) -> None:
    """Judge base and tuned models on Ray: on the run's own test questions, or with --tasks by lm-evaluation-harness.

    Without --tasks this runs the pipeline up to its paired evaluation, the whole method, and prints its figures.
    """
    only_tasks = (data_dir, adapter, base_only, num_fewshot, limit, apply_chat_template, allow_code)
    if tasks is None:
        if any(value not in (None, False) for value in only_tasks):
            raise click.UsageError(
                "evaluate without --tasks takes no options of tasks; name some, e.g. --tasks arc_easy,piqa"
            )
        _say_result(_on_ray(config, address, summary_path, quiet, "evaluate"))
        return
    from roma_ray.cli.preflight import check_judged, check_place

    if adapter is not None and base_only:
        raise click.UsageError("--adapter and --base-only contradict each other")
    names = tuple(filter(None, (name.strip() for name in tasks.split(","))))
    check_place(summary_path)
    check_judged(config, names, adapter, data_dir)
    in_use(config)
    from roma_ray.benchmarks.judge import Wanted
    from roma_ray.cli.judging import evaluate_tasks, print_benchmarks
    from roma_ray.evaluation.benchmark_results import read_benchmarks
    from roma_ray.store.artifacts import write_json

    wanted = Wanted(names, data_dir, num_fewshot, limit, apply_chat_template, allow_code)
    folder = evaluate_tasks(config, address, quiet, wanted, adapter, base_only)
    if summary_path:
        write_json(summary_path, read_benchmarks(folder))
    print_benchmarks(folder)


@main.command()
@run_options
@click.argument("runs", nargs=-1, required=True)
@click.option("--format", "form", type=click.Choice(["markdown", "html", "csv"]), default="markdown", show_default=True)
@click.option("--out", type=click.Path(dir_okay=False), help="Write a file; .md, .html or .csv says the format.")
@click.option("--allow-different-pins", is_flag=True, help="Show scores of different questions or prompts too, marked.")
@click.option("--track", is_flag=True, help="Keep the table in MLflow, as a run of its own.")
def compare(
    config: Any, runs: tuple[str, ...], form: str, out: str | None, allow_different_pins: bool, track: bool
) -> None:
    """Compare evaluations (folders, fingerprints or MLflow run ids) with the first; RUN:base means a run's base model."""
    if out is not None and Path(out).suffix not in (".md", ".html", ".csv"):
        raise click.BadParameter(f"{out}: name it .md, .html or .csv, which says the form", param_hint="--out")
    from roma_ray.cli.judging import compare_runs

    compare_runs(config, runs, form=form, out=out, allow_different_pins=allow_different_pins, track=track)


@main.command()
@click.option("--methods", default="all", show_default=True, help="`all`, or names separated by commas.")
@click.option("--seeds", type=click.IntRange(min=1), help="Seeds of each method that has any; default baselines.seeds.")
@ray_options
def baselines(
    config: Any,
    methods: str,
    seeds: int | None,
    address: str | None,
    summary_path: str | None,
    quiet: bool,
) -> None:
    """Run the methods that RoMA is compared with (Table 1) on the same questions; one table."""
    from roma_ray.baselines.names import chosen_methods

    names = chosen_methods(methods)
    check(config, summary_path)
    from roma_ray.cli.printing import compare_methods, print_comparison
    from roma_ray.store.artifacts import write_json

    found = compare_methods(config, names, seeds, address, quiet)
    if summary_path:
        write_json(summary_path, found.summary)
    print_comparison(found.summary)
    for name, reason in found.failures.items():
        say(f"roma-ray: {name} failed: {reason}\n  {found.methods[name][0].path.parent}", error=True)
    sys.exit(1 if found.failures else 0)


@main.command()
@click.argument("path", type=click.Path())
@click.option("--base", help="The base model's folder or hub id, to measure how far each layer moved.")
def inspect(path: str, base: str | None) -> None:
    """Say what a router checkpoint holds: an adapter folder, a merged model, a router_ft.pt or a routing JSON."""
    quiet_libraries()
    from roma_ray.engine.setup import resolve_path
    from roma_ray.moe.inspection import describe

    say(describe(path, base=base and resolve_path(base)))


@main.command()
@click.option("--storage", help="The storage to check; default $ROMA_RAY_STORAGE, else ~/.roma-ray.")
@click.option("--address", help="The Ray cluster to check (host:6379); default: the one in sight.")
@click.option("--model", help="A model's folder or hub id: check its layers against transformers' own pass too.")
def doctor(storage: str | None, address: str | None, model: str | None) -> None:
    """Check versions, devices and storage, each with a remedy; exit 1 when something is broken."""
    quiet_libraries()
    from roma_ray.doctor.machine import examine_machine, installed

    findings = [examine_machine(storage)]
    if installed("ray"):
        from roma_ray.doctor.nodes import examine_cluster

        findings.append(examine_cluster(address, storage))
    if model is not None:
        from roma_ray.doctor.model import examine_model

        findings.append(examine_model(model, storage))
    broken = False
    for found in chain.from_iterable(findings):
        mark = {"ok": "ok  ", "note": "note", "broken": "FAIL"}[found.state]
        say(f"{mark}  {found.name}: {found.detail}")
        if found.remedy:
            say(f"      {found.remedy}")
        broken = broken or found.state == "broken"
    sys.exit(1 if broken else 0)


@main.command()
@click.argument("routers", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--format", "form", type=click.Choice(["adapter", "merged", "reference"]), required=True)
@click.option("--base", help="The base model's folder or hub id; default: the one that ROUTERS names.")
@click.option("--force", is_flag=True, help="Replace an export that is there.")
def export(routers: str, out: str, form: str, base: str | None, force: bool) -> None:
    """Write tuned routers (an adapter folder or a router_ft.pt) in another form.

    `adapter` is for peft, `merged` a whole model (for vLLM, lm-eval), `reference` the public reference's router_ft.pt.
    """
    keep_what_is_there(out, force)
    quiet_libraries()
    from roma_ray.engine.setup import resolve_path
    from roma_ray.moe.exporting import export_routers
    from roma_ray.store.files import local_place

    notes = export_routers(local_place(routers), Path(out), form=form, base=base and resolve_path(base))
    say(f"written: {out}")
    for note in notes:
        say(f"note: {note}")


@main.command()
@click.argument("out", type=click.Path(dir_okay=False))
@click.option("--split", type=click.Choice(["train", "validation", "test"]), help="Only these questions; default: all.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@run_options
def routing(config: Any, out: str, split: str | None, force: bool) -> None:
    """Write the routing of a finished extraction as JSON: each question's last-token weights of all experts and MoE layers."""
    keep_what_is_there(out, force)
    check(config)
    from roma_ray.cli.printing import setup_of_finished
    from roma_ray.runs.pipeline import locate
    from roma_ray.stages.routing_file import write_routing
    from roma_ray.terminal import open_progress

    setup = setup_of_finished(config)
    stages = locate(setup)
    count = write_routing(out, setup, stages["questions"], stages["extract"], open_progress(quiet=False), split=split)
    say(f"written: {out} ({count} questions, {len(setup.moe_layers)} layers)")


for _command in (tune, verdict, control, repair, ls, show, explain, rm, gc):
    main.add_command(_command)
