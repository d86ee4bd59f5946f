"""The tokenizer of the model that is tuned or judged."""

from __future__ import annotations

from typing import Any

from roma_ray.errors import ConfigError
from roma_ray.store.files import local_place

# Every folder that a tokenizer can be loaded from has one of these files.
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def load_tokenizer(path: str, revision: str | None) -> Any:
    """The model's own tokenizer. Raises ConfigError when there is none."""
    from transformers import AutoTokenizer

    folder = local_place(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ConfigError(
            f"{path} has no tokenizer (none of {', '.join(_TOKENIZERS)}): copy the tokenizer's files of the model that its "
            "weights come from into the folder"
        )
    try:
        # Say no explicitly: by default the library asks at the terminal whether remote code may run.
        return AutoTokenizer.from_pretrained(str(folder), revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"no tokenizer can be loaded from {path}: {str(error).splitlines()[0]}") from None
