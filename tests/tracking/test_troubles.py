"""Strange servers and damaged folders: secrets stay secret, nothing waits for ever, and nobody is blamed for another's fault."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from roma_ray.cli.commands import main
from roma_ray.engine.progress import Silence
from roma_ray.engine.setup import resolve
from roma_ray.runs.pipeline import Run, locate, replay, run
from roma_ray.tracking import Tracker
from tests.tracking.strange import MANNERS, strange_server
from tests.tracking.support import Said, ledger
from tests.world import make_world

CANARY = "kanari3nvogel"
DATABASES = (
    f"postgresql://127.0.0.1:9/db?user=u&password={CANARY}",
    f"mysql+pymysql://u:{CANARY}@127.0.0.1:9/db",
    f"nonsense://u:{CANARY}@127.0.0.1:9/db",
    f"http://u:pa/{CANARY}@127.0.0.1:9",
    f"http://u%3A{CANARY}@127.0.0.1:9",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run that nobody recorded, its configuration beside it."""
    root = tmp_path_factory.mktemp("troubles")
    config = make_world(root, count=30)
    (root / "config.yaml").write_text(config.to_yaml())
    return run(resolve(config), Silence(), until="report")


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def uri(request: pytest.FixtureRequest) -> Iterator[str]:
    """An address with a secret, of a server of the manner that is asked for."""
    if request.param not in MANNERS:
        yield request.param
        return
    with strange_server(request.param) as port:
        yield f"http://user:{CANARY}@127.0.0.1:{port}"


def roma_ray(finished: Run, *words: str) -> Result:
    config = finished.setup.store.root.parent / "config.yaml"
    command, *options = words
    return CliRunner().invoke(main, [command, "--config", str(config), *options], catch_exceptions=False)


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("uri", [*MANNERS, *DATABASES], indirect=True)
def test_nothing_is_delivered_and_no_secret_told(
    finished: Run, uri: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    found = roma_ray(finished, "track")
    assert found.exit_code == 1
    assert "cannot be used" in found.output
    assert "still lacks: " in found.output
    seen = (found.output + str(capfd.readouterr())).encode() + everything(finished.setup.store.root)
    assert CANARY.encode() not in seen.lower()
    assert base64.b64encode(f"user:{CANARY}".encode()) not in seen


@pytest.mark.parametrize("uri", ["mirror"], indirect=True)
def test_a_run_and_a_comparison_go_on_and_keep_the_secret(
    finished: Run, uri: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    ran = roma_ray(finished, "local", "--track", "--set", "name=other")
    assert ran.exit_code == 0, ran.output
    methods = roma_ray(finished, "baselines", "--local", "--methods", "base")
    assert methods.exit_code == 0, methods.output
    looked = roma_ray(finished, "compare", "f" * 32, "e" * 32)
    assert looked.exit_code == 1
    assert "cannot be used" in looked.output, "a server that is away is not a run that is none"
    output = ran.output + methods.output + looked.output + str(capfd.readouterr())
    seen = output.encode() + everything(finished.setup.store.root)
    assert b"MLflow at" in seen
    assert CANARY.encode() not in seen.lower()


@pytest.mark.parametrize("uri", ["drip"], indirect=True)
def test_a_server_that_drips_holds_nobody(finished: Run, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert "no whole answer within 3 s" in roma_ray(finished, "track").output


def test_track_says_by_its_exit_code_whether_all_is_there(finished: Run, database: str) -> None:
    whole = roma_ray(finished, "track", "--set", f"tracking.uri={database}")
    assert whole.exit_code == 0, whole.output
    assert f"mlflow ui --backend-store-uri {database}`, then http://127.0.0.1:5000/#/experiments/" in whole.output


def test_a_file_of_ours_that_is_missing_is_no_outage(finished: Run, database: str, tmp_path: Path) -> None:
    shutil.copytree(finished.setup.store.root, tmp_path / "storage")
    config = finished.setup.config.model_copy(update={"storage": str(tmp_path / "storage")})
    tracking = config.tracking.model_copy(update={"uri": database, "system_metrics": False})
    setup = resolve(config.model_copy(update={"tracking": tracking}))
    planned = locate(setup)
    page, steps = planned["report"].path / "report.html", planned["finetune"].path / "steps.parquet"
    kept = {path: path.read_bytes() for path in (page, steps)}
    for path in kept:
        path.unlink()
    said = Said()
    with Tracker(setup, said) as tracker:
        replay(setup, tracker)
    assert sorted(tracker.lacking) == ["finetune", "pipeline", "report"]
    assert not said.about("cannot be used")
    assert len(said.about(f"`pipeline` is not whole here, so MLflow does not get all of it: {page} is missing")) == 1
    assert len(said.about("`finetune` is not whole here")) == 1
    assert len(said.about("still lacks: ")) == 1
    assert {found.info.status for found, _ in ledger(database).values()} == {"FINISHED"}
    for path, content in kept.items():
        path.write_bytes(content)
    with Tracker(setup, Said()) as tracker:
        replay(setup, tracker)
    assert tracker.lacking == []
