"""Housekeeping: what lies in a storage, what depends on what, and that nothing goes that something needs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from roma_ray.cli.commands import main
from roma_ray.cli.printing import config_of
from roma_ray.config.loading import load_config
from roma_ray.engine.progress import Silence
from roma_ray.engine.setup import resolve
from roma_ray.errors import ArtifactError, BusyError, ConfigError, StorageError
from roma_ray.evaluation.run_comparison import run_name
from roma_ray.runs.pipeline import run
from roma_ray.stages.finetuning import ADAPTER
from roma_ray.store import objects
from roma_ray.store.artifacts import CONFIG, IDENTITY, MANIFEST, MEMBERS, Stage, Store, read_manifest, write_text
from roma_ray.store.contents import Storage
from tests.bucket import NAME, Proxy
from tests.world import make_world


def make(store: Store, kind: str, *inputs: Stage, name: str = "", finish: bool = True, **settings: object) -> Stage:
    """A stage with one file of 100 bytes, built on others."""
    stage = store.stage(kind, settings, {one.name: one.fingerprint for one in inputs}, 1)
    with stage.exclusive():
        write_text(stage.path / "file.txt", "x" * 100)
        if kind == "extract":
            write_text(stage.path / "batches" / "000000.02.safetensors", "y" * 1000)
        if finish:
            stage.finish(facts={}, seconds=1)
        if name:
            write_text(stage.path / CONFIG, f"name: {name}\n")
    return stage


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two finished runs on one extraction, and a stopped one on another."""
    store = Store(tmp_path / "storage")
    store.check()
    questions = make(store, "questions")
    extraction = make(store, "extract", questions)
    for name, seed in (("first", 1), ("second", 2)):
        tuned = make(store, "finetune", extraction, seed=seed)
        make(store, "evaluate", tuned, name=name)
    other = make(store, "extract", questions, batch_tokens=7)
    make(store, "finetune", other, finish=False)
    return store


def ids(found: Storage, *kinds: str) -> list[str]:
    return [item.id for item in found.items.values() if item.kind in kinds]


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments], catch_exceptions=False, env={"COLUMNS": "200"})


def test_runs_are_listed_by_name_with_what_they_need(store: Store) -> None:
    found = Storage(store)
    assert sorted(found.title(item) for item in found.runs()) == ["", "first", "second"]
    first = found.find("first")
    assert [item.kind for item in found.needs(first)] == ["evaluate", "finetune", "extract", "questions"]
    # The extraction serves the second run too.
    assert [item.kind for item in found.alone(first)] == ["evaluate", "finetune"]
    listed = command("ls", "--storage", str(store.root))
    assert listed.exit_code == 0
    for text in ("first", "second", "finetuning", "(unfinished)"):
        assert text in listed.output
    shown = command("show", "first", "--storage", str(store.root))
    assert f"extract/{found.needs(first)[2].id}" in shown.output
    assert found.find("second").id[:6] in shown.output, "who else needs it is named"


def test_a_stage_without_a_title_is_seen_and_removed_with_its_run(store: Store) -> None:
    found = Storage(store)
    counted = make(store, "word_counts", found.find("first").stage, name="third")
    (store.root / "notes" / ("0" * 16)).mkdir(parents=True)
    found = Storage(store)
    assert found.title(found.find("third")) == "third"
    assert "word_counts" in command("ls", "--storage", str(store.root)).output
    assert not ids(found, "notes"), "a folder that says nothing of a stage is not one"
    assert command("rm", "third", "--yes", "--storage", str(store.root)).exit_code == 0
    assert not counted.path.exists()


def test_a_manifest_that_is_a_folder_ends_in_words(store: Store) -> None:
    stage = Storage(store).find("first").stage
    (stage.path / MANIFEST).unlink()
    (stage.path / MANIFEST).mkdir()
    done = command("rm", stage.fingerprint, "--yes", "--storage", str(store.root))
    assert done.exit_code == 1
    assert "is a folder, which no stage writes" in done.output


