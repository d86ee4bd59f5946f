"""What of a run is complete, and of the rest: what differs from the most alike that the storage has, and what it would cost.

Reads manifests alone. An identity is plain data, so the difference of two is a list of settings with two values each.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from roma_ray.borders.text import duration_text, printable, size_text
from roma_ray.engine.setup import Setup
from roma_ray.errors import ArtifactError
from roma_ray.runs.pipeline import STEPS, locate
from roma_ray.stages.finetuning import FINETUNE
from roma_ray.stages.paired_evaluation import EVALUATE
from roma_ray.stages.task_loss_alone import without_regularizer
from roma_ray.store.artifacts import MANIFEST, Stage, read_manifest
from roma_ray.store.files import exists, listed

COMPLETE, ABSENT, BEGUN, RELEASED, DAMAGED = "complete", "to do", "to do, begun", "to do, cache removed", "damaged"
_WIDTH, _INDENT = 80, 4
# Where a stage's settings have other names in a configuration than the stage's own section gives them.
_SECTIONS = {"extract": "extraction", "embed": "embedding"}
_NAMES = {
    "threads": "threads",
    "device": "device",
    "seed": "seed",
    "name": "name",
    "dtype": "model.dtype",
    "experts_backend": "model.experts_backend",
    "attention": "model.attention",
    "tokenizer": "model (its files)",
    "layers": "routing.layers",
    "cuts": "routing.layers (cuts)",
    "tokens": "routing.tokens",
    "rule": "questions.prompt (the answer rule)",
    "fraction": "questions.fraction",
    "fraction_seed": "questions.seed",
    "held_out_tasks": "questions.held_out_tasks",
}
_NO_SETTING = object()
BESIDE = "by the task loss alone, beside it"


@dataclass(frozen=True)
class StageReport:
    """One stage of a run as it stands."""

    stage: Stage
    state: str
    nearest: str | None = None
    """Fingerprint of the complete stage that differs least from one that is to be done; None where there is no other."""
    differences: tuple[str, ...] = ()
    """In what: settings, inputs, the version, in sentences."""
    seconds: float | None = None
    """What it would take again, as the nearest one took."""
    bytes: int | None = None
    note: str = ""


def explain(setup: Setup) -> list[StageReport]:
    """Every stage of a run in their order, those of the task loss alone before the report. Raises QuestionError when a question
    file is gone.
    """
    planned = locate(setup)
    found = [_look(stage) for stage in planned.values()]
    if (other := without_regularizer(setup)) is not None:
        there = locate(other)
        beside = [_look(there[name]) for name in (FINETUNE.name, EVALUATE.name)]
        noted = [replace(one, note="; ".join(filter(None, (BESIDE, one.note)))) for one in beside]
        found = [*found[:-1], *noted, found[-1]]
    if any(STEPS[told.stage.name].reads_states and told.state != COMPLETE for told in found):
        return found
    # Nobody reads what was removed.
    return [_complete(told.stage) if told.state == RELEASED else told for told in found]


def _look(stage: Stage) -> StageReport:
    if not stage.complete:
        state = BEGUN if exists(stage.path) else ABSENT
        return _compared(stage, state, list(manifests(stage)))
    try:
        manifest = stage.manifest()
    except ArtifactError as error:
        return StageReport(stage, DAMAGED, note=str(error))
    if manifest.get("released"):
        return StageReport(stage, RELEASED, stage.fingerprint, (), *_cost(manifest))
    return _complete(stage)


def _complete(stage: Stage) -> StageReport:
    return StageReport(stage, COMPLETE, note=stage.other_versions() or "")


def manifests(stage: Stage) -> Iterator[dict[str, Any]]:
    """Those of the complete stages of the same kind in the storage; damaged ones are left out."""
    for path in listed(stage.path.parent, f"*/{MANIFEST}"):
        with contextlib.suppress(ArtifactError):
            yield read_manifest(path.parent)


def _compared(stage: Stage, state: str, others: Sequence[Mapping[str, Any]]) -> StageReport:
    """The stage beside the one of the others that differs least; of equals the one that was finished last."""
    if not others:
        return StageReport(stage, state)
    ranked = [(differences(other["identity"], stage.identity, stage.name), other) for other in others]
    fewest = min(len(found) for found, _ in ranked)
    found, nearest = max(((f, o) for f, o in ranked if len(f) == fewest), key=lambda pair: str(pair[1].get("finished")))
    return StageReport(stage, state, str(nearest["fingerprint"]), tuple(found), *_cost(nearest))


def _cost(manifest: Mapping[str, Any]) -> tuple[float, int]:
    files = {**manifest["files"], **manifest.get("released", {})}
    return float(manifest.get("seconds", 0.0)), sum(int(fact["bytes"]) for fact in files.values())


def differences(there: Mapping[str, Any], here: Mapping[str, Any], stage: str) -> list[str]:
    """In what two identities of a stage differ, a sentence each: version, settings by dotted name, inputs."""
    found = []
    if there.get("version") != here.get("version"):
        found.append(f"version {here.get('version')} of this stage (there {there.get('version')})")
    before, after = (dict(_flat(_mapping(identity.get("settings")))) for identity in (there, here))
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key, _NO_SETTING), after.get(key, _NO_SETTING)
        if old != new:
            found.append(_sentence(key, old, new, stage))
    before, after = (dict(_mapping(identity.get("inputs"))) for identity in (there, here))
    found += [f"made of another {key}" for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested settings with dotted names; lists of plain values stay whole."""
    if isinstance(value, Mapping):
        parts: Any = value.items()
    elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
        parts = enumerate(value)
    else:
        yield prefix, value
        return
    for key, part in parts:
        yield from _flat(part, f"{prefix}.{key}" if prefix else str(key))


