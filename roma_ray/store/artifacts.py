"""Where a stage's output lives, what identifies it, and when it is complete.

A stage writes under `<storage>/<stage>/<fingerprint>/`. Files appear whole (written aside, synced, renamed; in a bucket, put)
and `manifest.json`, written last and only where there is none, makes the stage complete. A lock, which ends with its process,
keeps two drivers from writing one stage.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from roma_ray.errors import ArtifactError, BucketError, BusyError, StorageError
from roma_ray.store.buckets import as_path, checked, has_scheme, is_object
from roma_ray.store.files import (
    below,
    create,
    drop_empty,
    exists,
    file_facts,
    is_special,
    json_text,
    listed,
    read_json,
    read_text,
    remove,
    remove_folder,
    seal,
)
from roma_ray.store.files import file_digest as file_digest
from roma_ray.store.files import unwritable as unwritable
from roma_ray.store.files import write_atomically as write_atomically
from roma_ray.store.files import write_json as write_json
from roma_ray.store.files import write_text as write_text
from roma_ray.store.leases import LOCK
from roma_ray.store.locks import Held, check_held, locked
from roma_ray.store.staging import unseal
from roma_ray.versions import decisive_among, decisive_versions, differences, library_versions

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
"""The resolved configuration, beside the last stage of a run."""
IDENTITY = ".identity.json"
"""A stage's identity from its first moment on: what an unfinished one is built on."""
MEMBERS = ".members.json"
"""In a sweep's folder: the fingerprints of its trials' last stages."""
_DEVICES = ".devices"
_STARTS = ".starts"
_BEGUN = ".begun"
_MAKERS = ".makers"


def fingerprint(value: Any) -> str:
    """16 hex digits of the SHA-256 of a JSON-able value; dictionary order does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_identity(planned: Mapping[str, Stage]) -> str:
    """What makes two runs the same: the fingerprints of all stages that compute something."""
    return fingerprint({name: stage.fingerprint for name, stage in planned.items() if name != "report"})


def comparison_identity(methods: Mapping[str, Sequence[Stage]]) -> str:
    """What makes two comparisons of methods the same."""
    return fingerprint({name: [stage.fingerprint for stage in stages] for name, stages in methods.items()})


def default_storage() -> str:
    """$ROMA_RAY_STORAGE, else ~/.roma-ray."""
    return os.environ.get("ROMA_RAY_STORAGE") or str(Path.home() / ".roma-ray")


class Store:
    """The folder, or the part of a bucket (`s3://bucket/prefix`), that holds all artifacts."""

    def __init__(self, root: str | Path | None = None, reuse: str = "any") -> None:
        """`reuse` is the configuration's: `same_versions` refuses stages that other versions of libraries worked on.

        Raises StorageError for an address that is none.
        """
        self.reuse = reuse
        text = str(root) if root else default_storage()
        if has_scheme(text):
            self.root = as_path(text)
        else:
            self.root = checked(Path(text)) if is_object(text) else Path(text).expanduser().absolute()

    @property
    def in_bucket(self) -> bool:
        """Whether it is a bucket's, where no database can live and no program but ours opens a file."""
        return is_object(self.root)

    def check(self) -> None:
        """Raise StorageError when nothing can be written here: told before any work, and before anything else is."""
        # Another process may have removed stages since this one looked.
        for folder in [folder for folder in _manifests if self.root in folder.parents]:
            _forget(folder)
        write_text(self.root / ".writable", "")

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Keep `alone` out while a run is at work, between its stages too. Raises StorageError."""
        with self._locked(shared=True):
            yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep runs out while something is removed. Raises BusyError when one is at work, StorageError."""
        with self._locked(shared=False):
            yield

    @contextlib.contextmanager
    def _locked(self, *, shared: bool) -> Iterator[None]:
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(self.root / ".in-use", shared=shared, wait=shared))
            except Held:
                raise BusyError(
                    f"a run is at work in {self.root}: nothing was removed. Wait for it to end, or stop it."
                ) from None
            except OSError as error:
                raise unwritable(self.root, error) from error
            yield

    def stage(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str], version: int) -> Stage:
        """The stage of that name for these settings and inputs (name -> fingerprint); changes nothing on disk."""
        identity = {"stage": name, "version": version, "settings": dict(settings), "inputs": dict(inputs)}
        return Stage(self.root / name / fingerprint(identity), name, identity, self.reuse)

    def begin(self, identity: str) -> None:
        """Note when the work of this identity (a run, a sweep, a comparison) was first started, where that is not noted yet."""
        create(self.root / _BEGUN / identity, f"{time.time():.3f}")

    def begun(self, identity: str) -> float | None:
        """When it was, in seconds since 1970; None where nobody noted it. Stages that ended before were not made by it."""
        path = self.root / _BEGUN / identity
        with contextlib.suppress(OSError, ValueError):
            return float(read_text(path))
        return None


