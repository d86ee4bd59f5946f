"""Local copies: one a node, never stale, checked on arrival, bounded; and files written through them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from roma_ray.errors import ArtifactError, BucketError, StorageError
from roma_ray.store import files, objects, pins, staging
from roma_ray.store.buckets import as_path
from roma_ray.store.tables import read_table, write_parts
from roma_ray.store.tensors import mapped, read_tensors, write_tensors
from roma_ray.store.uploads import in_background, trailing
from tests.bucket import Proxy, Request, few


@pytest.fixture
def root(bucket: Proxy, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the bucket that no other test uses; the scratch is looked through at every write."""
    monkeypatch.setattr(staging, "_SECONDS_BETWEEN_LOOKS", 0.0)
    return as_path(bucket.address(f"staging/{request.node.name.translate({ord(c): '-' for c in '[]/ '})}"))


def gets(bucket: Proxy) -> int:
    return bucket.requests["GET"]


def test_a_copy_has_the_name_and_is_fetched_once(root: Path, bucket: Proxy) -> None:
    objects.put(root / "rows.parquet", b"x" * 1000, hashlib.sha256(b"x" * 1000).hexdigest())
    first = files.local(root / "rows.parquet")
    assert first.name == "rows.parquet"
    assert first.read_bytes() == b"x" * 1000
    fetched = gets(bucket)
    assert files.local(root / "rows.parquet") == first
    assert gets(bucket) == fetched


def test_what_was_written_here_is_not_fetched(root: Path, bucket: Proxy) -> None:
    write_tensors(root / "a.safetensors", {"x": torch.arange(1000)})
    tensors, _ = read_tensors(root / "a.safetensors")
    assert torch.equal(tensors["x"], torch.arange(1000))
    assert gets(bucket) == 0


def test_a_copy_is_never_stale(root: Path) -> None:
    files.write_text(root / "state", "1")
    old = files.local(root / "state")
    files.write_text(root / "state", "2")
    assert files.local(root / "state").read_text() == "2"
    assert old.read_text() == "1"


def test_damage_on_the_way_is_fetched_again_and_in_the_bucket_told(root: Path) -> None:
    objects.put(root / "one", b"what is there", hashlib.sha256(b"what was written").hexdigest())
    with pytest.raises(ArtifactError, match="not what was written"):
        files.local(root / "one")
    assert not list(staging.scratch_root().glob("writing/*"))


def test_a_connection_that_ends_in_the_middle_gives_a_whole_copy(root: Path, bucket: Proxy) -> None:
    content = os.urandom(3_000_000)
    objects.put(root / "one", content, hashlib.sha256(content).hexdigest())
    bucket.rule = few("cut", 2, lambda request: request.method == "GET")
    assert files.local(root / "one").read_bytes() == content
    assert len(bucket.told) == 2


def test_a_folder_is_copied_whole_and_once(root: Path, bucket: Proxy) -> None:
    for name in ("adapter/config.json", "adapter/deep/weights"):
        files.write_text(root / name, name)
    first = files.local_tree(root / "adapter")
    assert first.name == "adapter"
    assert (first / "deep" / "weights").read_text() == "adapter/deep/weights"
    assert files.local_tree(root / "adapter") == first
    files.write_text(root / "adapter/config.json", "other")
    assert (files.local_tree(root / "adapter") / "config.json").read_text() == "other"
    assert (first / "config.json").read_text() == "adapter/config.json"
    with pytest.raises(FileNotFoundError):
        files.local_tree(root / "nothing")


def test_names_that_lead_out_of_a_folder_do_not(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "below", lambda folder: iter([(Path(folder) / ".." / ".." / "evil", 1, 0.0)]))
    with pytest.raises(StorageError, match="leads out of it"):
        files.local_tree(root / "adapter")


