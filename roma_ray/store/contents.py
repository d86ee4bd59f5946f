"""What lies in the storage: runs by name, what each depends on, how large it is, and what may go without loss.

A run is a stage that no other one is built on, with all that it is built on. Only folders that this project makes are seen:
`<stage>/<16 hex digits>`, no links. Nothing is removed while a run is at work (`Store.alone`).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from roma_ray.errors import ArtifactError, ConfigError, OddNameError, StorageError
from roma_ray.store.artifacts import CONFIG, IDENTITY, MANIFEST, MEMBERS, Stage, Store, read_manifest
from roma_ray.store.buckets import UnfinishedUploads, is_object
from roma_ray.store.files import (
    entries,
    exists,
    is_folder,
    is_link,
    is_special,
    listed,
    read_json,
    read_text,
    remove_folder,
)

KINDS = {
    "report": "run",
    "evaluate": "run, without report",
    "finetune": "finetuning",
    "sweep": "sweep",
    "verdict": "verdict",
    "comparison": "methods",
    "baselines": "method",
    "benchmarks": "benchmarks",
    "repair": "repair",
    "teacher": "what a teacher says",
    "neighbors": "neighborhoods",
    "embed": "embeddings",
    "extract": "extraction",
    "questions": "questions",
    "requests": "answers to benchmarks",
    "base": "base scores",
    "states": "states of benchmarks",
}
"""What a run is called, by the stage that it ends in; the stages that most runs contain come last."""
# Shared work that only saves time: no stage names it as its input.
_HELPERS = ("base", "states")
# They list the runs that they tell of beside their inputs.
_OF_MANY = ("sweep", "verdict")
# A run that was stopped between two stages ends in one of these. One that was meant to end there left its configuration.
_PARTS = ("questions", "extract", "embed", "neighbors", "requests")
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")


@dataclass(eq=False)
class Item:
    """One stage's folder."""

    stage: Stage
    state: str
    """`complete`, `unfinished` (a run that was stopped goes on from it) or `damaged`."""
    inputs: tuple[str, ...]
    """Fingerprints of the stages that it is built on."""
    name: str
    time: float
    """When it was finished, or last written to: seconds since 1970."""
    bytes: int
    cache_bytes: int
    """Bytes of activations: they can be computed again, and only new training needs them."""
    users: list[Item] = field(default_factory=list)
    """Stages that are built on it, directly."""

    @property
    def kind(self) -> str:
        """Name of the stage: the folder that it lies in."""
        return self.stage.path.parent.name

    @property
    def title(self) -> str:
        """What a run that ends in this stage is called; of a stage without a title, its own name."""
        return KINDS.get(self.kind, self.kind)

    @property
    def id(self) -> str:
        """Its fingerprint."""
        return self.stage.fingerprint


@dataclass(frozen=True)
class Removal:
    """What would go: whole stages, or their caches alone; why, and how much it frees."""

    item: Item
    why: str
    cache_alone: bool = False

    @property
    def bytes(self) -> int:
        """What it frees."""
        return self.item.cache_bytes if self.cache_alone else self.item.bytes


