"""Strangers' YAML and JSON cost no more than their size: counted in comparisons, nodes and bytes, never in seconds."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from roma_ray.ablations.space import load_space
from roma_ray.borders.documents import MOST_CHARACTERS, check_nodes, first_repeated, load_yaml, read_text
from roma_ray.config import loading
from roma_ray.config.loading import apply_override, load_config, parse_config
from roma_ray.errors import ConfigError
from roma_ray.moe import routing_json
from roma_ray.questions import jsonl
from roma_ray.questions.records import BadRow

KEYS = 20_000


class Counted(str):
    """A key that counts how often one is compared with another."""

    __slots__ = ()
    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def _keys() -> list[str]:
    return [Counted(f"key{n}") for n in range(KEYS)] + [Counted(f"key{KEYS - 1}")]


def _yaml(keys: list[str]) -> None:
    root = yaml.compose("{a: 1}")
    assert isinstance(root, yaml.MappingNode)
    name, value = root.value[0]
    root.value = [(yaml.ScalarNode(name.tag, key, name.start_mark), value) for key in keys]
    check_nodes(root)


@pytest.mark.parametrize(
    ("read", "refusal"),
    [
        (lambda keys: jsonl._object([(key, 1) for key in keys]), BadRow),
        (lambda keys: routing_json._no_duplicates([(key, 1) for key in keys]), ValueError),
        (_yaml, ValueError),
    ],
    ids=["JSON lines", "routing JSON", "YAML"],
)
@pytest.mark.parametrize("repeated", [False, True], ids=["unique", "repeated"])
def test_looking_for_a_key_twice_is_linear(
    read: Callable[[list[str]], Any], refusal: type[Exception], repeated: bool
) -> None:
    Counted.compared = 0
    keys = _keys()
    if repeated:
        with pytest.raises(refusal, match=f"key{KEYS - 1}"):
            read(keys)
    else:
        read(keys[:-1])
    assert Counted.compared < 10 * KEYS


def test_the_first_repeated_key() -> None:
    assert first_repeated(["a", "b", "a", "b"]) == "a"
    assert first_repeated(["a", "b"]) is None


def bomb(levels: int, leaf: str = "lol") -> str:
    """A kilobyte of aliases, written out 9 ** levels values."""
    lines = [f"a0: &a0 [{', '.join([leaf] * 9)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


class CountedNode(yaml.SequenceNode):
    """A node that counts how often its content is looked at."""

    looks = 0

    @property
    def value(self) -> Any:  # type: ignore[override]
        """The content."""
        CountedNode.looks += 1
        return self._value

    @value.setter
    def value(self, content: Any) -> None:
        self._value = content


def test_aliases_are_counted_without_being_written_out() -> None:
    mark = yaml.Mark("", 0, 0, 0, "", 0)
    node: Any = yaml.ScalarNode("tag:yaml.org,2002:str", "x", mark)
    CountedNode.looks = 0
    for _ in range(5000):
        node = CountedNode("tag:yaml.org,2002:seq", [node, node], mark)
    with pytest.raises(ValueError, match="once its aliases are written out"):
        check_nodes(node)
    assert CountedNode.looks < 5 * 5000


@pytest.mark.parametrize(
    "text",
    [
        bomb(9),
        bomb(60),
        bomb(3, leaf="x" * 900),
        "a: &a {k: 1}\nb: &b {<<: [*a, *a]}\n"
        + "".join(
            f"m{n}: &m{n} {{<<: [*{'b' if n == 0 else f'm{n - 1}'}, *{'b' if n == 0 else f'm{n - 1}'}]}}\n"
            for n in range(40)
        ),
        "a: &a [*a]\n",
        "a: &a {b: *a}\n",
        "x: " + "[" * 100_000,
        "x: '" + "x" * MOST_CHARACTERS + "'",
        "x: 1" + ":59" * 1000,
        "x: 1" + "0" * 5000,
        "{" + ", ".join(f"k{n % 300}: 1" for n in range(600)) + "}",
    ],
    ids=["bomb", "endless", "long", "merge", "loop", "loop in a mapping", "deep", "large", "base 60", "digits", "keys"],
)
@pytest.mark.parametrize("read", ["configuration", "space", "override"])
def test_a_hostile_document_is_refused_in_little_memory(text: str, read: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    readers: dict[str, Callable[[], Any]] = {
        "configuration": lambda: load_config(path),
        "space": lambda: load_space(path),
        "override": lambda: apply_override({}, f"a.b={text}"),
    }
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError) as caught:
            readers[read]()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**20
    assert len(str(caught.value)) < 1000


def test_aliases_in_measure_are_read() -> None:
    assert load_yaml("a: &x {k: 1}\nb: *x\nc: {<<: *x, d: 2}\n") == {
        "a": {"k": 1},
        "b": {"k": 1},
        "c": {"k": 1, "d": 2},
    }
    assert load_yaml("") is None


def test_twenty_thousand_unknown_settings_are_one_short_message(monkeypatch: pytest.MonkeyPatch) -> None:
    explained = []
    original = loading._explain
    monkeypatch.setattr(loading, "_explain", lambda *given: explained.append(given) or original(*given))
    with pytest.raises(ConfigError) as caught:
        parse_config({**{f"key{n}": 1 for n in range(KEYS)}, "model": {"path": "m", **{f"k{n}": 1 for n in range(9)}}})
    assert len(explained) == loading.MOST_FAULTS
    assert f"... and {KEYS + 10 - loading.MOST_FAULTS} more" in str(caught.value)


def test_a_wrong_value_is_not_repeated_whole() -> None:
    value: Any = ["x" * 1000] * 10
    for _ in range(40):
        value = [value] * 10
    with pytest.raises(ConfigError) as caught:
        parse_config({"model": {"path": "m"}, "questions": {"sources": [{"path": "q"}]}, "seed": value})
    assert "seed: " in str(caught.value)
    assert len(str(caught.value)) < 300


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "long").write_text("x" * 11)
    (tmp_path / "good").write_text("x" * 10)
    for name, reason in {"pipe": "no regular file", "zero": "no regular file", "long": "longer than 10"}.items():
        with pytest.raises(ValueError, match=reason):
            read_text(tmp_path / name, 10)
    assert read_text(tmp_path / "good", 10) == "x" * 10
    for name in ("pipe", "zero"):
        with pytest.raises(ConfigError, match="no regular file"):
            load_config(tmp_path / name)


def test_characters_that_json_escapes_in_two_halves_are_one() -> None:
    """A configuration may be JSON; its writers escape what lies beyond the 16-bit plane as two halves."""
    value = {"storage": "\U00010000", "\U0001f600 key": ["a\U0001f600b", "\ud800", "\ud800x\udc00"]}
    assert load_yaml(json.dumps(value)) == value
    with pytest.raises(ValueError, match="stands twice"):
        load_yaml('{"\\ud800\\udc00": 1, "\U00010000": 2}')
