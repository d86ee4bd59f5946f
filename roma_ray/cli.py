"""The `roma-ray` command. Each command parses, calls one function and prints; heavy imports wait until they are needed."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import click


class _Commands(click.Group):
    """Turns expected failures into one readable message; a bug keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        from roma_ray.errors import RomaError

        try:
            return super().invoke(ctx)
        except RomaError as error:
            click.echo(f"roma-ray: {error}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("stopped; finished work is kept: run the same command to go on", err=True)
            sys.exit(130)
        except BrokenPipeError:
            os._exit(141)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="roma-ray")
def main() -> None:
    """Routing Manifold Alignment (RoMA) for mixture-of-experts language models."""


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that runs a configuration; gives the command its parsed Config."""

    @click.option("--config", "config_path", type=click.Path(), help="YAML configuration; default: the embedded one.")
    @click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting: finetune.epochs=1."
    )
    @click.option("--storage", help="Where artifacts live; default $ROMA_RAY_STORAGE, else ~/.roma-ray.")
    @functools.wraps(command)
    def wrapped(config_path: str | None, overrides: tuple[str, ...], storage: str | None, **others: Any) -> Any:
        from roma_ray.config import load_config

        config = load_config(config_path, overrides)
        if storage is not None:
            config = config.model_copy(update={"storage": storage})
        _quiet_libraries()
        return command(config=config, **others)

    return wrapped


def _quiet_libraries() -> None:
    from roma_ray.stages.environment import quiet_libraries

    quiet_libraries()


@main.command()
@run_options
@click.option("--summary", "summary_path", type=click.Path(dir_okay=False), help="Write the run's summary as JSON.")
@click.option("--quiet", is_flag=True, help="No progress, only the result.")
@click.option("--track", is_flag=True, help="Write the report and record the run in MLflow, as `run` does.")
def local(config: Any, summary_path: str | None, quiet: bool, track: bool) -> None:
    """Run the whole method in this process and print base against tuned routers."""
    from roma_ray.engine.setup import resolve
    from roma_ray.pipeline import run
    from roma_ray.terminal import open_progress

    _check_place(summary_path)
    setup, progress = resolve(config), open_progress(quiet)
    setup.store.check()
    with _observer(setup, progress, track) as observer:
        finished = run(setup, progress, until="report" if track else "evaluate", observer=observer)
    print_result(finished.summary)
    if track:
        _say_report(finished)
    _write_summary(summary_path, finished)


def _check_place(summary_path: str | None) -> None:
    """Refuse a summary file that cannot be written before the work, not after it. Raises ConfigError."""
    from roma_ray.errors import ConfigError

    if summary_path and not os.access(Path(summary_path).absolute().parent, os.W_OK):
        raise ConfigError(f"--summary {summary_path}: its folder does not exist or cannot be written")


def _write_summary(summary_path: str | None, finished: Any) -> None:
    """Write what was made: the summary, or of a part of the pipeline its stages' folders."""
    from roma_ray.artifacts import write_json

    if summary_path:
        write_json(summary_path, finished.summary or {name: str(s.path) for name, s in finished.stages.items()})


def _observer(setup: Any, progress: Any, on: bool) -> AbstractContextManager[Any]:
    """What follows a run: MLflow where it is on, else nobody."""
    from roma_ray.pipeline import NOBODY

    if not on:
        return nullcontext(NOBODY)
    from roma_ray.tracking import tracked

    return tracked(setup, progress)


def _say_report(finished: Any) -> None:
    click.echo(f"report: {finished.stages['report'].path / 'report.html'}")


@main.command()
@run_options
def report(config: Any) -> None:
    """Write the report of a finished run, where there is none yet, and print where it is."""
    from roma_ray.pipeline import revisit
    from roma_ray.terminal import open_progress

    finished = revisit(_setup_of_finished(config), open_progress(quiet=False))
    _say_report(finished)


@main.command()
@run_options
def track(config: Any) -> None:
    """Deliver to MLflow what it lacks of a run, finished or not (after an outage, or of a run that was not recorded)."""
    from roma_ray.pipeline import replay
    from roma_ray.terminal import open_progress

    setup = _setup_of_finished(config)
    with _observer(setup, open_progress(quiet=False), True) as observer:
        replay(setup, observer)


def _setup_of_finished(config: Any) -> Any:
    """The set-up whose run is finished: `device: auto` may have meant a cluster's GPUs, which this machine need not have."""
    from roma_ray.engine.setup import resolve
    from roma_ray.errors import ModelError
    from roma_ray.pipeline import locate

    def nothing_kept(spec: Any) -> dict[str, Any]:
        raise ModelError("no run of this model has measured its experts implementation in this storage")

    first, others = resolve(config), []
    for device in ("cuda", "cpu") if config.device == "auto" else ():
        with suppress(ModelError):
            others.append(resolve(config, device=device, measure=nothing_kept))
    return next((setup for setup in (first, *others) if locate(setup)["evaluate"].complete), first)


