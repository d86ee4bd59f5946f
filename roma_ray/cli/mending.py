"""`roma-ray repair`: routers of a pruned, merged or quantized model, retrained against the model that it was made of."""

from __future__ import annotations

from typing import Any

import click

from roma_ray.cli.options import check, keep_what_is_there, quiet_libraries, said_when_slow, say


@click.command()
@click.argument("student", type=click.Path())
@click.option(
    "--teacher",
    help="Folder or hub id of the model that STUDENT was made of. Without it STUDENT itself, in another dtype.",
)
@click.option(
    "--texts", required=True, multiple=True, help="Rows with a `text` (or prompts with answers): .jsonl or .parquet."
)
@click.option(
    "--questions", type=click.Path(), help="Questions with choices, whose answers are compared with the teacher's."
)
@click.option(
    "--questions-format",
    type=click.Choice(["cloze", "letter"]),
    default="cloze",
    show_default=True,
    help="How they are asked.",
)
@click.option("--merged", type=click.Path(), help="Also write the whole repaired model into this folder.")
@click.option(
    "--config", "config_path", type=click.Path(), help="YAML configuration to start from; default: a repair's own."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting: finetune.epochs=1.")
@click.option("--storage", help="Where artifacts live; default $ROMA_RAY_STORAGE, else ~/.roma-ray.")
@click.option("--address", help="A Ray cluster (host:6379), or `new`; default: this process, without Ray.")
@click.option("--summary", "summary_path", type=click.Path(dir_okay=False), help="Write what was found as JSON.")
@click.option("--quiet", is_flag=True, help="No progress, only the result.")
def repair(
    student: str,
    teacher: str | None,
    texts: tuple[str, ...],
    questions: str | None,
    questions_format: str,
    merged: str | None,
    config_path: str | None,
    overrides: tuple[str, ...],
    storage: str | None,
    address: str | None,
    summary_path: str | None,
    quiet: bool,
) -> None:
    """Retrain the routers of STUDENT to say what its teacher says, and tell what that gave back.

    All routers, by the KL divergence to the teacher's next tokens on plain texts; experts and all else stay as they are.
    """
    from roma_ray.cli.preflight import check_run
    from roma_ray.cli.settings import unused
    from roma_ray.config.repair_settings import asked_config, repair_config

    if merged is not None:
        keep_what_is_there(merged, force=False)
    config = repair_config(student, teacher, texts, config_path, overrides)
    if storage is not None:
        config = config.model_copy(update={"storage": storage})
    for line in unused("repair", config, overrides, file=config_path is not None):
        say(f"note: {line}", error=True)
    quiet_libraries()
    check(config, summary_path)
    asked = None if questions is None else asked_config(config, questions, questions_format)
    if asked is not None:
        check_run(asked)
    with said_when_slow(quiet):
        from roma_ray.cluster.ray_runners import LOCAL_ADDRESS, open_place
        from roma_ray.runs.repair import HEADER
        from roma_ray.runs.repair import repair as mend
    from roma_ray.store.artifacts import write_json
    from roma_ray.terminal import open_progress, print_table

    progress = open_progress(quiet)
    with open_place(config, address or LOCAL_ADDRESS, progress) as place:
        setup: Any = place.setup(config)
        beside = None if asked is None else place.setup(asked)
        found = mend(setup, progress, place.runners, asked=beside, merged=merged)
    print_table("student and teacher", HEADER, found.rows(), names=1)
    for line in found.words():
        say(line)
    say(f"adapter: {found.adapter}")
    if merged is not None:
        say(f"merged: {merged}")
    if summary_path:
        write_json(summary_path, found.found)
