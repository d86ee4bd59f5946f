"""Reading a configuration: YAML in, `--set a.b=c` on top, unknown keys refused with the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from roma_ray.borders.addresses import mask, mask_text
from roma_ray.borders.documents import load_yaml, read_yaml_file
from roma_ray.borders.text import brief, printable
from roma_ray.config.schema import Config
from roma_ray.errors import ConfigError

EMBEDDED = "embedded default"
_LONGEST_PART = 100

MOST_FAULTS = 20
"""Faults that one message lists."""


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration (default: the embedded one) and apply `a.b=c` overrides.

    Raises ConfigError: unreadable file, unknown key (with the nearest valid name), wrong type or value.
    """
    source = Path(path) if path is not None else Path(__file__).parents[1] / "assets" / "demo.yaml"
    data = overridden(read_settings(source), overrides)
    if "name" not in data:
        model = data["model"].get("path") if isinstance(data.get("model"), dict) else None
        data["name"] = default_name(source.stem if path is not None else EMBEDDED, model)
    return parse_config(data, str(source))


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration with further `a.b=c` overrides. Raises ConfigError."""
    return parse_config(overridden(config.model_dump(mode="json"), overrides), config.name)


def overridden(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Plain data after `a.b=c` overrides. Raises ConfigError."""
    for override in overrides:
        apply_override(data, override)
    return data


def default_name(stem: str, model: object = None) -> str:
    """What a run or sweep is called whose file, of this stem, gives no name; with its model, where the stem does not tell it."""
    name = printable(stem, _LONGEST_PART)
    if not isinstance(model, str) or model.startswith("assets:"):
        return name
    base = printable(Path(model).name, _LONGEST_PART)
    return name if name.lower() in base.lower() else f"{name} ({base})"


def read_settings(source: Path) -> dict[str, Any]:
    """A YAML file's settings as plain data. Raises ConfigError when it cannot be read, is no YAML, or has a key twice."""
    try:
        data = read_yaml_file(source)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {source}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source} is not valid YAML: {mask_text(str(error))}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source} must hold settings (`key: value` lines), not {type(data).__name__}")
    return data


def parse_config(data: Mapping[str, Any], origin: str = "the configuration") -> Config:
    """Validate plain data into a Config. Raises ConfigError with every fault in one message."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        # pydantic reports each alternative of a union, and a list emptied by a bad item, as faults too: keep one line a place.
        faults: dict[str, Any] = {}
        above: set[str] = set()
        for fault in error.errors(include_url=False):
            place = _place(fault["loc"])
            if place not in above:
                faults.setdefault(place, fault)
                parts = place.split(".")
                above |= {".".join(parts[:length]) for length in range(1, len(parts))}
        lines = [f"  {_explain(faults[place], place)}" for place in list(faults)[:MOST_FAULTS]]
        if len(faults) > len(lines):
            lines.append(f"  ... and {len(faults) - len(lines)} more")
        listed = "\n".join(lines)
        raise ConfigError(f"{origin}: {len(faults)} setting(s) are not valid:\n{listed}") from None


def _place(location: Sequence[str | int]) -> str:
    """A fault's place as the user wrote it: pydantic appends the alternative of a union that it tried."""
    parts = list(location)
    while (
        len(parts) > 1
        and isinstance(parts[-1], str)
        and parts[-1] not in _names_at(parts[:-1])
        and _names_at(parts[:-2])
    ):
        if parts[-1].isidentifier() and parts[-1] not in {"str", "float", "int"}:
            break
        parts.pop()
    return ".".join(str(part) for part in parts)


def apply_override(data: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c` to nested data in place; the value is read as YAML. Raises ConfigError."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    shown = printable(mask_text(override))
    if not separator or not all(parts):
        raise ConfigError(f"--set {shown!r}: write it as section.key=value, e.g. finetune.epochs=1")
    try:
        value = load_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set {shown!r}: the value is not valid YAML: {mask_text(str(error))}") from None
    node: Any = data
    for part in parts[:-1]:
        child = node.get(part) if isinstance(node, dict) else None
        if child is None and isinstance(node, dict):
            child = node[part] = {}
        if isinstance(child, list) or not isinstance(child, dict):
            raise ConfigError(f"--set {shown!r}: `{part}` is not a section; set the whole value with YAML instead")
        node = child
    node[parts[-1]] = value


_MODEL = "no model is named: a local folder or a Hugging Face id; `assets:model` is the one that ships with the package"
_WANTED = {
    "model": f"{_MODEL} (model: {{path: assets:model}})",
    "model.path": _MODEL,
    "questions": "no questions are named (questions: {sources: [{path: my-questions.jsonl}]}); `assets:questions/train.jsonl` and "
    "`assets:questions/test.jsonl` ship with the package",
    "questions.sources": "no source is named ([{path: my-questions.jsonl}])",
}


def _explain(fault: dict[str, Any], where: str) -> str:
    """One readable line for a pydantic fault, with the nearest valid name for an unknown key."""
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error" and isinstance(fault.get("input"), dict):
        # The message names the setting already; the section's whole content is left out.
        return f"{where}: {message}" if where else message
    if fault["type"] == "missing" and where in _WANTED:
        return f"{where}: {_WANTED[where]}"
    if fault["type"] != "extra_forbidden":
        given = fault.get("input")
        # A secret may stand in the wrong place; so nothing is repeated unmasked.
        shown = repr(mask(given)) if isinstance(given, str) and ":" in given else mask_text(brief(given))
        return f"{where}: {message} (got {shown:.80})"
    return f"{where}: unknown setting; {meant(fault['loc'])}"


def meant(key: Sequence[str | int]) -> str:
    """The message for an unknown setting: it names the nearest valid one of any section."""
    parts = [part for part in key if isinstance(part, str)]
    everywhere = all_settings()
    elsewhere = [name for name in everywhere if name.rpartition(".")[2] == parts[-1]]
    known = _names_at(key[:-1])
    near = difflib.get_close_matches(parts[-1], known, n=1, cutoff=0.4)
    if elsewhere:
        return f"did you mean {' or '.join(f'`{name}`' for name in elsewhere[:3])}?"
    if near:
        return f"did you mean `{near[0]}`?"
    leaves = {name.rpartition(".")[2]: name for name in reversed(everywhere)}
    far = difflib.get_close_matches(parts[-1], leaves, n=1, cutoff=0.75)
    return f"did you mean `{leaves[far[0]]}`?" if far else f"known: {', '.join(known or Config.model_fields)}"


def all_settings(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every section and setting by its full name; those of a list's items are left out."""
    names = []
    for name, field in section.model_fields.items():
        names.append(f"{prefix}{name}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += all_settings(field.annotation, f"{prefix}{name}.")
    return names


def given_settings(config: BaseModel, prefix: str = "") -> dict[str, bool]:
    """The settings that a file or `--set` named, by full name, and whether each is other than its default."""
    found: dict[str, bool] = {}
    for name in config.model_fields_set:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            found |= given_settings(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value != type(config).model_fields[name].get_default(call_default_factory=True)
    return found


def _names_at(path: Sequence[str | int]) -> list[str]:
    """Field names of the section at a location, lists looked through."""
    section: type[BaseModel] = Config
    for part in path:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        annotation: Any = field.annotation if field else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            return []
        section = nested[0]
    return list(section.model_fields)
