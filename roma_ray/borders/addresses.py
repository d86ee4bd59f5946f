"""Addresses without the secrets in them: the one place that tells what in a URI is secret, for all that is shown or kept.

A secret is what stands before an @ (also where it is percent-encoded, or holds a / ? or #, which the standard does not allow and
people write), and a query with a parameter such as `password` or `token`. What cannot be told apart is taken for one.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "***"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/+|databricks:")
_WORD = re.compile(r"[^\s\"'<>`]+")
# Where an address begins in a word. Each begins where a run of its characters does, so that the search is linear.
_ADDRESS = re.compile(r"(?<![A-Za-z0-9+.-])[0-9+.-]*([A-Za-z][A-Za-z0-9+.-]*:/(?=.))")
_LOGIN = re.compile(r"(?<![^:/@=])([^:/@=]+:[^@]+@)")
# Parts of a parameter's name, and whole names.
_SECRET_NAME = re.compile(
    r"passw|passphrase|pwd|token|secret|credential|signature|(api|access|account|auth|private|shared)[ _.-]*key"
    r"|(^|[^a-z])(key|sig|auth|pass|pw|sas|jwt|bearer)($|[^a-z])",
    re.IGNORECASE,
)
# An error may name a secret up to one of these alone.
_JOINTS = re.compile(r"[:/?#@;&\s]")
# Shorter secrets are looked for as whole words: three letters occur in every text.
_SHORT = 4


@dataclass(frozen=True)
class _Parts:
    prefix: str
    """The scheme with its slashes."""
    user: str
    """All before the last @, or empty."""
    place: str
    """Host and path."""
    query: str
    """From the first ? or # on, where that holds a secret; else it is in `place`."""
    clear: bool
    """Whether the parts are told apart for certain."""


def mask(uri: str) -> str:
    """An address without its secrets: `http://***@host/path?***`; of one whose parts cannot be told apart its scheme alone."""
    parts = _parts(uri)
    if not parts.clear:
        return f"{parts.prefix}{HIDDEN}"
    user = f"{HIDDEN}@" if parts.user else ""
    return f"{parts.prefix}{user}{parts.place}{'?' + HIDDEN if parts.query else ''}"


def has_secret(uri: str) -> bool:
    """Whether an address holds what may be a secret."""
    parts = _parts(uri)
    return bool(parts.user or parts.query or not parts.clear)


def mask_text(text: str) -> str:
    """A text in which every address is masked."""
    return _WORD.sub(lambda found: _mask_word(found[0]), text)


def _mask_word(word: str) -> str:
    login = _LOGIN.search(word[: word.rfind("@") + 1])
    starts = [found.start(1) for found in (_ADDRESS.search(word), login) if found]
    if not starts:
        return word
    # A sentence's own mark is no part of a port.
    address = word[min(starts) :].rstrip(".,;:!?)")
    return word[: min(starts)] + mask(address) + word[min(starts) + len(address) :]


def hide(text: str, uri: str = "") -> str:
    """A text without the secrets of `uri` and of MLflow's environment, in whatever form they occur, nor those of other addresses."""
    found = dict.fromkeys(_secrets(uri) if uri else ())
    found |= dict.fromkeys(_environment_secrets())
    if uri:
        text = text.replace(uri, mask(uri))
    forms = sorted({form for plain in found for form in _forms(plain)}, key=len, reverse=True)
    if forms:
        words = [re.escape(form) if len(form) >= _SHORT else rf"(?<!\w){re.escape(form)}(?!\w)" for form in forms]
        text = re.sub("|".join(words), HIDDEN, text, flags=re.IGNORECASE)
    return mask_text(text)


