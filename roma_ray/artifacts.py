"""Where a stage's output lives, what identifies it, and when it is complete.

A stage writes under `<storage>/<stage>/<fingerprint>/`. Files appear whole (written aside, synced, renamed) and
`manifest.json`, written last, makes the stage complete. A file lock, which the system drops with its process, keeps two
drivers from writing one stage.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from roma_ray.errors import ArtifactError, BusyError, StorageError
from roma_ray.versions import decisive_among, decisive_versions, differences, library_versions

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
"""The resolved configuration, beside the last stage of a run."""
IDENTITY = ".identity.json"
"""A stage's identity from its first moment on: what an unfinished one is built on."""
MEMBERS = ".members.json"
"""In a sweep's folder: the fingerprints of its trials' last stages."""
_DEVICES = ".devices"
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


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)` and put the result at `path` whole: written aside, synced, renamed.

    Raises StorageError when the storage is full, read-only or gone.
    """
    target = Path(path)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        with open(aside, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(aside, target)
        _sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        # safetensors has an error of its own for what the system refuses.
        raise unwritable(target, error) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def unwritable(path: str | Path, error: Exception) -> StorageError:
    """The error for a file that the storage, full, read-only or gone, did not take."""
    return StorageError(
        f"cannot write {path}: {getattr(error, 'strerror', None) or error}. Free some space or make it writable, or choose "
        "another place with --storage (or $ROMA_RAY_STORAGE), and run the same command again: finished work is kept."
    )


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON (non-finite numbers refused) atomically."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def default_storage() -> str:
    """$ROMA_RAY_STORAGE, else ~/.roma-ray."""
    return os.environ.get("ROMA_RAY_STORAGE") or str(Path.home() / ".roma-ray")


class Store:
    """The folder that holds all artifacts."""

    def __init__(self, root: str | Path | None = None, reuse: str = "any") -> None:
        """`reuse` is the configuration's: `same_versions` refuses stages that other versions of libraries worked on."""
        self.reuse = reuse
        text = str(root) if root else default_storage()
        if "://" in text:
            raise StorageError(
                f"the storage {text} is not a folder: use a local path or a mounted shared file system (NFS, FSx, Filestore)"
            )
        self.root = Path(text).expanduser().absolute()

    def check(self) -> None:
        """Raise StorageError when nothing can be written here: told before any work, and before anything else is."""
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
        import fcntl

        try:
            handle = open(self.root / ".in-use", "a+")  # noqa: SIM115 - closed below, after the lock's use
        except OSError as error:
            raise unwritable(self.root, error) from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(
                    f"a run is at work in {self.root}: nothing was removed. Wait for it to end, or stop it."
                ) from None
            except OSError:
                # Some network file systems have no locks; that no run is at work is then the user's promise.
                pass
            yield

    def stage(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str], version: int) -> Stage:
        """The stage of that name for these settings and inputs (name -> fingerprint); changes nothing on disk."""
        identity = {"stage": name, "version": version, "settings": dict(settings), "inputs": dict(inputs)}
        return Stage(self.root / name / fingerprint(identity), name, identity, self.reuse)

    def begin(self, identity: str) -> None:
        """Note when the work of this identity (a run, a sweep, a comparison) was first started, where that is not noted yet."""
        path = self.root / _BEGUN / identity
        if not path.exists():
            write_text(path, f"{time.time():.3f}")

    def begun(self, identity: str) -> float | None:
        """When it was, in seconds since 1970; None where nobody noted it. Stages that ended before were not made by it."""
        path = self.root / _BEGUN / identity
        with contextlib.suppress(OSError, ValueError):
            return float(path.read_text(encoding="utf-8"))
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
        return (self.path / MANIFEST).is_file()

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
        for path in sorted((self.path / _MAKERS).glob("[!.]*")):
            with contextlib.suppress(OSError, ValueError):
                notes.append({str(name): str(version) for name, version in dict(json.loads(path.read_text())).items()})
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
            if versions and not note.exists():
                write_json(note, versions)

    def manifest(self) -> dict[str, Any]:
        """The manifest of a complete stage. Raises ArtifactError."""
        return read_manifest(self.path)

    def finish(self, *, facts: Mapping[str, Any], seconds: float) -> None:
        """Write the manifest: this makes the stage complete. `facts` are counts and results worth reading later."""
        files = {}
        for file in sorted(p for p in self.path.rglob("*") if p.is_file()):
            relative = file.relative_to(self.path).as_posix()
            if not relative.startswith(".") and relative != MANIFEST and "/." not in relative:
                files[relative] = {"bytes": file.stat().st_size, "sha256": file_digest(file)}
        content = {
            "stage": self.name,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "files": files,
            "facts": dict(facts),
            "devices": noted_devices(self.path),
            "seconds": round(seconds, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": library_versions(),
            "makers": self._noted_makers(),
        }
        write_json(self.path / MANIFEST, {**content, "digest": _content_digest(content)})

    def verify(self) -> None:
        """Compare every file with the manifest's digests. Raises ArtifactError naming the first difference.

        Raises it also where the stage may not be used (`reuse`).
        """
        self.check_makers()
        for relative, fact in self.manifest()["files"].items():
            file = self.path / relative
            if not file.is_file():
                raise ArtifactError(f"{file} is missing; remove {self.path} and run again to recompute it")
            if file.stat().st_size != fact["bytes"] or file_digest(file) != fact["sha256"]:
                raise ArtifactError(
                    f"{file} is not what was written (corrupted or truncated); remove {self.path} and run again"
                )

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the stage's lock. Raises BusyError when another process is writing, StorageError as writes do."""
        import fcntl

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = open(self.path / ".lock", "a+")  # noqa: SIM115 - closed below, after the lock's use
        except OSError as error:
            raise StorageError(
                f"cannot write in {self.path}: {error.strerror or error}. Choose another place with --storage."
            ) from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                holder = handle.read().strip() or "unknown"
                raise BusyError(
                    f"another run ({holder}) is writing the {self.name} stage {self.fingerprint}. Wait for it to end, or stop it, "
                    "then run the same command again."
                ) from None
            except OSError:
                # Some network file systems have no locks; a single driver is then the user's promise.
                pass
            # Who holds it is for the message alone; a full storage will be told where it matters.
            with contextlib.suppress(OSError):
                handle.truncate(0)
                os.write(handle.fileno(), f"{os.uname().nodename}, pid {os.getpid()}".encode())
            if self.identity and not (self.path / IDENTITY).exists():
                with contextlib.suppress(StorageError):
                    write_json(self.path / IDENTITY, self.identity)
            try:
                if not self.complete:
                    self.check_makers()
                    self.note_makers()
                yield
            except BaseException:
                self._leave_nothing()
                raise

    def _leave_nothing(self) -> None:
        """Remove the folder of a stage that ended before it wrote anything."""
        own = {".lock", IDENTITY, _MAKERS}
        with contextlib.suppress(OSError):
            if {file.name for file in self.path.iterdir()} <= own:
                shutil.rmtree(self.path / _MAKERS, ignore_errors=True)
                for name in own - {_MAKERS}:
                    (self.path / name).unlink(missing_ok=True)
                self.path.rmdir()
                self.path.parent.rmdir()

    def release(self, names: Iterable[str]) -> None:
        """Remove some files of a complete stage to free their space: the manifest says so, and the others stay checked."""
        names, content = list(names), self.manifest()
        gone = {name: content["files"].pop(name) for name in names if name in content["files"]}
        content["released"] = {**content.get("released", {}), **gone}
        write_json(self.path / MANIFEST, {**content, "digest": _content_digest(content)})
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    @property
    def released(self) -> bool:
        """Whether files of this complete stage were removed to free their space. Raises ArtifactError."""
        return bool(self.manifest().get("released"))

    def discard(self) -> None:
        """Remove the stage's output, the manifest first, so that a crash leaves it incomplete, not wrong."""
        (self.path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


def note_device(folder: str | Path, kind: str) -> None:
    """Note in a stage's folder that a device of this kind works on it; kept over kills, so that a resume on another is seen."""
    path = Path(folder) / _DEVICES / fingerprint(kind)
    if not path.exists():
        write_text(path, kind)


def noted_devices(folder: str | Path) -> list[str]:
    """The kinds of devices that have worked on a stage, by name. Results on more than one kind may differ in their last bits."""
    return sorted(path.read_text(encoding="utf-8") for path in (Path(folder) / _DEVICES).glob("[!.]*"))


def _content_digest(content: Mapping[str, Any]) -> str:
    # Once through JSON, which makes lists of tuples and texts of keys: what is read back must give the same.
    plain = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read and check `folder/manifest.json`. Raises ArtifactError."""
    path = Path(folder) / MANIFEST
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
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
