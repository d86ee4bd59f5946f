"""Housekeeping: `roma-ray ls`, `show`, `explain`, `rm` and `gc`. They compute nothing; `rm` and `gc` remove only with --yes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from roma_ray.cli.options import check, run_options


def _storage(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--storage", help="The storage; default $ROMA_RAY_STORAGE, else ~/.roma-ray.")(command)


def _yes(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--yes", is_flag=True, help="Remove; without, only say what would go.")(command)


def _open(storage: str | None) -> Any:
    from roma_ray.store.artifacts import Store
    from roma_ray.store.contents import Storage

    return Storage(Store(storage))


@click.command()
@_storage
def ls(storage: str | None) -> None:
    """List the runs in the storage: name, date, size, and what removing each would free."""
    from roma_ray.terminal import print_table, say

    found = _open(storage)
    rows = []
    for run in found.runs():
        parts = found.needs(run)
        size, cache = sum(part.bytes for part in parts), sum(part.cache_bytes for part in parts)
        what = run.title + ("" if run.state == "complete" else f" ({run.state})")
        own = sum(part.bytes for part in found.alone(run))
        rows.append((run.id, what, found.title(run), _date(run.time), _size(size), _size(cache), _size(own)))
    print_table(str(found.store.root), ("id", "what", "name", "date", "size", "cache", "alone"), rows)
    total = sum(item.bytes for item in found.items.values())
    say(f"{len(found.items)} stages, {_size(total)}. cache: activations among it; alone: what `roma-ray rm ID` frees")


@click.command()
@click.argument("run")
@_storage
def show(run: str, storage: str | None) -> None:
    """Show the stages of RUN (a name, an id or its beginning): where they lie, their size, who else needs them."""
    from roma_ray.terminal import print_table, say

    found = _open(storage)
    wanted = found.find(run)
    tops = [top for top in found.runs() if top is not wanted]
    others = {item.id: [] for item in found.items.values()}  # type: dict[str, list[str]]
    for top in tops:
        for item in found.needs(top):
            others[item.id].append(top.id[:6])
    rows = [
        (f"{p.kind}/{p.id}", p.state, _date(p.time), _size(p.bytes), _size(p.cache_bytes), ", ".join(others[p.id][:4]))
        for p in found.needs(wanted)
    ]
    print_table(
        f"{found.title(wanted) or 'unnamed'}: {wanted.title}",
        ("stage", "state", "date", "size", "cache", "also in"),
        rows,
    )
    say(f"in {found.store.root}")


@click.command()
@click.argument("runs", nargs=-1, required=True)
@_storage
@_yes
def rm(runs: tuple[str, ...], storage: str | None, yes: bool) -> None:
    """Remove RUNS (names or ids) and what no other run needs; a dry run without --yes."""
    found = _open(storage)
    _remove(found, found.removal([found.find(run) for run in runs]), yes)


@click.command()
@_storage
@click.option("--unfinished", is_flag=True, help="Also what stopped runs would go on from, and what no run ends in.")
@_yes
def gc(storage: str | None, unfinished: bool, yes: bool) -> None:
    """Free space without losing a result: activation caches of finished trainings; a dry run without --yes.

    In a bucket also what killed processes left of uploads.
    """
    from roma_ray.terminal import say

    found = _open(storage)
    _remove(found, found.garbage(unfinished=unfinished), yes)
    if uploads := found.unfinished_uploads():
        if yes:
            found.abort_uploads()
        say(f"{len(uploads)} unfinished upload(s): {'removed' if yes else 'would be removed'}")


def _remove(found: Any, removals: list[Any], yes: bool) -> None:
    from roma_ray.terminal import print_table, say

    if not removals:
        say("nothing to remove")
        return
    rows = [
        (f"{r.item.kind}/{r.item.id}", found.title(r.item), _date(r.item.time), _size(r.bytes), r.why) for r in removals
    ]
    print_table("removing" if yes else "would be removed", ("stage", "name", "date", "frees", "why"), rows)
    if yes:
        say(f"freed {_size(found.remove(removals, say))}")
    else:
        say(f"{_size(sum(r.bytes for r in removals))} in all. Nothing was removed: --yes does it")


def _date(seconds: float) -> str:
    import time

    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _size(count: int) -> str:
    from roma_ray.borders.text import size_text

    return size_text(count)


@click.command()
@click.argument("run", required=False)
@run_options
def explain(config: Any, run: str | None) -> None:
    """Say of every stage whether it is complete, and of the others what differs from the most alike, and what a run would cost.

    RUN: a run of the storage by name or id, with its own settings in place of --config; --set changes some of them.
    """
    given = click.get_current_context().params
    if run is not None:
        if given["config_path"]:
            raise click.UsageError("RUN brings its own configuration: leave --config out")
        from roma_ray.cli.printing import config_of

        config = config_of(run, config.storage, given["overrides"])
    check(config)
    from roma_ray.cli.printing import setup_of_finished
    from roma_ray.runs.explaining import described
    from roma_ray.runs.explaining import explain as look
    from roma_ray.terminal import say

    for line in described(look(setup_of_finished(config))):
        say(line)