def _sentence(key: str, old: Any, new: Any, stage: str) -> str:
    if key.startswith("sources.") and key.endswith(".path") and all(_is_file(value) for value in (old, new)):
        # Of a file its name and its content's digest.
        if old[0] == new[0]:
            return f"{name_of(key, stage)}: the content of {printable(new[0])} is another"
        old, new = old[0], new[0]
    if key in ("model", "tokenizer") and stage in ("questions", "extract", "finetune", "baselines"):
        return f"model.path or its files: {_shown(new)} (there {_shown(old)})"
    return f"{name_of(key, stage)}: {_shown(new)} (there {_shown(old)})"


def _is_file(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def name_of(key: str, stage: str) -> str:
    """A setting of a stage's identity by the name that configurations have for it."""
    if stage == "questions" and key == "seed":
        return "questions.seed"
    return _NAMES.get(key) or f"{_SECTIONS.get(stage, stage)}.{key}"


def _shown(value: Any) -> str:
    return "not set" if value is _NO_SETTING else printable(value, 60)


def described(told: Sequence[StageReport]) -> list[str]:
    """What `roma-ray explain` prints: no line is longer than a terminal of 80 columns."""
    lines = []
    for one in told:
        lines.append(f"{one.stage.name:<10} {one.state:<21} {one.stage.fingerprint}")
        if one.note:
            lines += _wrapped(one.note)
        if one.state in (COMPLETE, DAMAGED):
            continue
        if one.nearest is None:
            lines += _wrapped(f"the storage has no complete {one.stage.name} to compare it with; its cost is not known")
            continue
        if one.differences:
            lines += _wrapped(f"nearest complete: {one.nearest}, which differs in")
        for difference in one.differences:
            lines += _wrapped(difference, more=2)
        lines += _wrapped(f"again: about {_amount(one.seconds or 0.0, one.bytes or 0)}")
    return [*lines, *_wrapped(_whole(told), indent=0)]


def _whole(told: Sequence[StageReport]) -> str:
    damaged = [one.stage.name for one in told if one.state == DAMAGED]
    if damaged:
        return f"damaged: {', '.join(damaged)}; a run stops there until its folder is removed"
    left = [one for one in told if one.state != COMPLETE]
    if not left:
        return "all complete: a run does nothing again"
    known = [one for one in left if one.seconds is not None]
    amount = _amount(sum(one.seconds or 0.0 for one in known), sum(one.bytes or 0 for one in known))
    unknown = [one.stage.name for one in left if one.seconds is None]
    text = f"a run does {len(left)} of {len(told)} stages"
    text += f": about {amount}, as the nearest ones took" if known else ""
    return text + (f" (not known: {', '.join(unknown)})" if unknown else "")


def _amount(seconds: float, size: int) -> str:
    return f"{duration_text(seconds)} and {size_text(size)}"


def _wrapped(text: str, *, indent: int = _INDENT, more: int = 0) -> list[str]:
    margin = " " * (indent + more)
    return textwrap.wrap(
        printable(text, None), _WIDTH, initial_indent=margin, subsequent_indent=margin + "  ", break_on_hyphens=False
    )
