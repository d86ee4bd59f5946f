"""Whether the Hugging Face hub is needed and answers: asked once, before anything heavy is imported.

The hub's own client tries for half a minute, for each file, and tells of every try. Where the hub is away it is told so
(`HF_HUB_OFFLINE`) before it is imported: what is in its cache is then used at once, and what is not fails at once.
"""

from __future__ import annotations

import os
import re
import ssl
from functools import lru_cache
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from roma_ray.errors import ModelError

_SECONDS = 10.0
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


def is_hub_id(path: str) -> bool:
    """Whether a model's path, which is no folder here, can be a hub id; all else can only be a folder that is missing."""
    return _ID.fullmatch(path) is not None and not path.startswith((".", "~"))


def offline() -> bool:
    """Whether the hub's client was told to stay away from the network."""
    return any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in _OFFLINE)


def cached(model: str, file: str = "config.json") -> bool:
    """Whether the hub's cache here holds a file of some commit of a model."""
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    folder = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    return any((folder / f"models--{model.replace('/', '--')}" / "snapshots").glob(f"*/{file}"))


def answers() -> bool:
    """Whether the hub can be asked: nobody forbids it, and it says something."""
    return not offline() and _away(_endpoint()) is None


def go_offline(need: str) -> str | None:
    """Ask the hub once. Where it is away, its client is told to use its cache alone; returns a sentence that says so."""
    away = None if offline() else _away(_endpoint())
    if away is None:
        return None
    os.environ["HF_HUB_OFFLINE"] = "1"
    return f"{_endpoint()} does not answer ({away}): {need} can come from its cache here alone"


def check_model(model: str) -> None:
    """Raise ModelError when a hub model can be had neither from the cache here nor from the hub."""
    if cached(model):
        return
    if offline():
        raise ModelError(
            f"{model} is neither a folder nor in the hub's cache here, and HF_HUB_OFFLINE keeps the hub's client offline"
        )
    away = _away(_endpoint())
    if away is not None:
        raise ModelError(
            f"{model} is neither a folder nor in the hub's cache here, and {_endpoint()} does not answer ({away})"
        )


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


@lru_cache
def _away(endpoint: str) -> str | None:
    """Why the hub does not answer; None when it does, whatever it says."""
    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=_SECONDS).close()
    except HTTPError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        # The hub's client may trust other certificates.
        return None if isinstance(reason, ssl.SSLError) else str(reason)
    return None