def test_nothing_is_removed_without_yes_and_then_what_no_other_run_needs(store: Store) -> None:
    before = {item.id for item in Storage(store).items.values()}
    dry = command("rm", "first", "--storage", str(store.root))
    assert "Nothing was removed" in dry.output
    assert {item.id for item in Storage(store).items.values()} == before
    found = Storage(store)
    gone = {item.id for item in found.alone(found.find("first"))}
    done = command("rm", "first", "--yes", "--storage", str(store.root))
    assert done.exit_code == 0, done.output
    assert {item.id for item in Storage(store).items.values()} == before - gone
    assert len(gone) == 2
    command("rm", "second", "--yes", "--storage", str(store.root))
    left = Storage(store)
    assert len(ids(left, "extract")) == 1, "the last run's extraction goes with it; the stopped run's stays"
    assert len(ids(left, "questions")) == 1


def test_what_something_is_built_on_stays(store: Store) -> None:
    found = Storage(store)
    questions = ids(found, "questions")[0]
    with pytest.raises(ArtifactError, match="is built on: remove that first"):
        found.removal([found.find(questions)])
    refused = command("rm", questions, "--yes", "--storage", str(store.root))
    assert refused.exit_code == 1
    assert "Traceback" not in refused.output


def test_a_name_or_id_is_found_or_refused(store: Store) -> None:
    found = Storage(store)
    item = found.find("second")
    assert found.find(item.id) is found.find(item.id[:8]) is found.find(f"evaluate/{item.id[:8]}") is item
    with pytest.raises(ArtifactError, match="roma-ray ls"):
        found.find("third")
    for run_item in found.runs():
        run_item.name = "same"
    with pytest.raises(ConfigError, match="can be any of"):
        found.find("same")


def test_a_run_at_work_keeps_everything(store: Store) -> None:
    with store.used():
        busy = command("rm", "first", "--yes", "--storage", str(store.root))
        assert busy.exit_code == 1
        assert "a run is at work" in busy.output
        with store.used():  # as many runs as want
            pass
    assert Storage(store).find("first")
    stage = Storage(store).find("first").stage
    with stage.exclusive():
        found = Storage(store)
        with pytest.raises(BusyError, match="another run"):
            found.remove(found.removal([found.find("first")]), lambda line: None)
    assert Storage(store).find("first")


