"""Task files of the user's own: what in one would run code, and a sandbox for its templates."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from roma_ray.borders.documents import MOST_CHARACTERS, compose_yaml, read_text
from roma_ray.borders.templates import Renderer
from roma_ray.borders.text import printable
from roma_ray.errors import ConfigError

if TYPE_CHECKING:
    from jinja2 import Environment, Template

_FLAG = "If you trust its author, allow it with --allow-code."
# Settings by which a definition loads code from elsewhere, whatever their value but false.
_LOADING = {"hf_evaluate", "unsafe_code", "trust_remote_code", "class", "custom_dataset", "use_prompt"}


def check_task_file(path: Path, *, allow_code: bool) -> None:
    """Refuse a task file that cannot be read, or that would execute code without being allowed to. Raises ConfigError.

    The files that it includes are looked at too.
    """
    if not path.exists():
        raise ConfigError(f"there is no task file {path}")
    waiting: list[Path] = [path]
    seen: set[Path] = set()
    while waiting:
        file = _resolved(waiting.pop())
        if file not in seen and not _stock(file):
            seen.add(file)
            waiting += _includes(file, allow_code=allow_code)


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"the task file {printable(str(path))} cannot be read: {error}") from None


def _includes(path: Path, *, allow_code: bool) -> Iterator[Path]:
    """The files that a task file includes, after a check of its own content."""
    try:
        root = compose_yaml(read_text(path, MOST_CHARACTERS))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"the task file {path} cannot be read: {str(error).splitlines()[0]}") from None
    if root is None:
        raise ConfigError(f"the task file {path} is empty")
    for key, node in _nodes(root):
        if not allow_code:
            _refuse_code(path, key, node)
        if key == "include" and isinstance(node, yaml.ScalarNode):
            yield path.parent / node.value


def _refuse_code(path: Path, key: str, node: yaml.Node) -> None:
    if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
        raise ConfigError(f"the task file {path} would run code ({node.tag}, line {_line(node)}). {_FLAG}")
    if key in _LOADING and getattr(node, "value", None) not in ("false", "False", "no", "null", ""):
        raise ConfigError(f"the task file {path} would run code (`{key}`, line {_line(node)}). {_FLAG}")
    if key == "metric" and isinstance(node, yaml.ScalarNode) and node.value not in _metrics():
        # lm-eval would load a metric that it does not know as code, from a file or the hub.
        raise ConfigError(
            f"the task file {path} would run code (metric `{node.value}` is none of lm-eval's, line {_line(node)}). {_FLAG}"
        )


def _nodes(root: yaml.Node) -> Iterator[tuple[str, yaml.Node]]:
    """Every node with the key that it stands under (a list's items stand under the list's)."""
    waiting: list[tuple[str, yaml.Node]] = [("", root)]
    visited: set[tuple[str, int]] = set()
    while waiting:
        key, node = waiting.pop()
        # Aliases make one node appear often; what it means goes by the key.
        if (key, id(node)) in visited:
            continue
        visited.add((key, id(node)))
        yield key, node
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


class LimitedEnvironment:
    """What lm-eval needs of an environment, for templates of strangers: they are rendered in the sandbox, and within limits."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.renderer = Renderer(f"{__name__}:{render.__name__}")

    def from_string(self, template: str) -> LimitedTemplate:
        """The template."""
        return LimitedTemplate(self, template)


@dataclass(frozen=True)
class LimitedTemplate:
    """A template of a `LimitedEnvironment`."""

    environment: LimitedEnvironment
    text: str

    def render(self, **values: Any) -> str:
        """The rendered text. Raises ConfigError, jinja2.TemplateError (see `Renderer.render`)."""
        return self.environment.renderer.render(self.text, values, self.environment.what)


def render(template: str, values: Mapping[str, Any]) -> str:
    """A template with lm-eval's filters in the sandbox; it runs in the renderer's process."""
    return _compiled(template).render(**values)


@cache
def _compiled(template: str) -> Template:
    import lm_eval.utils

    return sandboxed(lm_eval.utils.env).from_string(template)
