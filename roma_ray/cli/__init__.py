"""The `roma-ray` command, one file a group of commands."""

from collections.abc import Sequence


def main(words: Sequence[str] | None = None) -> None:
    """Run the command with these words; without, with the process's own."""
    from roma_ray.cli.commands import main as command

    command(words)
