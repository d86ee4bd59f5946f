"""Task files of the user's own: what in one would run code, and a sandbox for its templates."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from roma_ray.errors import ConfigError

if TYPE_CHECKING:
    from jinja2 import Environment

_FLAG = "If you trust its author, allow it with --allow-code."
# Settings by which a definition loads code from elsewhere, whatever their value but false.
_LOADING = {"hf_evaluate", "unsafe_code", "trust_remote_code", "class", "custom_dataset", "use_prompt"}


def check_task_file(path: Path, *, allow_code: bool) -> None:
    """Refuse a task file that cannot be read, or that would execute code without being allowed to. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"there is no task file {path}")
    if not allow_code:
        _check(path.resolve(), set())


def _check(path: Path, seen: set[Path]) -> None:
    if path in seen or _stock(path):
        return
    seen.add(path)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"the task file {path} cannot be read: {str(error).splitlines()[0]}") from None
    if root is None:
        raise ConfigError(f"the task file {path} is empty")
    for key, node in _nodes(root):
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
            raise ConfigError(f"the task file {path} would run code ({node.tag}, line {_line(node)}). {_FLAG}")
        if key in _LOADING and getattr(node, "value", None) not in ("false", "False", "no", "null", ""):
            raise ConfigError(f"the task file {path} would run code (`{key}`, line {_line(node)}). {_FLAG}")
        if key == "metric" and isinstance(node, yaml.ScalarNode) and node.value not in _metrics():
            # lm-eval would load a metric that it does not know as code, from a file or the hub.
            raise ConfigError(
                f"the task file {path} would run code (metric `{node.value}` is none of lm-eval's, line {_line(node)}). {_FLAG}"
            )
        if key == "include" and isinstance(node, yaml.ScalarNode):
            _check((path.parent / node.value).resolve(), seen)


def _nodes(root: yaml.Node) -> Iterator[tuple[str, yaml.Node]]:
    """Every node with the key that it stands under (a list's items stand under the list's)."""
    waiting: list[tuple[str, yaml.Node]] = [("", root)]
    visited: set[int] = set()
    while waiting:
        key, node = waiting.pop()
        yield key, node
        # Aliases make one node appear often, or within itself.
        if id(node) in visited:
            continue
        visited.add(id(node))
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                yield "", name
                waiting.append((str(getattr(name, "value", "")), value))
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(key, value) for value in node.value]


def _metrics() -> Collection[str]:
    """The metrics that lm-eval itself has."""
    import lm_eval.api.metrics  # noqa: F401 - fills the registry
    from lm_eval.api.registry import METRIC_REGISTRY

    return set(METRIC_REGISTRY)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _stock(path: Path) -> bool:
    """Whether a file is one of lm-eval's own."""
    import lm_eval.tasks

    return path.is_relative_to(Path(lm_eval.tasks.__file__).resolve().parent)


def sandboxed(environment: Environment) -> Environment:
    """lm-eval's template environment with Jinja's sandbox: no attribute of a value leads to Python's internals."""
    from jinja2.sandbox import SandboxedEnvironment

    safe = SandboxedEnvironment(
        loader=environment.loader,
        undefined=environment.undefined,
        keep_trailing_newline=environment.keep_trailing_newline,
    )
    safe.filters.update(environment.filters)
    return safe
