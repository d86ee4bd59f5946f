"""Storage that is full, read-only or damaged."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roma_ray.artifacts import MANIFEST
from tests.chaos.scene import Scene


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


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def storage_full(scene: Scene) -> None:
    """No room left in extraction: a message and exit code 1; with room again the same command goes on."""
    with small_disk(scene, "64m") as place:
        storage, ballast = place / "s", place / "ballast"
        driver = scene.start(storage, "extract")
        driver.wait_until(scene.begun(storage, "extract"))
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))
        driver.end(1)
        assert "No space left on device" in driver.said
        assert "finished work is kept" in driver.said
        assert "Traceback (most recent" not in driver.said
        ballast.unlink()
        scene.start(storage, "extract").end()
        scene.same(storage, "extract")


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