def test_links_and_strange_folders_are_left_alone(store: Store, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (store.root / "finetune" / ("a" * 16)).symlink_to(outside)
    (store.root / "evaluate" / "notes").mkdir()
    (store.root / "letters").symlink_to(outside)
    first = Storage(store).find("first").stage.path
    (first / "link").symlink_to(outside)
    assert "a" * 16 not in Storage(store).items
    command("rm", "first", "--yes", "--storage", str(store.root))
    command("gc", "--unfinished", "--yes", "--storage", str(store.root))
    assert (outside / "precious").exists()
    assert (store.root / "evaluate" / "notes").exists()
    assert not first.exists()


def stated(store: Store, kind: str, name: str, **identity: object) -> Path:
    """The folder of an unfinished stage that says of itself what a stranger wrote."""
    folder = store.root / kind / name
    folder.mkdir(parents=True)
    (folder / IDENTITY).write_text(json.dumps({"stage": kind, **identity}))
    return folder


def test_stages_that_name_one_another_in_a_circle_or_a_long_row_are_listed(store: Store) -> None:
    one, two, three, own = (letter * 16 for letter in "abcd")
    for kind, name, below in (("questions", one, two), ("questions", two, one), ("extract", three, one)):
        stated(store, kind, name, inputs={"x": below})
    stated(store, "questions", own, inputs={"x": own})
    row = [f"{number:016x}" for number in range(1200)]
    for name, below in zip(row, [*row[1:], own], strict=True):
        stated(store, "questions", name, inputs={"x": below})
    found = Storage(store)
    assert [item.id for item in found.needs(found.items[three])] == [three, one, two]
    assert [item.id for item in found.needs(found.items[row[0]])] == [*row, own]
    assert [item.id for item in found.needs(found.items[row[1]], found.items[row[0]])] == [*row, own]
    assert command("ls", "--storage", str(store.root)).exit_code == 0


@pytest.mark.parametrize("kind", ["sweep", "verdict"])
def test_what_tells_of_many_runs_keeps_them(store: Store, kind: str) -> None:
    """They are no runs of their own beside it, and what stopped beside them does not take them away."""
    page = make(store, kind)
    members = ids(Storage(store), "evaluate")
    write_text(page.path / MEMBERS, json.dumps({"stages": members}))
    stopped = make(store, "sweep", finish=False, grid=True)
    write_text(stopped.path / MEMBERS, json.dumps({"stages": members}))
    found = Storage(store)
    assert {run.id for run in found.runs() if run.kind != "finetune"} == {page.fingerprint, stopped.fingerprint}
    assert not {removal.item.id for removal in found.garbage(unfinished=True)} & set(members)
    assert set(members) < {item.id for item in found.needs(found.items[page.fingerprint])}


def test_files_that_a_stranger_wrote_name_no_run_and_stop_no_list(store: Store) -> None:
    (stated(store, "sweep", "a" * 16) / MEMBERS).write_text('{"stages": 5}')
    for letter, name in (("b", "[" * 5000), ("c", "[&a [x, x], *a]"), ("d", "{")):
        (stated(store, "evaluate", letter * 16) / CONFIG).write_text(f"name: {name}\n")
    os.mkfifo(stated(store, "extract", "e" * 16) / MANIFEST)
    found = Storage(store)
    assert {letter * 16 for letter in "abcde"} < set(found.items)
    assert [found.items[letter * 16].name for letter in "bcd"] == ["", "", ""]
    with pytest.raises(ArtifactError, match="is no file"):
        read_manifest(store.root / "extract" / ("e" * 16))


def test_a_folder_that_may_not_be_read_is_passed_over_or_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (store.root / "lost+found").mkdir()
    known, real = len(Storage(store).items), Path.iterdir
    closed = ["lost+found"]

    def iterdir(path: Path) -> Iterator[Path]:
        if path.name in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert len(Storage(store).items) == known
    closed.append("extract")
    with pytest.raises(StorageError, match=r"extract: Permission denied.*--storage"):
        Storage(store)


def test_gc_frees_caches_first_and_unfinished_work_only_when_told(store: Store) -> None:
    found = Storage(store)
    (removal,) = found.garbage(unfinished=False)
    assert removal.cache_alone
    assert removal.bytes == 1000
    assert removal.item.id == next(i.id for i in found.needs(found.find("first")) if i.kind == "extract")
    dry = command("gc", "--storage", str(store.root))
    assert "Nothing was removed" in dry.output
    assert Storage(store).garbage(unfinished=False)
    command("gc", "--yes", "--storage", str(store.root))
    assert Storage(store).garbage(unfinished=False) == []
    kept = Storage(store).find(removal.item.id)
    assert kept.state == "complete"
    assert kept.stage.released
    kept.stage.verify()
    assert "nothing to remove" in command("gc", "--yes", "--storage", str(store.root)).output
    command("gc", "--yes", "--unfinished", "--storage", str(store.root))
    assert sorted(Storage(store).title(r) for r in Storage(store).runs()) == ["first", "second"]
    assert len(ids(Storage(store), "extract")) == 1


def test_a_stage_that_ends_before_it_wrote_leaves_no_folder(tmp_path: Path) -> None:
    store = Store(tmp_path)
    stage = store.stage("questions", {}, {}, 1)
    with pytest.raises(ConfigError), stage.exclusive():
        raise ConfigError("no")
    assert list(tmp_path.iterdir()) == []
    write_text(stage.path / "half.txt", "x")
    with pytest.raises(ConfigError), stage.exclusive():
        raise ConfigError("no")
    assert (stage.path / "half.txt").exists(), "what was done is kept"


def test_a_rejected_data_file_leaves_no_folder(tmp_path: Path) -> None:
    config = make_world(tmp_path, count=12)
    (tmp_path / "questions.jsonl").write_text("no question\n")
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    found = command("local", "--config", str(tmp_path / "c.yaml"))
    assert found.exit_code == 1
    assert "no usable question" in found.output
    left = [path.name for path in (tmp_path / "storage").iterdir() if not path.name.startswith(".")]
    assert left == []


def test_a_cache_that_was_freed_comes_back_with_the_training_that_needs_it(tmp_path: Path) -> None:
    config = make_world(tmp_path, count=40)
    setup = resolve(config)
    first = run(setup, Silence())
    routers = (first.stages["finetune"].path / ADAPTER / "adapter_model.safetensors").read_bytes()
    assert "freed" in command("gc", "--yes", "--storage", config.storage or "").output
    extraction = first.stages["extract"]
    assert list(extraction.path.glob("batches/*.safetensors")) == []

    again = run(setup, Silence())  # nothing needs the states: nothing is done again
    assert again.stages["extract"].released
    assert again.summary["splits"] == first.summary["splits"]

    first.stages["evaluate"].discard()
    first.stages["finetune"].discard()
    anew = run(setup, Silence())
    assert not anew.stages["extract"].released
    assert (anew.stages["finetune"].path / ADAPTER / "adapter_model.safetensors").read_bytes() == routers


def test_an_export_replaces_nothing_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "there.pt").write_text("x")
    refused = command("export", str(tmp_path / "adapter"), str(tmp_path / "there.pt"), "--format", "reference")
    assert refused.exit_code == 2
    assert "--force" in refused.output
    assert (tmp_path / "there.pt").read_text() == "x"
    forced = command(
        "export", str(tmp_path / "adapter"), str(tmp_path / "there.pt"), "--format", "reference", "--force"
    )
    assert "--force" not in forced.output


