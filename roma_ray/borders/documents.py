"""Strangers' YAML and JSON, read with bounded work: a limit on size, aliases written out, no key twice, in linear time."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from roma_ray.borders.text import printable

MOST_CHARACTERS = 1 << 18
"""Most characters of a YAML document with its aliases expanded; the largest of this project have some thousand."""
MOST_VALUES = 1 << 16
"""Most keys and values of a document with its aliases expanded."""
MOST_DIGITS = 400
"""Most characters of a number: one written to base 60, as YAML allows, takes time by the square of its length."""
MOST_LEVELS = 64
"""Most sections within sections: PyYAML looks at every open one again at each token."""
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with a limit on nesting, that reads JSON's escapes as JSON does."""

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """Join what JSON writes as two escapes: a character beyond the 16-bit plane."""
        node: yaml.ScalarNode = super().compose_scalar_node(anchor)
        if _SURROGATE.search(node.value):
            node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        return node

    def fetch_flow_collection_start(self, TokenClass: type[Any]) -> None:
        """Count an opened { or [."""
        super().fetch_flow_collection_start(TokenClass)
        self._check_depth(self.flow_level)

    def add_indent(self, column: int) -> bool:
        """Count an opened level of indentation."""
        added: bool = super().add_indent(column)
        self._check_depth(len(self.indents))
        return added

    def _check_depth(self, levels: int) -> None:
        if levels > MOST_LEVELS:
            raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels")


def read_yaml_file(path: Path) -> Any:
    """A file's YAML as plain data. Raises OSError where it cannot be read, ValueError or yaml.YAMLError for what `load_yaml` refuses."""
    return load_yaml(read_text(path, MOST_CHARACTERS))


def load_yaml(text: str) -> Any:
    """YAML as plain data.

    Raises yaml.YAMLError for what is none, ValueError for one that is too large, too deep, or has a key twice in one section.
    """
    loader, root = _composed(text)
    return None if root is None else loader.construct_document(root)


def compose_yaml(text: str) -> yaml.Node | None:
    """YAML as nodes, with their tags, of which none is followed. Raises as `load_yaml`."""
    return _composed(text)[1]


def _composed(text: str) -> tuple[yaml.SafeLoader, yaml.Node | None]:
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it is longer than {MOST_CHARACTERS} characters")
    loader = _Loader(text)
    root = loader.get_single_node()
    if root is not None:
        check_nodes(root)
    return loader, root


def check_nodes(root: yaml.Node) -> None:
    """Look once at every node of a composed document. Raises ValueError for what `load_yaml` refuses."""
    # Per node: values and characters with all aliases below written out.
    sizes: dict[int, tuple[int, int]] = {}
    open_: set[int] = set()
    waiting: list[tuple[yaml.Node, bool]] = [(root, False)]
    while waiting:
        node, done = waiting.pop()
        children = _children(node)
        if done:
            open_.discard(id(node))
            below = [sizes[id(child)] for child in children]
            sizes[id(node)] = 1 + sum(v for v, _ in below), _length(node) + sum(c for _, c in below)
            _refuse_large(*sizes[id(node)])
        elif id(node) in open_:
            raise ValueError(f"an alias leads back into itself (line {node.start_mark.line + 1})")
        elif id(node) not in sizes:
            _check_node(node)
            open_.add(id(node))
            waiting.append((node, True))
            waiting += [(child, False) for child in children]


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _length(node: yaml.Node) -> int:
    return len(node.value) if isinstance(node, yaml.ScalarNode) else 0


def _refuse_large(values: int, characters: int) -> None:
    if values > MOST_VALUES or characters > MOST_CHARACTERS:
        raise ValueError(
            f"it holds more than {MOST_VALUES} values or {MOST_CHARACTERS} characters once its aliases are written out"
        )


def _check_node(node: yaml.Node) -> None:
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = first_repeated(keys)
        if twice is not None:
            raise ValueError(f"`{printable(twice, 40)}` stands twice in one section (line {node.start_mark.line + 1})")
    elif node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(node.value) > MOST_DIGITS:
        raise ValueError(f"a number of {len(node.value)} characters (line {node.start_mark.line + 1})")


def first_repeated(keys: Iterable[str]) -> str | None:
    """The first key that was there before, or None."""
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    return None


def read_text(path: Path, most_characters: int) -> str:
    """A small text file. Raises OSError; ValueError where it is no regular file, no UTF-8, or longer than it may be."""
    # A pipe may never end.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, encoding="utf-8") as stream:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is no regular file but a folder, pipe or device")
        text = stream.read(most_characters + 1)
    if len(text) > most_characters:
        raise ValueError(f"it is longer than {most_characters} characters")
    return text
