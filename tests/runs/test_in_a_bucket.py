"""A run whose storage is a bucket: the bytes of a local one, whatever the network, the bucket and other drivers do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from roma_ray.config.schema import Config
from roma_ray.engine.progress import Silence
from roma_ray.engine.setup import resolve
from roma_ray.errors import ArtifactError, BucketError, BusyError, ConfigError, ModelError
from roma_ray.runs.pipeline import Run
from roma_ray.runs.pipeline import run as pipeline
from roma_ray.store import files
from roma_ray.store.artifacts import Stage, Store
from roma_ray.store.buckets import as_path
from roma_ray.store.contents import Storage
from tests.bucket import NAME, Proxy, Request, Rule, environment, every
from tests.world import make_world

STAGES = ("questions", "extract", "embed", "neighbors", "finetune", "evaluate")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    root = tmp_path_factory.mktemp("bucket")
    config = make_world(root, count=90, extraction={"batch_tokens": 400}, finetune={"epochs": 2, "checkpoint_steps": 1})
    (root / "config.yaml").write_text(config.to_yaml())
    return config


@pytest.fixture(scope="module")
def straight(config: Config) -> dict[str, Any]:
    """The same in a folder."""
    return digests(pipeline(resolve(config), Silence()))


def there(config: Config, storage: str) -> Config:
    return config.model_copy(update={"storage": storage})


def ran(config: Config, storage: str) -> dict[str, Any]:
    return digests(pipeline(resolve(there(config, storage)), Silence()))


def digests(run: Run) -> dict[str, Any]:
    """The digest of every file of every stage that holds no times."""
    return {
        f"{name}/{file}": fact["sha256"]
        for name in STAGES
        for file, fact in run.stages[name].manifest()["files"].items()
        if not file.endswith(".jsonl")
    }


def prefix(request: pytest.FixtureRequest) -> str:
    return "runs/" + request.node.name.translate({ord(c): "-" for c in "[]/ "})


def test_the_bytes_are_a_folders_and_nothing_is_written_beside(
    config: Config, straight: dict[str, Any], bucket: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    address = bucket.address("plain")
    assert ran(config, address) == straight
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    # A second time nothing is put but marks of being there.
    bucket.reset()
    puts: list[str] = []
    bucket.rule = lambda request: puts.append(request.key) if request.method == "PUT" else None
    assert ran(config, address) == straight
    assert [key for key in puts if "/." not in key] == []
    # And on a node that has nothing yet.
    monkeypatch.setenv("ROMA_RAY_SCRATCH", str(tmp_path / "other"))
    assert ran(config, address) == straight


STORMS: dict[str, Rule] = {
    "slow": every("slow", 5),
    "broken": every("broken", 5),
    "reset uploads": every("reset", 6, lambda request: request.method == "PUT"),
    "reset downloads": every("cut", 4, lambda request: request.method == "GET"),
    "lost answers": every("lost", 4, lambda request: request.method == "PUT"),
    "conflicts": every(
        "conflict", 3, lambda request: request.method == "PUT" and request.key.endswith("manifest.json")
    ),
}


@pytest.mark.parametrize("storm", STORMS)
def test_a_storm_changes_no_byte(
    config: Config, straight: dict[str, Any], bucket: Proxy, request: pytest.FixtureRequest, storm: str
) -> None:
    bucket.rule = STORMS[storm]
    assert ran(config, bucket.address(prefix(request))) == straight
    assert len(bucket.told) >= 3


def test_lists_that_come_late_change_no_result(
    config: Config, straight: dict[str, Any], bucket: Proxy, request: pytest.FixtureRequest
) -> None:
    """A manifest may then lack a file; none that it names is another."""
    bucket.rule = lambda request: "stale" if request.lists else None
    found = ran(config, bucket.address(prefix(request)))
    assert bucket.told
    assert found
    assert found.items() <= straight.items()
    bucket.reset()
    assert ran(config, bucket.address(prefix(request))).items() <= straight.items()
    adapter = "finetune/adapter/adapter_model.safetensors"
    stage = pipeline(resolve(there(config, bucket.address(prefix(request)))), Silence()).stages["finetune"]
    assert files.file_digest(stage.path / "adapter" / "adapter_model.safetensors") == straight[adapter]


@pytest.mark.parametrize("what", ["forbidden", "expired"])
@pytest.mark.parametrize("stage", ["extract", "finetune", "evaluate"])
def test_a_refusal_in_the_middle_ends_in_words_and_the_same_command_goes_on(
    config: Config, straight: dict[str, Any], bucket: Proxy, request: pytest.FixtureRequest, stage: str, what: str
) -> None:
    address, seen = bucket.address(prefix(request)), []

    def later(request: Request) -> str | None:
        seen.append(request.key)
        return what if sum(f"/{stage}/" in key and "/." not in key for key in seen) > 4 else None

    bucket.rule = later
    with pytest.raises(BucketError, match=r"s3://.*: the bucket refuses it .*same command again"):
        ran(config, address)
    bucket.reset()
    time.sleep(5)  # the lease could not be given back: it expires
    assert ran(config, address) == straight


def test_a_bucket_that_is_not_there_is_told_before_any_work(config: Config, bucket: Proxy) -> None:
    address = bucket.address("x").replace(f"s3://{NAME}/", "s3://no-such-bucket/")
    with pytest.raises(BucketError, match="there is no such bucket"):
        Store(there(config, address).storage).check()


# -- drivers -----------------------------------------------------------------------------------------------------------


def drive(config: Config, address: str, folder: Path) -> subprocess.Popen[str]:
    """A driver of its own process, on a machine of its own."""
    folder.mkdir(exist_ok=True)
    source = Path(config.questions.sources[0].path or "").parent / "config.yaml"
    command = [sys.executable, "-m", "roma_ray", "local", "--config", str(source), "--storage", address]
    return subprocess.Popen(
        [*command, "--summary", str(folder / "summary.json")],
        cwd=Path(__file__).parents[2],
        env={**environment(), "ROMA_RAY_SCRATCH": str(folder / "scratch")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("key", "count"), [("/extract/", 6), ("/finetune/", 12), ("/evaluate/", 8)], ids=["extract", "finetune", "evaluate"]
)
def test_kill_9_and_the_same_command_give_the_same_bytes(
    config: Config,
    straight: dict[str, Any],
    bucket: Proxy,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    key: str,
    count: int,
) -> None:
    address, seen = bucket.address(prefix(request)), []
    ready = threading.Event()

    def watch(request: Request) -> None:
        seen.append(request.key)
        if sum(key in f"/{one}" for one in seen) >= count:
            ready.set()

    bucket.rule = watch
    process = drive(config, address, tmp_path)
    assert ready.wait(120)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    again = drive(config, address, tmp_path)
    refused, _ = again.communicate(timeout=120)
    if again.returncode:
        assert f"pid {process.pid}; its lease expires in" in refused
        time.sleep(5.0)
    assert ran(config, address) == straight


def test_of_two_drivers_one_refuses_and_names_the_other(
    config: Config, straight: dict[str, Any], bucket: Proxy, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    address = bucket.address(prefix(request))
    bucket.delay = 0.01
    drivers = [drive(config, address, tmp_path / name) for name in ("one", "two")]
    said = [driver.communicate(timeout=200)[0] for driver in drivers]
    codes = [driver.returncode for driver in drivers]
    assert 0 in codes, said
    for code, text, other in zip(codes, said, reversed(drivers), strict=True):
        if code:
            assert f"pid {other.pid}; its lease expires in" in text
    bucket.reset()
    assert ran(config, address) == straight


# -- a stage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stage(bucket: Proxy, request: pytest.FixtureRequest) -> Stage:
    return Store(bucket.address(prefix(request))).stage("extract", {"a": 1}, {}, 1)


def finish(stage: Stage) -> None:
    stage.finish(facts={}, seconds=1.0)


def test_another_driver_that_completed_the_stage_is_used_where_it_made_the_same(stage: Stage) -> None:
    files.write_text(stage.path / "a", "1")
    finish(stage)
    first = stage.manifest()
    finish(stage)
    assert stage.manifest() == first
    files.write_text(stage.path / "a", "2")
    with pytest.raises(ArtifactError, match="with other results"):
        finish(stage)
    with pytest.raises(ArtifactError, match="not what was written"):
        stage.verify()
    files.remove(stage.path / "a")
    with pytest.raises(ArtifactError, match="is missing"):
        stage.verify()


def test_of_a_complete_stage_the_bucket_is_asked_once(stage: Stage, bucket: Proxy) -> None:
    files.write_text(stage.path / "a", "1")
    finish(stage)
    stage.manifest()
    files.local(stage.path / "a")
    bucket.reset()
    for _ in range(3):
        assert stage.complete
        assert set(stage.manifest()["files"]) == {"a"}
        assert files.local(stage.path / "a").read_text() == "1"
    assert bucket.requests.total() == 0


def test_who_lost_its_lease_completes_nothing(stage: Stage) -> None:
    from roma_ray.store import leases

    with stage.exclusive():
        files.write_text(stage.path / "a", "1")
        leases._held[stage.path / ".lock"]._over.set()
        time.sleep(4.2)
        with pytest.raises(BusyError, match="may have taken over"):
            finish(stage)
    assert not stage.complete


def test_what_ends_before_it_wrote_leaves_nothing(stage: Stage) -> None:
    with pytest.raises(KeyboardInterrupt):
        with stage.exclusive():
            raise KeyboardInterrupt
    assert files.below(stage.path) == []


def test_contents_are_listed_and_removed(config: Config, straight: dict[str, Any], bucket: Proxy) -> None:
    address = bucket.address("contents")
    found = pipeline(resolve(there(config, address)), Silence())
    storage = Storage(Store(address))
    assert [item.id for item in storage.runs()] == [found.stages["evaluate"].fingerprint]
    assert {item.state for item in storage.items.values()} == {"complete"}
    size = sum(item.bytes for item in storage.items.values())
    assert size > 100_000
    cached = storage.garbage(unfinished=True)
    assert [(removal.item.kind, removal.cache_alone) for removal in cached] == [("extract", True)]
    assert storage.remove(cached, lambda text: None) == cached[0].bytes > 0
    assert ran(config, address).items() <= straight.items()
    storage = Storage(Store(address))
    storage.remove(storage.removal(storage.runs()), lambda text: None)
    assert Storage(Store(address)).items == {}


def test_a_run_at_work_keeps_everything(config: Config, bucket: Proxy) -> None:
    address = bucket.address("at-work")
    files.write_text(as_path(address) / "extract" / "0123456789abcdef" / "rows", "")
    storage = Storage(Store(address))
    with Store(address).used():
        with pytest.raises(BusyError, match="at work in s3://"):
            storage.remove(storage.garbage(unfinished=True), lambda text: None)
    storage.remove(storage.garbage(unfinished=True), lambda text: None)
    assert Storage(Store(address)).items == {}


# -- what a user has in a bucket ---------------------------------------------------------------------------------------


def test_models_and_questions_may_lie_in_a_bucket(
    config: Config, straight: dict[str, Any], bucket: Proxy, tmp_path: Path
) -> None:
    root = as_path(bucket.address("inputs"))
    places: dict[str, Callable[[], str]] = {
        "model": lambda: config.model.path,
        "encoder": lambda: config.embedding.model,
    }
    for name, place in places.items():
        for file in Path(place()).rglob("*"):
            if file.is_file():
                files.write_bytes(root / name / file.relative_to(place()), file.read_bytes())
    questions = Path(config.questions.sources[0].path or "")
    files.write_bytes(root / questions.name, questions.read_bytes())

    def at(name: str) -> str:
        return bucket.address(f"inputs/{name}")

    source = config.questions.sources[0].model_copy(update={"path": at(questions.name)})
    theirs = config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": at("model")}),
            "embedding": config.embedding.model_copy(update={"model": at("encoder")}),
            "questions": config.questions.model_copy(update={"sources": (source,)}),
            "storage": str(tmp_path / "storage"),
        }
    )
    found = digests(pipeline(resolve(theirs), Silence()))
    skipped = "finetune/adapter/"  # it names its base model
    assert {k: v for k, v in found.items() if not k.startswith(skipped)} == {
        k: v for k, v in straight.items() if not k.startswith(skipped)
    }
    weights = "finetune/adapter/adapter_model.safetensors"
    assert found[weights] == straight[weights]


def test_a_model_that_is_not_there_is_told(config: Config, bucket: Proxy) -> None:
    missing = config.model.model_copy(update={"path": bucket.address("nowhere/model")})
    with pytest.raises(ModelError, match="model folder s3://bucket/nowhere/model does not exist"):
        resolve(config.model_copy(update={"model": missing}))


def test_mlflow_needs_a_place_of_its_own(config: Config, bucket: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    from roma_ray.tracking.mlflow import Mlflow

    store = Store(bucket.address("tracked"))
    with pytest.raises(ConfigError, match=r"cannot lie in s3://bucket/tracked.*sqlite"):
        Mlflow.address(config, store)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert Mlflow.address(config, store) == "http://127.0.0.1:1"


def test_summaries_and_errors_name_addresses(config: Config, bucket: Proxy) -> None:
    summary = pipeline(resolve(there(config, bucket.address("plain"))), Silence()).summary
    assert summary["paths"]["finetune"].startswith("s3://bucket/plain/finetune/")
    assert "%3A" not in json.dumps(summary)
