"""What computes: the kind of device, whose last bits may differ from another's, and how many cores this process may use."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> int:
    """The cores that this process may use: the machine's, less by its affinity and by the quotas of its cgroups (v1 and v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([float(cores), *_quotas(cgroups, own)])))


def _quotas(cgroups: Path, own: Path) -> list[float]:
    """The quotas, in cores, of the cgroups that this process is in and of those above them, as far as they are in sight."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / "cpu" if controllers else cgroups
        place = root / path.lstrip("/")
        # In a container the path may be the host's; then the root that is in sight is the container's own.
        for folder in {root, *(f for f in (place, *place.parents) if root in f.parents)}:
            quota = _quota(folder)
            found += [] if quota is None else [quota]
    return found


def _quota(folder: Path) -> float | None:
    """A cgroup's quota in cores, version 2 or 1; None where it has none."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = map(int, (folder / "cpu.max").read_text().split())
        else:
            quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    except (OSError, ValueError):
        return None  # no such files, or "max"
    return quota / period if quota > 0 and period > 0 else None


def device_kind(device: str) -> str:
    """The kind of this process's `cuda` device ("NVIDIA H100 80GB HBM3", "AMD Instinct MI300X"), or of its CPU ("x86_64 AVX512")."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def mixed_devices(stage: str, kinds: list[str]) -> str | None:
    """The warning about a stage that more than one kind of device computed; None for one kind."""
    if len(kinds) < 2:
        return None
    return (
        f"{stage} was computed on {' and '.join(kinds)}: their sums differ in the last bits, so another run may differ; "
        "give ray.extract, ray.embed or ray.finetune an `accelerator` for runs that are to be repeated"
    )