class Stage:
    """One stage's folder."""

    def __init__(self, path: Path, name: str, identity: dict[str, Any], reuse: str = "any") -> None:
        self.path, self.name, self.identity, self.reuse = path, name, identity, reuse

    @property
    def fingerprint(self) -> str:
        return self.path.name

    @property
    def complete(self) -> bool:
        return self.path in _manifests or exists(self.path / MANIFEST)

    @property
    def reusable(self) -> bool:
        """Whether it is complete. Raises ArtifactError where it is, or was begun, and may not be used (`reuse`)."""
        self.check_makers()
        return self.complete

    def makers(self) -> list[dict[str, str]]:
        """The versions of the libraries that decide this stage's bits, of all runs that worked on it."""
        if self.complete:
            content = self.manifest()
            # Of a stage of before they were kept, its last run's.
            return list(content.get("makers") or [decisive_among(self.name, content.get("versions", {}))])
        return self._noted_makers()

    def _noted_makers(self) -> list[dict[str, str]]:
        notes = []
        for path in listed(self.path / _MAKERS, "[!.]*"):
            with contextlib.suppress(OSError, ValueError):
                notes.append({str(name): str(version) for name, version in dict(read_json(path)).items()})
        return notes

    def other_versions(self) -> str | None:
        """A sentence where other versions than those here worked on this stage."""
        found = differences(self.makers(), decisive_versions(self.name))
        return f"{self.name}: made by {found}; results may differ in their last bits" if found else None

    def check_makers(self) -> None:
        """Raise ArtifactError where `reuse: same_versions` forbids to use what is there."""
        if self.reuse == "same_versions" and (other := self.other_versions()):
            raise ArtifactError(
                f"{other}. `reuse: same_versions` refuses it: install those versions, give another place with --storage, or "
                f"remove {self.path} (and what was made of it); `reuse: any` takes it."
            )

    def note_makers(self, of: Stage | None = None) -> None:
        """Note that the libraries here work on this stage, or that what those of another stage made went into it."""
        here = decisive_versions(self.name)
        for versions in [here] if of is None else [{**here, **made} for made in of.makers()]:
            note = self.path / _MAKERS / fingerprint(versions)
            if versions and not exists(note):
                write_json(note, versions)

    def manifest(self) -> dict[str, Any]:
        """The manifest of a complete stage. Raises ArtifactError."""
        return read_manifest(self.path)

    def finish(self, *, facts: Mapping[str, Any], seconds: float) -> None:
        """Write the manifest: this makes the stage complete. `facts` are counts and results worth reading later.

        Raises BusyError where the stage is another driver's by now, ArtifactError where that one completed it with other files.
        """
        names = {file.relative_to(self.path).as_posix(): file for file in below(self.path)}
        names = {n: f for n, f in names.items() if not n.startswith(".") and n != MANIFEST and "/." not in n}
        found = file_facts(list(names.values()))
        files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in zip(names, found, strict=True)}
        content = {
            "stage": self.name,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "files": files,
            "facts": dict(facts),
            "devices": noted_devices(self.path),
            "seconds": round(seconds, 3),
            "starting": noted_starts(self.path),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": library_versions(),
            "makers": self._noted_makers(),
        }
        try:
            check_held(self.path / LOCK)
        except Held as error:
            raise BusyError(
                f"another run may have taken over the {self.name} stage {self.fingerprint}: {error}"
            ) from None
        text = json_text({**content, "digest": _content_digest(content)})
        if not create(self.path / MANIFEST, text) and self.manifest()["files"] != files:
            raise ArtifactError(
                f"another run completed {self.path} at the same time, with other results; remove it and run again"
            )

    def verify(self) -> None:
        """Compare every file with the manifest's digests. Raises ArtifactError naming the first difference.

        Raises it also where the stage may not be used (`reuse`).
        """
        self.check_makers()
        files = {self.path / relative: fact for relative, fact in self.manifest()["files"].items()}
        try:
            found = file_facts(list(files))
        except FileNotFoundError:
            gone = next((file for file in files if not exists(file)), self.path)
            raise ArtifactError(f"{gone} is missing; remove {self.path} and run again to recompute it") from None
        for (file, fact), (size, digest) in zip(files.items(), found, strict=True):
            if size != fact["bytes"] or digest != fact["sha256"]:
                raise ArtifactError(
                    f"{file} is not what was written (corrupted or truncated); remove {self.path} and run again"
                )

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the stage's lock. Raises BusyError when another process is writing, StorageError as writes do."""
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(self.path / LOCK, sign=True))
            except Held as other:
                raise BusyError(
                    f"another run ({str(other) or 'unknown'}) is writing the {self.name} stage {self.fingerprint}. Wait for it to "
                    "end, or stop it, then run the same command again."
                ) from None
            except OSError as error:
                raise StorageError(
                    f"cannot write in {self.path}: {error.strerror or error}. Choose another place with --storage."
                ) from error
            if self.identity and not exists(self.path / IDENTITY):
                with contextlib.suppress(StorageError):
                    write_json(self.path / IDENTITY, self.identity)
            try:
                if not self.complete:
                    self.check_makers()
                    self.note_makers()
                yield
            except BaseException:
                with contextlib.suppress(Held):
                    check_held(self.path / LOCK)
                    self._leave_nothing()
                raise

    def _leave_nothing(self) -> None:
        """Remove the folder of a stage that ended before it wrote anything."""
        with contextlib.suppress(OSError, BucketError):
            if {file.name for file in listed(self.path)} <= {LOCK, IDENTITY, _MAKERS, _STARTS}:
                remove_folder(self.path)
                drop_empty(self.path.parent)

    def release(self, names: Iterable[str]) -> None:
        """Remove some files of a complete stage to free their space: the manifest says so, and the others stay checked."""
        names, content = list(names), self.manifest()
        gone = {name: content["files"].pop(name) for name in names if name in content["files"]}
        content["released"] = {**content.get("released", {}), **gone}
        _forget(self.path)
        write_json(self.path / MANIFEST, {**content, "digest": _content_digest(content)})
        for name in names:
            remove(self.path / name)

    @property
    def released(self) -> bool:
        """Whether files of this complete stage were removed to free their space. Raises ArtifactError."""
        return bool(self.manifest().get("released"))

    def discard(self) -> None:
        """Remove the stage's output, the manifest first, so that a crash leaves it incomplete, not wrong."""
        _forget(self.path)
        remove(self.path / MANIFEST)
        remove_folder(self.path)