class Storage:
    """A storage as it lies on the disk now."""

    def __init__(self, store: Store) -> None:
        """Look through it. Raises StorageError when there is none, or none that may be read."""
        self.store = store
        if not is_folder(store.root):
            raise StorageError(f"there is no storage at {store.root}: name one with --storage")
        try:
            self.items = {item.id: item for item in _items(store.root)}
        except OSError as error:
            raise StorageError(
                f"cannot read {error.filename or store.root}: {error.strerror or error}. Make it readable, or name another "
                "storage with --storage"
            ) from error
        for item in self.items.values():
            for fingerprint in item.inputs:
                if fingerprint in self.items and fingerprint != item.id:
                    self.items[fingerprint].users.append(item)

    def runs(self) -> list[Item]:
        """Stages that nothing is built on, the newest first."""
        found = [item for item in self.items.values() if not _users(item) and item.kind not in _HELPERS]
        return sorted(found, key=lambda item: (-item.time, item.id))

    def title(self, run: Item) -> str:
        """The name of a run: its own, or that of a stage that it is built on."""
        return next((item.name for item in self.needs(run) if item.name), "")

    def needs(self, *runs: Item) -> list[Item]:
        """The runs and everything that they are built on, each before what it is built on."""
        found: dict[str, Item] = {}
        # Not by recursion: identities are read from files, which may name one another in a circle or in a long row.
        seen: set[str] = set()
        for run in runs:
            way = [] if run.id in seen else [(run, iter(run.inputs))]
            seen.add(run.id)
            while way:
                item, inputs = way[-1]
                fingerprint = next((one for one in inputs if one in self.items and one not in seen), None)
                if fingerprint is None:
                    found.setdefault(item.id, item)
                    way.pop()
                else:
                    seen.add(fingerprint)
                    below = self.items[fingerprint]
                    way.append((below, iter(below.inputs)))
        return list(reversed(found.values()))

    def alone(self, *runs: Item) -> list[Item]:
        """The stages that only these runs need, and that are removed with them; shared helpers of an extraction go with it."""
        others = [run for run in self.runs() if run not in runs]
        kept = {item.id for item in self.needs(*others)}
        mine = [item for item in self.needs(*runs) if item.id not in kept]
        gone = {item.id for item in mine}
        helpers = [i for i in self.items.values() if i.kind in _HELPERS and set(i.inputs) & gone]
        return [*helpers, *mine]

    def find(self, text: str) -> Item:
        """The run of a name, or the stage of an id or of its beginning (`3fa1`, `extract/3fa1`). Raises ConfigError, ArtifactError."""
        named = [run for run in self.runs() if self.title(run) == text]
        kind, _, start = text.rpartition("/")
        by_id = [i for i in self.items.values() if start and i.id.startswith(start) and kind in ("", i.kind)]
        found = named or by_id
        if not found:
            raise ArtifactError(
                f"nothing in {self.store.root} has the name or id {text!r}: `roma-ray ls` lists what there is"
            )
        if len(found) > 1:
            known = ", ".join(f"{item.kind}/{item.id}" for item in found)
            raise ConfigError(f"{text!r} can be any of {known}: give one's id")
        return found[0]

    def removal(self, wanted: Sequence[Item]) -> list[Removal]:
        """What goes with the wanted runs. Raises ArtifactError when another run is built on one of them."""
        for item in wanted:
            users = [user for user in _users(item) if user not in wanted]
            if users:
                built = ", ".join(f"{user.kind}/{user.id}" for user in users)
                raise ArtifactError(f"{item.kind}/{item.id} is what {built} is built on: remove that first")
        return [
            Removal(item, "asked for" if item in wanted else "no other run needs it") for item in self.alone(*wanted)
        ]

    def garbage(self, *, unfinished: bool) -> list[Removal]:
        """What may go without loss of a result, caches first; `unfinished`: also what stopped runs would go on from."""
        found = []
        for item in self.items.values():
            done = all(user.state == "complete" for user in _users(item))
            if item.kind == "states" or (item.kind == "extract" and item.cache_bytes and _trained(item) and done):
                found.append(Removal(item, "cache: new training makes it again", cache_alone=item.kind == "extract"))
        if unfinished:
            left = [run for run in self.runs() if run.state != "complete" or (run.kind in _PARTS and not run.name)]
            why = {run.id: "no run ends in it" if run.state == "complete" else run.state for run in left}
            whole = [Removal(item, why.get(item.id, "for what is unfinished alone")) for item in self.alone(*left)]
            gone = {removal.item.id for removal in whole}
            found = [removal for removal in found if removal.item.id not in gone] + whole
        return found

    def unfinished_uploads(self) -> list[tuple[str, str]]:
        """Uploads to a bucket that killed processes left in the middle. Raises BucketError, StorageError."""
        return UnfinishedUploads(self.store.root).found if self.store.in_bucket else []

    def abort_uploads(self) -> None:
        """Remove them. Raises BusyError while a run is at work, BucketError, StorageError."""
        with self.store.alone():
            UnfinishedUploads(self.store.root).abort()

    def remove(self, removals: Iterable[Removal], say: Callable[[str], None]) -> int:
        """Remove them, whatever is built on something before that; the bytes freed. Raises BusyError, StorageError."""
        freed = 0
        with self.store.alone():
            for removal in removals:
                stage = removal.item.stage
                if is_link(stage.path) or is_link(stage.path.parent):
                    continue  # it became a link after it was listed
                with stage.exclusive():
                    if removal.cache_alone:
                        stage.release(_cache_names(stage.manifest()["files"]))
                    elif is_special(stage.path / MANIFEST):
                        raise StorageError(
                            f"{stage.path / MANIFEST} is a folder, which no stage writes: remove it by hand"
                        )
                    else:
                        stage.discard()
                if not removal.cache_alone and exists(stage.path):
                    remove_folder(stage.path)
                if not removal.cache_alone and exists(stage.path):
                    raise StorageError(f"cannot remove {stage.path}: it is not yours, or the storage is read-only")
                say(f"removed {removal.item.kind}/{removal.item.id}{' (its cache)' if removal.cache_alone else ''}")
                freed += removal.bytes
        return freed


def _users(item: Item) -> list[Item]:
    return [user for user in item.users if user.kind not in _HELPERS]


