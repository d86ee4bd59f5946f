"""The `roma-ray` command, one file a group of commands."""
