"""What the commands share: how failures end, the options of a configuration and of Ray, and the checks before any work.

Imports nothing heavy, like `cli/commands.py`, which reads it when the command starts.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

_SLOW_SECONDS = 5.0


class Commands(click.Group):
    """Turns expected failures into one readable message; a bug keeps its traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """As click's, with streams that take any text and a standard output that may be full."""
        from roma_ray.borders.text import prepare_streams, writable_output

        prepare_streams()
        with writable_output():
            return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        from roma_ray.borders.addresses import mask_text
        from roma_ray.errors import ConfigError, RomaError

        try:
            return super().invoke(ctx)
        except RomaError as error:
            say(f"roma-ray: {mask_text(str(error))}", error=True)
            sys.exit(2 if isinstance(error, ConfigError) else 1)
        except KeyboardInterrupt:
            say("stopped; finished work is kept: run the same command to go on", error=True)
            sys.exit(130)
        except BrokenPipeError:
            os._exit(141)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click's, but each summary whole, on as many lines as it takes."""
        commands = [(name, command) for name in self.list_commands(ctx) if (command := self.get_command(ctx, name))]
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(limit=1000)) for name, command in commands])


@contextlib.contextmanager
def said_when_slow(quiet: bool) -> Iterator[None]:
    """Imports within that take long are told of: on a cold disk they take a minute, which looks like a hang."""
    timer = threading.Timer(_SLOW_SECONDS, say, ["importing torch and transformers ..."], {"error": True})
    timer.daemon = True
    if not quiet:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def say(text: str, *, error: bool = False) -> None:
    """Print a line in which nothing that comes from data is markup or a command to the terminal."""
    from roma_ray import terminal

    terminal.say(text, error=error)


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that runs a configuration; gives the command its parsed Config."""

    @click.option("--config", "config_path", type=click.Path(), help="YAML configuration; default: the embedded one.")
    @click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting: finetune.epochs=1."
    )
    @click.option("--storage", help="Where artifacts live; default $ROMA_RAY_STORAGE, else ~/.roma-ray.")
    @functools.wraps(command)
    def wrapped(config_path: str | None, overrides: tuple[str, ...], storage: str | None, **others: Any) -> Any:
        from roma_ray.config.loading import load_config

        config = load_config(config_path, overrides)
        _say_unused(config, overrides, config_path is not None, others)
        if storage is not None:
            config = config.model_copy(update={"storage": storage})
        quiet_libraries()
        return command(config=config, **others)

    return wrapped


def _say_unused(config: Any, overrides: tuple[str, ...], file: bool, options: dict[str, Any]) -> None:
    """Say which of the given settings the command that runs does not read."""
    from roma_ray.cli.settings import unused

    name = str(click.get_current_context().info_name)
    if options.get("tasks"):
        name += " --adapter" if options["adapter"] or options["base_only"] else " --tasks"
    without = [
        section for section, off in (("ray", _here(config, options)), ("tracking", _untracked(name, options))) if off
    ]
    for line in unused(name, config, overrides, file=file, without=without):
        say(f"note: {line}", error=True)


def _here(config: Any, options: dict[str, Any]) -> bool:
    return bool(options.get("here")) or (options.get("address") or config.ray.address) == "local"


def _untracked(name: str, options: dict[str, Any]) -> bool:
    return name == "local" and not options["track"]


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and notices out of ours."""
    from roma_ray.cluster import environment

    environment.quiet_libraries()


def ray_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that runs on Ray; gives the command its address, `local` for this process without Ray."""

    @functools.wraps(command)
    def placed(here: bool, address: str | None, config: Any, **others: Any) -> Any:
        if here and address not in (None, "local"):
            raise click.UsageError(f"--local and --address {address} contradict each other")
        return command(config=config, address="local" if here else address or config.ray.address, **others)

    for option in (
        click.option("--quiet", is_flag=True, help="No progress, only the result."),
        click.option("--summary", "summary_path", type=click.Path(dir_okay=False), help="Write what was made as JSON."),
        click.option("--local", "here", is_flag=True, help="In this process, without Ray; as --address local."),
        click.option(
            "--address",
            help="A Ray cluster (host:6379); `new` starts one here, `local` is this process without Ray. Default: the one in sight.",
        ),
    ):
        placed = option(placed)
    return run_options(placed)


def check(config: Any, summary_path: str | None = None) -> None:
    """Refuse at once what would end the command later. Raises RomaError."""
    from roma_ray.cli.preflight import check_place, check_run

    check_place(summary_path)
    check_run(config)
    in_use(config)


def keep_what_is_there(out: str, force: bool) -> None:
    """Refuse to write over a file or into a folder that holds something, unless told to. Raises UsageError."""
    if "://" in out:
        raise click.UsageError(f"{out} is an address: name a place on this machine, and copy it from there")
    place = Path(out)
    if not force and (place.is_symlink() or place.is_file() or (place.is_dir() and any(place.iterdir()))):
        raise click.UsageError(f"{out} is there already: choose another place, or replace it with --force")


def in_use(config: Any) -> None:
    """Keep what removes runs out of the storage until the command ends. Raises StorageError."""
    from roma_ray.store.artifacts import Store

    click.get_current_context().with_resource(Store(config.storage).used())


def quiet_ray() -> None:
    """Settings that Ray reads when it is imported."""
    from roma_ray.cluster import environment

    environment.quiet_ray()