def _trained(item: Item) -> bool:
    """Whether a finished training has read an extraction's cache."""
    return any(user.kind == "finetune" and user.state == "complete" for user in item.users)


def _items(root: Path) -> Iterator[Item]:
    for path, files in _folders(root):
        item = _item(path, files)
        # What has no title here is a stage where it says so itself.
        if item.kind in KINDS or item.stage.identity.get("stage") == item.kind:
            yield item


Files = dict[str, tuple[int, float]]
"""A stage's files: name below its folder -> bytes, when it was put."""


def _folders(root: Path) -> Iterator[tuple[Path, Files]]:
    """Every folder that may be a stage's, those with a title first, and its files."""
    if not is_object(root):
        yield from ((path, dict(_files(path))) for path in _local_folders(root))
        return
    ranks = {kind: rank for rank, kind in enumerate(KINDS)}
    # Not all at once: what else lies below the prefix may be another program's, with names that no file can have.
    for kind in sorted(listed(root), key=lambda path: (ranks.get(path.name, len(ranks)), path)):
        if kind.name in KINDS or _holds_stages(kind):
            yield from sorted(_stages_below(kind).items())


def _holds_stages(folder: Path) -> bool:
    try:
        return folder.name[0] != "." and any(_FINGERPRINT.fullmatch(path.name) for path in listed(folder))
    except OddNameError:
        return False


def _stages_below(kind: Path) -> dict[Path, Files]:
    found: dict[Path, Files] = {}
    for path, size, written in entries(kind):
        name, *rest = path.relative_to(kind).parts
        if rest and _FINGERPRINT.fullmatch(name):
            found.setdefault(kind / name, {})["/".join(rest)] = (size, written)
    return found


def _local_folders(root: Path) -> Iterator[Path]:
    others = sorted(folder.name for folder in root.iterdir() if folder.name not in KINDS)
    for kind in (*KINDS, *others):
        folder = root / kind
        if folder.is_symlink() or not folder.is_dir():
            continue
        try:
            paths = sorted(folder.iterdir())
        except OSError:
            if kind in KINDS:
                raise
            continue  # not ours, as the lost+found of a mounted file system
        yield from (p for p in paths if _FINGERPRINT.fullmatch(p.name) and p.is_dir() and not p.is_symlink())


def _item(path: Path, files: Files) -> Item:
    kind = path.parent.name
    state, identity = "unfinished", _plain(path, IDENTITY, files)
    finished = max((written for _, written in files.values()), default=0.0) if is_object(path) else path.stat().st_mtime
    if MANIFEST in files:
        try:
            manifest = read_manifest(path)
            state, identity = "complete", manifest["identity"]
            with suppress(ValueError, KeyError, TypeError):
                finished = _seconds(manifest["finished"])
        except ArtifactError:
            state = "damaged"
    inputs, settings = (_mapping(identity.get(key)) for key in ("inputs", "settings"))
    members = _plain(path, MEMBERS, files)
    trials = members.get("stages") if kind in _OF_MANY else None
    fingerprints = [*inputs.values(), *(trials if isinstance(trials, list) else [])]
    name = settings.get("name") if kind in ("report", "comparison") else _configured_name(path, files)
    caches = set(_cache_names(files)) if kind == "extract" else set()
    return Item(
        Stage(path, kind, identity),
        state,
        tuple(dict.fromkeys(value for value in fingerprints if isinstance(value, str))),
        name if isinstance(name, str) else "",
        finished,
        sum(size for size, _ in files.values()),
        sum(size for file, (size, _) in files.items() if file in caches),
    )


def _cache_names(files: Iterable[str]) -> list[str]:
    """An extraction's activations, relative to its folder."""
    return sorted(name for name in files if name.startswith("batches/") and name.endswith(".safetensors"))


def _files(folder: Path) -> Iterator[tuple[str, tuple[int, float]]]:
    """Every file below a folder, by its name below it; links are not followed, and are none."""
    waiting = [str(folder)]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as found:
            for entry in found:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    status = entry.stat(follow_symlinks=False)
                    yield os.path.relpath(entry.path, folder), (status.st_size, status.st_mtime)


def _plain(path: Path, name: str, files: Files) -> dict[str, Any]:
    try:
        value = read_json(path / name) if name in files and not is_special(path / name) else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return _mapping(value)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _configured_name(path: Path, files: Files) -> str:
    """The name in the configuration that a run leaves beside its last stage."""
    file = path / CONFIG
    try:
        for line in read_text(file).splitlines() if CONFIG in files and not is_special(file) else ():
            if line.startswith("name:"):
                name = _mapping(yaml.safe_load(line)).get("name")
                return name if isinstance(name, str) else ""
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        pass
    return ""


def _seconds(text: str) -> float:
    import calendar

    return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))
