"""Storage that is full, read-only or damaged."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

from roma_ray.store.artifacts import MANIFEST
from tests.chaos.scene import Scene
from tests.chaos.simulated import PATIENCE


@contextmanager
def small_disk(scene: Scene, size: str) -> Iterator[Path]:
    """A file system in memory (needs the right to mount); its options can be changed by `remount`."""
    scene.count += 1
    place = scene.folder / f"disk-{scene.count}"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def may_mount(folder: Path) -> bool:
    """Whether this process has the right."""
    if os.geteuid() != 0:
        return False
    tried = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False)
    if tried.returncode == 0:
        subprocess.run(["umount", str(folder)], check=True)
    return tried.returncode == 0


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def storage_full(scene: Scene) -> None:
    """No room left in extraction: a message and exit code 1; with room again the same command goes on."""
    with small_disk(scene, "64m") as place:
        storage, ballast = place / "s", place / "ballast"
        filling = Thread(target=_fill, args=(scene.begun(storage, "extract"), ballast))
        filling.start()
        code, said = scene.command(storage, "extract")
        filling.join()
        assert code == 1, said
        assert "No space left on device" in said
        assert "finished work is kept" in said
        assert "Traceback (most recent" not in said
        done = {path: path.stat().st_mtime_ns for path in scene.place(storage, "extract").glob("batches/*.parquet")}
        ballast.unlink()
        code, said = scene.command(storage, "extract")
        assert code == 0, said
        assert all(path.stat().st_mtime_ns == when for path, when in done.items()), "a finished batch was done again"
        scene.same(storage, "extract")


def _fill(ready: Callable[[], bool], ballast: Path) -> None:
    """Leave no room as soon as `ready`."""
    limit = time.monotonic() + PATIENCE
    while not ready() and time.monotonic() < limit:
        time.sleep(0.005)
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as stream:
        while True:
            stream.write(bytes(1 << 20))


def storage_read_only(scene: Scene) -> None:
    """The storage turns read-only in extraction: a message and exit code 1; writable again, the same command goes on."""
    with small_disk(scene, "64m") as place:
        storage = place / "s"
        driver = scene.start(storage, "extract")
        driver.wait_until(scene.begun(storage, "extract"))
        # A second, read-only mount over the first, which the driver's open lock keeps from changing itself.
        subprocess.run(["mount", "--bind", str(place), str(place)], check=True)
        remount(place, "bind,ro")
        driver.end(1)
        assert "Read-only file system" in driver.said
        assert "Traceback (most recent" not in driver.said
        code, said = scene.here(storage)
        assert code == 1, said
        assert "Read-only file system" in said
        subprocess.run(["umount", "--lazy", str(place)], check=True)
        scene.start(storage, "extract").end()
        scene.same(storage, "extract")


def _touch_up(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


def artifacts_damaged(how: str, scene: Scene) -> None:
    """One bit, or half, of each stage's largest file and of its manifest: refused by name; recomputed once it is removed."""
    storage = scene.storage()
    for name, stage in scene.reference.stages.items():
        shutil.copytree(stage.path, storage / name / stage.fingerprint)
    for name, stage in scene.reference.stages.items():
        folder, files = scene.place(storage, name), stage.manifest()["files"]
        for victim in (max(files, key=lambda f: (files[f]["bytes"], f)), MANIFEST):
            good = (folder / victim).read_bytes()
            _touch_up(folder / victim, how)
            code, said = scene.here(storage)
            assert code == 1, said
            assert str(folder / victim) in said, said
            (folder / victim).write_bytes(good)
        shutil.rmtree(folder)
        code, said = scene.here(storage)
        assert code == 0, said
    scene.same(storage, "evaluate")
