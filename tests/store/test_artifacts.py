"""Artifacts: fingerprints, files that appear whole, manifests that complete a stage, one writer at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roma_ray.errors import ArtifactError, StorageError
from roma_ray.store.artifacts import (
    MANIFEST,
    Stage,
    Store,
    default_storage,
    file_digest,
    fingerprint,
    note_start,
    read_manifest,
    write_atomically,
    write_json,
)
from roma_ray.versions import library_versions


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    made = Store(tmp_path).stage("extract", {"cut": 11}, {"questions": "0123"}, 1)
    made.path.mkdir(parents=True)
    return made


def finished(stage: Stage) -> Stage:
    (stage.path / "batches").mkdir()
    (stage.path / "batches" / "000000.parquet").write_bytes(b"rows")
    (stage.path / "rows.parquet").write_bytes(b"all rows")
    stage.finish(facts={"rows": 3}, seconds=1.23456)
    return stage


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_the_same_everywhere() -> None:
    # Written down: another value would orphan every stage that users have.
    assert fingerprint({"b": [1, 2.5, None, True], "a": "é"}) == "0b8cc543e984d4d7"


def test_the_order_of_keys_does_not_count_but_that_of_lists_does() -> None:
    assert fingerprint({"a": 1, "b": {"c": 2, "d": 3}}) == fingerprint({"b": {"d": 3, "c": 2}, "a": 1})
    assert fingerprint([1, 2]) != fingerprint([2, 1])


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(_json)
def test_a_fingerprint_survives_a_journey_through_json(value: object) -> None:
    assert fingerprint(json.loads(json.dumps(value))) == fingerprint(value)


def test_a_number_that_is_none_has_no_fingerprint() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        fingerprint({"x": float("nan")})


def test_settings_inputs_and_version_each_make_another_stage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    variants = [
        store.stage("extract", {"cut": 11}, {"questions": "a"}, 1),
        store.stage("extract", {"cut": 12}, {"questions": "a"}, 1),
        store.stage("extract", {"cut": 11}, {"questions": "b"}, 1),
        store.stage("extract", {"cut": 11}, {"questions": "a"}, 2),
        store.stage("embed", {"cut": 11}, {"questions": "a"}, 1),
    ]
    assert len({variant.path for variant in variants}) == len(variants)
    assert len({variant.fingerprint for variant in variants}) == len(variants)
    again = store.stage("extract", {"cut": 11}, {"questions": "a"}, 1)
    assert again.path == variants[0].path
    assert list(tmp_path.iterdir()) == [], "asking where a stage lives writes nothing"


# -- storage -----------------------------------------------------------------------------------------------------------


def test_storage_is_the_environments_or_the_homes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROMA_RAY_STORAGE", "/some/where")
    assert default_storage() == "/some/where"
    monkeypatch.setenv("ROMA_RAY_STORAGE", "")
    assert default_storage() == str(Path.home() / ".roma-ray")
    monkeypatch.delenv("ROMA_RAY_STORAGE")
    assert default_storage() == str(Path.home() / ".roma-ray")


def test_storage_is_absolute_whatever_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store("here").root == tmp_path / "here"
    assert Store("~/there").root == Path.home() / "there"


@pytest.mark.parametrize("url", ["file:///tmp/x", "http://host/x", "s3://", "hdfs://host/x"])
def test_a_storage_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(StorageError, match=r"use a folder|not understood"):
        Store(url)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "value.json"
    write_json(path, {"a": "é"})
    assert json.loads(path.read_text()) == {"a": "é"}

    def torn(aside: Path) -> None:
        aside.write_text("half")
        raise RuntimeError("killed here")

    with pytest.raises(RuntimeError, match="killed here"):
        write_atomically(path, torn)
    assert json.loads(path.read_text()) == {"a": "é"}, "the old file stays"
    assert [p.name for p in path.parent.iterdir()] == ["value.json"], "nothing is left beside it"


def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, "old")
    script = (
        "import os, signal, sys\n"
        "from roma_ray.store.artifacts import write_atomically\n"
        "def write(aside):\n"
        "    aside.write_text('new, but hal')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(sys.argv[1], write)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert json.loads(path.read_text()) == "old"


def test_a_non_finite_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "value.json", {"loss": float("inf")})
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="--storage"):
        write_json(tmp_path / "file" / "below" / "value.json", 1)
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(StorageError, match="folder"):
        write_json(tmp_path / "folder", 1)
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def test_what_another_place_refuses_is_told_as_that(tmp_path: Path) -> None:
    def write(aside: Path) -> None:
        raise StorageError("cannot write in the scratch")

    with pytest.raises(StorageError, match=r"^cannot write in the scratch$"):
        write_atomically(tmp_path / "value", write)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    def write(aside: Path) -> None:
        with open("/dev/full", "w") as stream:
            stream.write("x" * 100_000)

    with pytest.raises(StorageError, match="No space left"):
        write_atomically(tmp_path / "value", write)


def test_a_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert file_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# -- stages ------------------------------------------------------------------------------------------------------------


def test_the_manifest_completes_a_stage_and_says_what_it_holds(stage: Stage) -> None:
    assert not stage.complete
    finished(stage)
    assert stage.complete
    manifest = stage.manifest()
    assert manifest["stage"] == "extract"
    assert manifest["fingerprint"] == stage.path.name == fingerprint(manifest["identity"])
    assert manifest["identity"] == {
        "stage": "extract",
        "version": 1,
        "settings": {"cut": 11},
        "inputs": {"questions": "0123"},
    }
    assert set(manifest["files"]) == {"rows.parquet", "batches/000000.parquet"}
    assert manifest["files"]["rows.parquet"] == {"bytes": 8, "sha256": file_digest(stage.path / "rows.parquet")}
    assert manifest["facts"] == {"rows": 3}
    assert manifest["seconds"] == 1.235
    assert "numpy" in manifest["versions"]
    stage.verify()


def test_locks_and_unfinished_files_are_no_part_of_a_stage(stage: Stage) -> None:
    with stage.exclusive():
        (stage.path / ".rows.parquet.1a2b.tmp").write_text("half")
        (stage.path / "batches").mkdir()
        (stage.path / "batches" / ".x.tmp").write_text("half")
        (stage.path / "rows.parquet").write_text("rows")
        stage.finish(facts={}, seconds=0)
    assert set(stage.manifest()["files"]) == {"rows.parquet"}


def test_a_missing_or_changed_file_is_found(stage: Stage) -> None:
    finished(stage)
    path = stage.path / "rows.parquet"
    for content in (b"all row", b"all rowS"):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"rows\.parquet is not what was written"):
            stage.verify()
    path.unlink()
    with pytest.raises(ArtifactError, match=r"rows\.parquet is missing"):
        stage.verify()


def test_a_stage_that_is_not_finished_has_no_manifest(stage: Stage) -> None:
    with pytest.raises(ArtifactError, match="holds no complete stage"):
        stage.manifest()


MANIFEST_OF_NOTHING = {"stage": "x", "fingerprint": "y", "files": {}, "facts": {}, "identity": {}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps({**MANIFEST_OF_NOTHING, "files": []}).encode(),
        json.dumps({**MANIFEST_OF_NOTHING, "files": {"a": 1}}).encode(),
        json.dumps({k: v for k, v in MANIFEST_OF_NOTHING.items() if k != "facts"}).encode(),
        json.dumps({**MANIFEST_OF_NOTHING, "files": {"../x": {"bytes": 1, "sha256": ""}}}).encode(),
        json.dumps({**MANIFEST_OF_NOTHING, "files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}).encode(),
    ],
    ids=["empty", "torn", "list", "null", "no utf-8", "deep", "files", "fact", "no facts", "parent", "absolute"],
)
def test_a_broken_or_foreign_manifest_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError):
        read_manifest(tmp_path)


def test_a_discarded_stage_is_gone_and_may_be_made_again(stage: Stage) -> None:
    finished(stage).discard()
    assert not stage.complete
    assert not stage.path.exists()
    stage.discard()
    stage.path.mkdir()
    finished(stage).verify()


HOLD = """
import sys, time
from pathlib import Path
from roma_ray.store.artifacts import Stage
with Stage(Path(sys.argv[1]), "extract", {}).exclusive():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_stage_has_one_writer_and_a_kill_frees_it(stage: Stage) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(stage.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ArtifactError, match=rf"another run \({os.uname().nodename}, pid {holder.pid}\)"):
            with stage.exclusive():
                pytest.fail("two writers")
    finally:
        holder.kill()
        holder.communicate()
    with stage.exclusive():
        pass


