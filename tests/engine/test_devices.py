"""How many cores a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from roma_ray.engine.devices import usable_cores


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight of sixteen cores by affinity."""
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def cgroups(folder: Path, membership: str, **files: str) -> int:
    """The cores in a machine with these files under /sys/fs/cgroup."""
    folder.mkdir(exist_ok=True)
    own = folder / "membership"
    own.write_text(membership)
    for name, text in files.items():
        path = folder / "fs" / name.replace("__", "/").replace("cpu_", "cpu.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return usable_cores(folder / "fs", own)


def test_affinity_bounds_the_cores(tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "none", tmp_path / "none") == 8


@pytest.mark.parametrize(
    ("quota", "cores"), [("250000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("1600000 100000", 8)]
)
def test_the_quota_of_a_cgroup_bounds_them_too(quota: str, cores: int, tmp_path: Path) -> None:
    """Version 2, of the group itself or of one above it, or the container's own where the path is the host's."""
    assert cgroups(tmp_path, "0::/a/b\n", a__b__cpu_max="max 100000", a__cpu_max=quota) == cores
    assert cgroups(tmp_path / "a", "0::/not/in/sight\n", cpu_max=quota) == cores


def test_the_older_form_of_quotas(tmp_path: Path) -> None:
    files = {"cpu__a__cpu_cfs_quota_us": "300000", "cpu__a__cpu_cfs_period_us": "100000", "cpu__cpu_cfs_quota_us": "-1"}
    assert cgroups(tmp_path, "9:name=systemd:/a\n4:cpu,cpuacct:/a\n0::/\n", **files) == 3