def note_device(folder: str | Path, kind: str) -> None:
    """Note in a stage's folder that a device of this kind works on it; kept over kills, so that a resume on another is seen."""
    create(Path(folder) / _DEVICES / fingerprint(kind), kind)


def noted_devices(folder: str | Path) -> list[str]:
    """The kinds of devices that have worked on a stage, by name. Results on more than one kind may differ in their last bits."""
    return sorted(read_text(path) for path in listed(Path(folder) / _DEVICES, "[!.]*"))


def note_start(folder: str | Path, seconds: Mapping[str, float]) -> None:
    """Note in a stage's folder how long each part of starting its work took: `workers`, `imports`, `model`, `first_batch`."""
    write_json(Path(folder) / _STARTS / f"{uuid.uuid4().hex[:12]}.json", dict(seconds))


def noted_starts(folder: str | Path) -> dict[str, float]:
    """Seconds of each part of a stage's starts, over all attempts; nothing where none was noted. Parts of `seconds`, not beside it."""
    total: dict[str, float] = {}
    for path in listed(Path(folder) / _STARTS, "[!.]*"):
        for part, seconds in read_json(path).items():
            total[part] = round(total.get(part, 0.0) + float(seconds), 3)
    return total


def _content_digest(content: Mapping[str, Any]) -> str:
    # Once through JSON, which makes lists of tuples and texts of keys: what is read back must give the same.
    plain = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


_manifests: dict[Path, str] = {}
"""Manifests in buckets that this process has read: a complete stage stays as it is, and each question to a bucket takes its time."""


def _forget(folder: Path) -> None:
    _manifests.pop(folder, None)
    unseal(folder)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read and check `folder/manifest.json`. Raises ArtifactError."""
    path = Path(folder) / MANIFEST
    if not is_object(path):
        return _checked(path, folder)
    if Path(folder) not in _manifests:
        value = _checked(path, folder)
        seal({Path(folder) / name: str(fact["sha256"]) for name, fact in value["files"].items()})
        _manifests[Path(folder)] = json.dumps(value)
    found: dict[str, Any] = json.loads(_manifests[Path(folder)])
    return found


def _checked(path: Path, folder: str | Path) -> dict[str, Any]:
    if is_special(path):
        raise ArtifactError(f"{path} is no file; remove the folder and run the stage again")
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds no complete stage (no {MANIFEST}); run the stage again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; remove the folder and run the stage again") from None
    if isinstance(value, dict) and value.pop("digest", None) != _content_digest(value):
        raise ArtifactError(
            f"{path} is not what was written (changed, damaged, or of another version); remove the folder and run the stage again"
        )
    expected = {"stage": str, "fingerprint": str, "files": dict, "facts": dict, "identity": dict}
    if not isinstance(value, dict) or any(not isinstance(value.get(k), t) for k, t in expected.items()):
        raise ArtifactError(f"{path} is not a manifest of this project; remove the folder and run the stage again")
    for relative, fact in value["files"].items():
        parts = Path(relative).parts
        if (
            Path(relative).is_absolute()
            or ".." in parts
            or not isinstance(fact, dict)
            or not {"bytes", "sha256"} <= set(fact)
        ):
            raise ArtifactError(
                f"{path} names the file {relative!r} in a way no manifest does; remove the folder and run again"
            )
    return value