def ray_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that runs on Ray."""
    for option in (
        click.option("--quiet", is_flag=True, help="No progress, only the result."),
        click.option("--summary", "summary_path", type=click.Path(dir_okay=False), help="Write what was made as JSON."),
        click.option(
            "--address", help="A Ray cluster (host:6379); `local` starts one here. Default: the one in sight."
        ),
    ):
        command = option(command)
    return run_options(command)


@main.command()
@ray_options
def run(config: Any, address: str | None, summary_path: str | None, quiet: bool) -> None:
    """Run the whole method on a Ray cluster and print base against tuned routers."""
    finished = _on_ray(config, address, summary_path, quiet, "report")
    print_result(finished.summary)
    _say_report(finished)


def _on_ray(config: Any, address: str | None, summary_path: str | None, quiet: bool, until: str) -> Any:
    from roma_ray.engine.setup import resolve
    from roma_ray.pipeline import run as run_pipeline
    from roma_ray.stages.cluster import open_cluster
    from roma_ray.stages.runners import measure_near, ray_runners
    from roma_ray.terminal import open_progress

    _check_place(summary_path)
    progress = open_progress(quiet)
    with open_cluster(config, address, progress.say) as cluster:
        device = cluster.device()
        setup = resolve(config, device=device, measure=measure_near(cluster, device, progress))
        setup.store.check()
        with _observer(setup, progress, config.tracking.enabled) as observer:
            finished = run_pipeline(setup, progress, ray_runners(cluster, device), until, observer)
    _write_summary(summary_path, finished)
    return finished


def _until(stage: str, text: str) -> None:
    """Add the command that runs the pipeline up to a stage."""

    @main.command(stage, help=text)
    @ray_options
    def command(config: Any, address: str | None, summary_path: str | None, quiet: bool) -> None:
        finished = _on_ray(config, address, summary_path, quiet, stage)
        if finished.summary:
            print_result(finished.summary)
        else:
            click.echo(str(finished.stages[stage].path))


for _stage, _text in {
    "extract": "Run up to extraction on Ray: routing weights, answers and activations of every question.",
    "embed": "Run up to the task embeddings on Ray.",
    "neighbors": "Run up to the successful neighborhoods on Ray.",
    "finetune": "Run up to the finetuned routers on Ray.",
    "evaluate": "Run up to the paired evaluation on Ray, the whole method, and print its figures.",
}.items():
    _until(_stage, _text)


def print_result(summary: Mapping[str, Any]) -> None:
    """Print the result table on the test questions, diagnostics, and what a reader must know."""
    from roma_ray.evaluation.summary import result_rows, warnings_of
    from roma_ray.terminal import print_table

    header = ("test questions", "n", "base %", "RoMA %", "difference", "McNemar p")
    print_table(f"{summary['name']}: accuracy with standard errors", header, result_rows(summary))
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
    for line in warnings_of(summary):
        click.echo(f"note: {line}")
    click.echo(f"adapter: {summary['paths']['finetune']}/adapter")


@main.command()
@click.argument("path", type=click.Path())
@click.option("--base", help="The base model's folder or hub id, to measure how far each layer moved.")
def inspect(path: str, base: str | None) -> None:
    """Say what a router checkpoint holds: an adapter folder, a merged model, a router_ft.pt or a routing JSON."""
    _quiet_libraries()
    from roma_ray.moe.inspection import describe

    click.echo(describe(path, base=base))


@main.command()
@click.option("--storage", help="The storage to check; default $ROMA_RAY_STORAGE, else ~/.roma-ray.")
@click.option("--address", help="The Ray cluster to check (host:6379); default: the one in sight.")
def doctor(storage: str | None, address: str | None) -> None:
    """Check versions, devices and storage, each with a remedy; exit 1 when something is broken."""
    _quiet_libraries()
    from roma_ray.doctor import examine

    broken = False
    for check in examine(storage, address):
        mark = {"ok": "ok  ", "note": "note", "broken": "FAIL"}[check.state]
        click.echo(f"{mark}  {check.name}: {check.detail}")
        if check.remedy:
            click.echo(f"      {check.remedy}")
        broken = broken or check.state == "broken"
    sys.exit(1 if broken else 0)


@main.command()
@click.argument("adapter", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--format", "form", type=click.Choice(["merged", "reference"]), required=True)
@click.option("--base", help="Base model of a merged export; default: the one that the adapter names.")
def export(adapter: str, out: str, form: str, base: str | None) -> None:
    """Write an adapter as a whole model (for vLLM, lm-eval) or as the reference's router_ft.pt."""
    _quiet_libraries()
    from roma_ray.moe.checkpoints import export_adapter

    export_adapter(Path(adapter), Path(out), form=form, base=base)
    click.echo(f"written: {out}")


if __name__ == "__main__":
    main()