def test_a_lock_is_freed_when_its_work_fails(stage: Stage) -> None:
    with pytest.raises(RuntimeError, match="work"):
        with stage.exclusive():
            raise RuntimeError("work")
    with stage.exclusive():
        pass


def test_a_lock_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "extract").write_text("a file where a folder should be")
    stage = Store(tmp_path).stage("extract", {}, {}, 1)
    with pytest.raises(StorageError, match="--storage"):
        with stage.exclusive():
            pass


def test_versions_are_those_of_what_is_installed() -> None:
    versions = library_versions()
    assert versions["torch"] == metadata.version("torch")
    assert all(metadata.version(name) == version for name, version in versions.items())


def test_a_full_storage_is_named_whatever_library_writes(tmp_path: Path) -> None:
    """safetensors has its own error for a write that the system refuses; a file size limit stands in for a full disk."""
    script = (
        "import resource, signal, torch\n"
        "from pathlib import Path\n"
        "from safetensors.torch import save_file\n"
        "from roma_ray.store.artifacts import write_atomically\n"
        "from roma_ray.errors import StorageError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        f"    write_atomically(Path({str(tmp_path)!r}) / 't', lambda aside: save_file({{'a': torch.zeros(9999)}}, aside))\n"
        "except StorageError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "cannot write" in done.stdout, done.stderr
    assert "File too large" in done.stdout
    assert "finished work is kept" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_starts_of_all_attempts_are_added(tmp_path: Path) -> None:
    """Of a stage that was begun twice the parts of both starts count; they are no file of its result."""
    stage = Store(tmp_path).stage("extract", {}, {}, 1)
    with stage.exclusive():
        note_start(stage.path, {"workers": 2.0, "model": 1.25})
        note_start(stage.path, {"model": 0.5, "first_batch": 0.12345})
        stage.finish(facts={}, seconds=9.0)
    assert stage.manifest()["starting"] == {"workers": 2.0, "model": 1.75, "first_batch": 0.123}
    assert stage.manifest()["files"] == {}
