"""Strategies that damage good files: edits of bytes, and of the values inside a JSON document."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

# What breaks readers: ends of number ranges, signs of structure, deep nesting, invalid UTF-8.
PIECES = (
    b"\x00" * 8,
    b"\xff" * 8,
    b"\x7f" + b"\xff" * 7,
    b"\xed\xa0\x80",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"-1",
    b"9" * 5000,
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'"',
    b"\\ud800",
    b"\r\n",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"../../../etc/passwd",
    b"\x1b[2J",
)
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", "A", "NaN", "1", "-1", "../..", "/etc/passwd", "\x00", "\ud800", 2**63, -(2**63), 10**400])
)
VALUES = st.recursive(
    _SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3), max_leaves=6
)
_EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "write", "insert", "delete", "cut", "repeat"]),
        st.floats(0, 1),
        st.integers(0, 255),
        st.binary(min_size=1, max_size=8) | st.sampled_from(PIECES),
    ),
    min_size=1,
    max_size=3,
)


def damaged(good: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """One of the good files after one to three edits, or bytes from nowhere."""
    edited = st.tuples(st.sampled_from(list(good)), _EDITS).map(lambda pair: edit(*pair))
    return st.one_of(edited, edited, edited, st.binary(max_size=200))


def edit(data: bytes, edits: Sequence[tuple[str, float, int, bytes]]) -> bytes:
    """Apply edits; places are fractions of the length, so that they mean the same whatever was done before."""
    for kind, place, number, piece in edits:
        at = int(place * len(data))
        if kind == "flip" and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ (1 << number % 8)]) + data[at + 1 :]
        elif kind == "write":
            data = data[:at] + piece + data[at + len(piece) :]
        elif kind == "insert":
            data = data[:at] + piece + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + number :]
        elif kind == "cut":
            data = data[:at]
        else:
            data = data[: at + number] + data[at:]
    return data


@st.composite
def damaged_values(draw: Any, good: Any) -> Any:
    """The JSON value with one to three of its parts replaced, removed, renamed or doubled."""
    value = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            return draw(VALUES)
        holder, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["replace", "replace", "remove", "rename", "double"]))
        if kind == "replace":
            holder[key] = draw(VALUES)
        elif kind == "remove":
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, holder[key])
        else:
            holder[draw(st.text(max_size=6)) if kind == "rename" else f"{key}_"] = (
                holder.pop(key) if kind == "rename" else holder[key]
            )
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) in a JSON value."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield value, key
        yield from _places(part)


def damaged_json(good: Any) -> st.SearchStrategy[bytes]:
    """A JSON file after damage to its values or to its bytes."""
    text = json.dumps(good).encode()
    values = damaged_values(good).map(as_json)
    return st.one_of(values, values, damaged([text]))


def as_json(value: Any) -> bytes:
    """JSON as lax writers make it: NaN, Infinity and lone surrogates included."""
    return json.dumps(value).encode("utf-8", "surrogatepass")
