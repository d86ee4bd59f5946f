"""`roma-ray control`: whether the method works where it must."""

from __future__ import annotations

import sys

import click

from roma_ray.cli.options import quiet_libraries, said_when_slow, say


@click.command()
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one of the control's settings.")
@click.option("--storage", help="Where artifacts live; default $ROMA_RAY_STORAGE, else ~/.roma-ray.")
@click.option("--quiet", is_flag=True, help="No progress, only the result.")
@click.option("--summary", "summary_path", type=click.Path(dir_okay=False), help="Write what was found as JSON.")
def control(overrides: tuple[str, ...], storage: str | None, quiet: bool, summary_path: str | None) -> None:
    """Prove that the method works where it must: RoMA gains in a world made for it, and pulls to anything else do not.

    Trains in this process, some minutes; exits with 1 where a check does not hold.
    """
    from roma_ray.assets import assets_path
    from roma_ray.cli.options import check
    from roma_ray.cli.settings import unused
    from roma_ray.config.loading import load_config

    config = load_config(assets_path() / "control.yaml", overrides)
    if storage is not None:
        config = config.model_copy(update={"storage": storage})
    for line in unused("control", config, overrides, file=False):
        say(f"note: {line}", error=True)
    quiet_libraries()
    check(config, summary_path)
    with said_when_slow(quiet):
        from roma_ray.runs.control import control as prove
    from roma_ray.store.artifacts import write_json
    from roma_ray.terminal import open_progress, print_table

    found = prove(config, open_progress(quiet))
    print_table("trained by", ("", "n", "base %", "tuned %", "difference", "p"), found.rows(), names=1)
    for line in found.words():
        say(line)
    if summary_path:
        write_json(summary_path, found.plain())
    if not found.passed:
        sys.exit(1)
