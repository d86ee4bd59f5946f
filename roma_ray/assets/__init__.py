"""The embedded default: a small merged model with its tokenizer, and a question suite (see README.md beside this file)."""

from pathlib import Path


def assets_path() -> Path:
    """The folder that holds `model/` and `questions/`."""
    return Path(__file__).resolve().parent