# -- one meaning of `local` --------------------------------------------------------------------------------------------


def test_local_is_this_process_however_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--local`, `--address local` and `ray.address: local` start no Ray; a sweep, which needs it, says so."""

    def no_cluster(*arguments: object) -> None:
        raise AssertionError("a cluster was opened")

    monkeypatch.setattr("roma_ray.cluster.ray_runners.open_cluster", no_cluster)
    config = make_world(tmp_path, count=24)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    given = ["--config", str(tmp_path / "c.yaml"), "--quiet", "--set", "tracking.enabled=false"]
    for how in (["--local"], ["--address", "local"], ["--set", "ray.address=local"]):
        done = command("neighbors", *given, *how)
        assert done.exit_code == 0, done.output
    assert command("run", *given, "--local", "--address", "host:1").exit_code == 2
    refused = command("tune", "--address", "local")
    assert refused.exit_code == 2
    assert "--address new" in refused.output


def test_what_else_lies_below_a_prefix_is_nobodys_stage(bucket: Proxy) -> None:
    import boto3

    store = Store(bucket.address("contents/strangers"))
    stage = make(store, "extract")
    mine = make(store, "my_stage")
    client = boto3.client("s3", endpoint_url=bucket.endpoint, region_name="us-east-1")
    for name in ("photos//1.jpg", "photos/../2.jpg", "photos/a\tb/3.jpg", "extract/note.txt", "extract/deep/x"):
        client.put_object(Bucket=NAME, Key=f"contents/strangers/{name}", Body=b"1")
    assert set(Storage(store).items) == {stage.fingerprint, mine.fingerprint}


def test_a_process_sees_what_another_removed_once_it_begins_something_new(bucket: Proxy) -> None:
    store = Store(bucket.address("contents/removed"))
    stage = make(store, "extract")
    assert stage.manifest()["facts"] == {}
    objects.remove_folder(stage.path)  # as another process does
    store.check()
    assert not stage.complete


def test_a_runs_configuration_and_name_are_read_from_a_bucket(bucket: Proxy) -> None:
    address = bucket.address("contents/named")
    stage = make(Store(address), "evaluate", name="mine")
    write_text(stage.path / CONFIG, load_config().model_copy(update={"name": "mine"}).to_yaml())
    assert config_of("mine", address).name == "mine"
    assert run_name(stage.path) == "mine"