def test_what_was_not_used_for_longest_goes_first(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_SETTLING_SECONDS", 0.0)
    monkeypatch.setenv("ROMA_RAY_SCRATCH_GIB", f"{2_500_000 / 2**30}")
    copies = []
    for number in range(4):
        files.write_bytes(root / f"{number}", os.urandom(1_000_000))
        copies.append(files.local(root / f"{number}"))
        if number == 1:
            time.sleep(0.02)
            files.local(root / "0")  # used again: the other goes
        time.sleep(0.02)
    assert [copy.exists() for copy in copies] == [False, False, True, True]
    used = sum(file.stat().st_size for file in (staging.scratch_root() / "copies").rglob("*") if file.is_file())
    assert used <= 2_500_000
    assert files.local(root / "1").exists()  # fetched again


def test_a_mapped_copy_outlives_its_removal(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_SETTLING_SECONDS", 0.0)
    monkeypatch.setenv("ROMA_RAY_SCRATCH_GIB", f"{1_500_000 / 2**30}")
    write_tensors(root / "a.safetensors", {"x": torch.arange(200_000)})
    rows = mapped(root / "a.safetensors", "x")
    place = files.local(root / "a.safetensors")
    files.write_bytes(root / "b", os.urandom(1_000_000))
    files.local(root / "b")
    assert not place.exists()
    assert torch.equal(rows[199_990:], torch.arange(199_990, 200_000))


def test_what_a_killed_process_was_writing_goes_after_a_while(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = staging.scratch_root() / "writing" / "1-abc"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    files.write_bytes(root / "a", b"1")
    files.local(root / "a")
    assert left.exists()
    monkeypatch.setattr(staging, "_ABANDONED_SECONDS", -1.0)
    files.write_bytes(root / "b", b"1")
    files.local(root / "b")
    assert not left.exists()


@pytest.mark.parametrize("value", ["much", "nan", "inf"])
def test_a_bound_that_is_no_number_is_told(root: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ROMA_RAY_SCRATCH_GIB", value)
    with pytest.raises(StorageError, match="ROMA_RAY_SCRATCH_GIB"):
        staging.capacity(staging.scratch_root())


def test_a_scratch_that_is_refused_is_no_fault_of_the_table(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parts(root / "table", pa.schema([("n", pa.int64())]), [pa.table({"n": [1]})])
    monkeypatch.setenv("ROMA_RAY_SCRATCH", str(tmp_path))
    monkeypatch.setenv("ROMA_RAY_SCRATCH_GIB", "much")
    with pytest.raises(StorageError, match=r"ROMA_RAY_SCRATCH_GIB is 'much'"):
        read_table(root / "table")


def test_somebody_elses_scratch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROMA_RAY_SCRATCH", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"roma-ray-{os.getuid()}").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(StorageError, match="not this user's own"):
        staging.scratch_root()


def test_several_processes_of_a_node_share_a_copy(root: Path, bucket: Proxy) -> None:
    content = os.urandom(2_000_000)
    objects.put(root / "one", content, hashlib.sha256(content).hexdigest())
    bucket.delay = 0.2
    code = f"from roma_ray.store.files import local; print(local({str(root / 'one')!r}))"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    places = {process.communicate(timeout=60)[0] for process in running}
    assert len(places) == 1
    assert Path(places.pop().strip()).read_bytes() == content
    assert gets(bucket) == 1


# -- in the background -------------------------------------------------------------------------------------------------


def test_puts_in_the_background_keep_their_order(root: Path, bucket: Proxy) -> None:
    bucket.delay = 0.1
    began = time.monotonic()
    with in_background() as uploads:
        write_tensors(root / "1.safetensors", {"x": torch.arange(10)})
        files.write_json(root / "2.json", {})
        files.write_text(root / "3", "")
        taken = time.monotonic() - began
        assert not files.exists(root / "3")
    uploads.wait()
    assert taken < 0.1
    written = [objects.facts(path).written for path in files.below(root)]
    assert written == sorted(written)
    assert [path.name for path in files.below(root)] == ["1.safetensors", "2.json", "3"]


def test_what_the_bucket_does_not_take_in_the_background_is_told_and_nothing_after_it_put(
    root: Path, bucket: Proxy
) -> None:
    bucket.rule = few("forbidden", 1, lambda request: request.method == "PUT")
    with in_background() as uploads:
        files.write_text(root / "1", "")
        files.write_text(root / "2", "")
    with pytest.raises(BucketError, match="AccessDenied"):
        uploads.wait()
    assert not files.exists(root / "2")


def test_only_the_thread_that_asked_for_it_puts_in_the_background(root: Path) -> None:
    with in_background() as uploads:
        other = threading.Thread(target=lambda: files.write_text(root / "now", ""))
        other.start()
        other.join()
        assert files.exists(root / "now")
    uploads.wait()


def test_fetching_ahead_makes_copies_before_they_are_asked_for(root: Path, bucket: Proxy) -> None:
    paths = [root / f"{number}" for number in range(5)]
    for path in paths:
        objects.put(path, path.name.encode(), hashlib.sha256(path.name.encode()).hexdigest())
    files.fetch_ahead([*paths, root / "missing"])
    limit = time.monotonic() + 20
    while gets(bucket) < 5 and time.monotonic() < limit:
        time.sleep(0.01)
    time.sleep(0.1)
    assert [files.local(path).read_text() for path in paths] == ["0", "1", "2", "3", "4"]
    assert gets(bucket) == 5


def test_one_call_after_another_trails_behind_and_all_are_there_at_the_end(root: Path, bucket: Proxy) -> None:
    bucket.delay = 0.3
    with trailing() as put:
        began = time.monotonic()
        put(lambda: files.write_text(root / "state", "1"))
        assert time.monotonic() - began < 0.2
        put(lambda: files.write_text(root / "state", "2"))  # waits for the first
        assert time.monotonic() - began > 0.2
    assert files.read_text(root / "state") == "2"
    bucket.rule = few("forbidden", 1, lambda request: request.method == "PUT")
    with pytest.raises(BucketError, match="AccessDenied"):
        with trailing() as put:
            put(lambda: files.write_text(root / "state", "3"))


def test_a_scratch_that_goes_while_something_is_fetched_is_told_as_that(root: Path, bucket: Proxy) -> None:
    objects.put(root / "one", b"1", hashlib.sha256(b"1").hexdigest())

    def rule(request: Request) -> None:
        if request.method == "GET":
            shutil.rmtree(staging.scratch_root() / "writing")

    bucket.rule = rule
    with pytest.raises(BucketError, match="local copies of a bucket's files lie there"):
        files.local(root / "one")
    bucket.reset()
    assert files.local(root / "one").read_bytes() == b"1"


def test_a_scratch_that_goes_while_something_is_put_is_told_as_that(root: Path) -> None:
    def write(aside: Path) -> None:
        aside.write_bytes(b"1")
        threading.Timer(0.2, shutil.rmtree, [staging.scratch_root()]).start()

    with in_background() as uploads:
        uploads.submit(lambda: time.sleep(0.5))
        files.write_atomically(root / "one", write)
    with pytest.raises(BucketError, match="local copies of a bucket's files lie there"):
        uploads.wait()


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_scratch_that_another_user_locks_is_told(root: Path) -> None:
    files.write_text(root / "one", "1")
    locks = staging.scratch_root() / "locks"
    locks.mkdir()
    locks.chmod(0o500)
    with pytest.raises(BucketError, match="Permission denied"):
        files.local(root / "one")


def test_a_folder_larger_than_its_room_is_whole_and_stays(
    root: Path, bucket: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of single files go before the last one has come; who opens the folder's files one by one finds them all."""
    monkeypatch.setattr(staging, "_SETTLING_SECONDS", 0.3)
    monkeypatch.setattr(staging, "_AT_ONCE", 1)
    monkeypatch.setenv("ROMA_RAY_SCRATCH_GIB", "0")
    for number in range(6):
        files.write_bytes(root / "model" / f"{number}", b"%d" % number * 1000)
    bucket.delay = 0.1
    place = files.local_tree(root / "model")
    assert len(list((staging.scratch_root() / "copies").rglob("[0-5]"))) < 12  # some have gone meanwhile
    monkeypatch.setattr(staging, "_SETTLING_SECONDS", 0.0)
    bucket.delay = 0.0
    files.write_bytes(root / "other", b"x" * 1000)
    files.local(root / "other")
    assert [(place / f"{number}").read_bytes() for number in range(6)] == [b"%d" % n * 1000 for n in range(6)]
    monkeypatch.setattr(pins, "_MOST_PINS", 0)
    files.local_tree(root / "model")  # as a process that has ended
    files.local(root / "other")
    files.write_bytes(root / "more", b"x" * 1000)
    files.local(root / "more")
    assert not place.exists()


def test_who_gives_up_puts_nothing_more(root: Path) -> None:
    def work() -> None:
        with in_background() as uploads:
            for _ in range(20):
                uploads.submit(lambda: time.sleep(0.5))
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        work()
    assert time.monotonic() - began < 5


def test_nothing_is_left_of_what_its_writer_refuses(root: Path) -> None:
    def refuse(aside: Path) -> None:
        aside.write_bytes(b"half a table")
        raise ArtifactError("rows lack")

    with pytest.raises(ArtifactError, match="rows lack"):
        files.write_atomically(root / "table", refuse)
    assert not list((staging.scratch_root() / "writing").glob("*"))