def _parts(uri: str) -> _Parts:
    scheme = _SCHEME.match(uri)
    prefix = scheme[0] if scheme else ""
    rest = uri[len(prefix) :]
    # Three slashes: a file, whose path may hold an @.
    local = re.fullmatch(r"(sqlite[^:]*|file):/{3,}", prefix) is not None
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0] if not local else ""
    place, mark, query = _split_query(rest)
    secret_query = bool(mark) and _secret_query(query)
    later = _decoded(rest[len(authority) :])
    if "@" in later and not local:
        return _Parts(prefix, rest, "", "", clear=False)
    if "@" in _decoded(authority):
        cut = max(authority.rfind("@"), authority.lower().rfind("%40") + 2 if "%40" in authority.lower() else -1)
        if cut < 0:  # encoded more than once
            return _Parts(prefix, rest, "", "", clear=False)
        user, place = authority[: cut + 1], (place if secret_query else rest)[cut + 1 :]
        return _Parts(prefix, user, place, query if secret_query else "", clear=True)
    if not local and _strange(authority):
        return _Parts(prefix, rest, "", "", clear=False)
    if secret_query:
        return _Parts(prefix, "", place, query, clear=True)
    return _Parts(prefix, "", rest, "", clear=True)


def _split_query(rest: str) -> tuple[str, str, str]:
    found = re.search(r"[?#;]", rest)
    return (rest[: found.start()], found[0], rest[found.start() + 1 :]) if found else (rest, "", "")


def _secret_query(query: str) -> bool:
    """Whether any parameter has a secret's name; of ODBC's strings also those inside a value."""
    return any(_SECRET_NAME.search(name) for name in re.findall(r"(?:^|[?&;#])([^=&;?#]+)=", _decoded(query)))


def _strange(authority: str) -> bool:
    """Whether an authority without @ is still no host with a port: `user%3Apassword`, or a name and password whose host is cut off."""
    port = authority.rpartition("]")[2].partition(":")[2]
    return "%3a" in authority.lower().rpartition("]")[2] or (bool(port) and not port.isdigit())


def _decoded(text: str) -> str:
    for _ in range(5):
        plain = unquote(text)
        if plain == text:
            break
        text = plain
    return text


def _secrets(uri: str) -> Iterator[str]:
    """All of an address that must not be seen, whole and in the pieces that an error may name."""
    parts = _parts(uri)
    user = re.sub(r"(@|%40)$", "", parts.user, flags=re.IGNORECASE)
    for whole in filter(None, {user, _decoded(user)}):
        yield whole
        yield base64.b64encode(whole.encode(errors="surrogateescape")).decode()
        name, colon, password = whole.partition(":")
        yield from filter(None, (password, *re.split(_JOINTS, password)))
        if not colon or not parts.clear:
            yield from filter(None, re.split(_JOINTS, name))
    for whole in filter(None, {parts.query, _decoded(parts.query)}):
        yield whole
        # A value ends at the next parameter, or, in ODBC's strings, at a semicolon; a password may hold one.
        for end in ("&", "&;"):
            for name, value in re.findall(rf"(?:^|[?&;#=])\s*([^=&;?#]+)=([^{end}]*)", whole):
                if _SECRET_NAME.search(_decoded(name)):
                    yield from filter(None, (value, *re.split(_JOINTS, value)))


def _environment_secrets() -> Iterator[str]:
    """What MLflow sends with each request: a server may answer with it."""
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    if password:
        yield password
        yield base64.b64encode(f"{user}:{password}".encode(errors="surrogateescape")).decode()
    yield from filter(None, (os.environ.get("MLFLOW_TRACKING_TOKEN"),))


def _forms(secret: str) -> set[str]:
    """A secret as errors write it: encoded for an address, quoted by Python, JSON or HTML."""
    plain = _decoded(secret)
    forms = {secret, plain}
    for text in (secret, plain):
        safe = text.encode(errors="surrogateescape")
        forms |= {quote(safe), quote(safe, safe=""), quote_plus(safe), html.escape(text)}
        forms |= {repr(text)[1:-1], json.dumps(text)[1:-1]}
    return forms
