"""What needs no library is told before any is loaded; a setting that a command does not read is said; the hub is asked once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from roma_ray.cli.settings import unused
from roma_ray.config.loading import load_config
from roma_ray.engine import hub
from roma_ray.errors import ModelError

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "transformers", "mlflow", "numpy", "pyarrow", "sentence_transformers", "lm_eval", "datasets")


def early(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run a command in a process of its own; its exit code and stderr, which ends with the heavy libraries it had loaded."""
    script = (
        "import sys\n"
        "from roma_ray.cli.commands import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        f"    print('loaded:', *sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)\n"
        "    raise\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["local", "--set", "model.path=./nowhere"], 1, "the model folder ./nowhere does not exist"),
        (["run", "--set", "model.path=a/b/c"], 1, "the model folder a/b/c does not exist"),
        (["run", "--set", "model.path=questions.jsonl"], 1, "questions.jsonl is not a model folder"),
        (["run", "--set", "model.path=nobody/nothing"], 1, "neither a folder nor in the hub's cache here"),
        (["local", "--set", "embedding.model=./nowhere"], 1, "the embedding model ./nowhere"),
        (["extract", "--storage", "questions.jsonl/below"], 1, "cannot write"),
        (["tune", "--storage", "questions.jsonl/below"], 1, "cannot write"),
        (["local", "--set", "questions.sources=[{path: none.jsonl}]"], 1, "'none.jsonl' does not exist"),
        (["local", "--set", "questions.sources=[{path: .}]"], 1, "'.' is a folder: name a .jsonl or .parquet file"),
        (
            ["report", "--set", "questions.sources=[{path: notes.txt}]"],
            1,
            "must be a .jsonl, .jsonl.gz or .parquet file",
        ),
        (["evaluate", "--tasks", "none.jsonl"], 2, "--tasks none.jsonl: there is no such file"),
        (["evaluate", "--tasks", "piqa", "--adapter", "none"], 2, "--adapter none: there is no such file"),
        (["baselines", "--methods", "romo"], 2, "did you mean roma?"),
        (["compare", "x", "--out", "table.pdf"], 2, "which says the form"),
        (["repair", "assets:model", "--teacher", "./none", "--texts", "rows.jsonl"], 1, "the model folder ./none"),
        (["repair", "assets:model", "--texts", "none.jsonl"], 1, "'none.jsonl' does not exist"),
        (
            ["repair", "assets:model", "--texts", "rows.jsonl", "--questions", "no.jsonl"],
            1,
            "'no.jsonl' does not exist",
        ),
        (["local", "--summary", "none/x.json"], 2, "its folder does not exist"),
    ],
)
def test_what_needs_no_library_is_told_before_any_is_loaded(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / "questions.jsonl").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"text": "one two"}\n')
    (tmp_path / "notes.txt").write_text("")
    found, errors = early(tmp_path, *arguments)
    assert found == code, errors
    assert message in errors
    assert errors.endswith("loaded:\n"), errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("finetune.layers=L5", "finetune.layers: unknown setting; did you mean `routing.layers`?"),
        ("layers=L5", "layers: unknown setting; did you mean `routing.layers`?"),
        ("model.device=cpu", "model.device: unknown setting; did you mean `device`?"),
        ("baselines.epochs=3", "did you mean `finetune.epochs`?"),
        ("routing.learning_rat=3", "did you mean `finetune.learning_rate`?"),
    ],
)
def test_a_setting_in_the_wrong_place_is_found_in_the_right_one(override: str, meant: str, tmp_path: Path) -> None:
    code, errors = early(tmp_path, "local", "--set", override)
    assert code == 2
    assert meant in errors


def test_a_configuration_without_a_model_is_told_of_the_embedded_one(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("questions: {sources: [{path: my.jsonl}]}\n")
    code, errors = early(tmp_path, "local", "--config", "my.yaml")
    assert code == 2
    assert "model: no model is named" in errors
    assert "assets:model" in errors
    (tmp_path / "my.yaml").write_text("model: {path: assets:model}\n")
    assert "assets:questions/train.jsonl" in early(tmp_path, "local", "--config", "my.yaml")[1]


# -- the hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment in which the hub may be asked, with an empty cache."""
    # Set before they are removed, so that what the code sets goes with the test.
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, online: Path) -> Iterator[list[str]]:
    """A hub that answers everything with an error, and what it was asked."""
    requests: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            requests.append(self.path)
            self.send_error(500)

        def log_message(self, format: str, *args: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield requests
        server.shutdown()


def test_a_hub_that_answers_is_asked_once_and_left_to_its_client(asked: list[str]) -> None:
    hub.check_model("nobody/nothing")
    hub.check_model("nobody/else")
    assert hub.answers()
    assert hub.go_offline("a model") is None
    assert len(asked) == 1
    assert not hub.offline()


def test_where_the_hub_is_away_its_cache_alone_is_used(online: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"nobody/nothing .* does not answer"):
        hub.check_model("nobody/nothing")
    snapshot = online / "models--nobody--nothing" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    hub.check_model("nobody/nothing")
    said = hub.go_offline("nobody/nothing")
    assert said is not None
    assert "nobody/nothing can come from its cache here alone" in said
    assert hub.offline()
    assert hub.go_offline("nobody/nothing") is None, "it is said once"
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        hub.check_model("nobody/else")


# -- settings that do nothing ------------------------------------------------------------------------------------------


def test_a_setting_that_a_command_does_not_read_is_said(tmp_path: Path) -> None:
    code, errors = early(
        tmp_path, "local", "--set", "baselines.shots=2", "--set", "ray.finetune_workers=3", "--set", "model.path=./no"
    )
    assert code == 1
    assert "note: `roma-ray local` does not use baselines.shots, ray.finetune_workers\n" in errors


@pytest.mark.parametrize(
    ("command", "override", "said"),
    [
        ("run", "baselines.seeds=2", True),
        ("run", "evaluation.batch_tokens=99", True),
        ("run", "ray.finetune_workers=2", False),
        ("run", "ray.evaluate_workers=2", True),
        ("extract", "finetune.epochs=2", True),
        ("extract", "ray.extract_workers=2", False),
        ("extract", "ray.finetune.accelerator=A100", True),
        ("baselines", "finetune.learning_rate=0.1", True),
        ("baselines", "finetune.epochs=1", False),
        ("baselines", "baselines={shots: 2}", False),
        ("tune", "baselines.seeds=2", True),
        ("compare", "model.path=x", True),
        ("compare", "tracking.uri=http://127.0.0.1", False),
        ("evaluate", "evaluation.batch_tokens=99", True),
        ("evaluate --tasks", "evaluation.batch_tokens=99", False),
        ("evaluate --adapter", "finetune.epochs=2", True),
        ("evaluate --adapter", "questions.prompt.max_tokens=99", False),
        ("track", "finetune.epochs=3", False),
    ],
)
def test_what_each_command_reads(command: str, override: str, said: bool) -> None:
    lines = unused(command, load_config(None, [override]), [override], file=False)
    assert any(f"`roma-ray {command}` does not use" in line for line in lines) == said


def test_every_command_that_takes_a_configuration_says_what_it_reads() -> None:
    from roma_ray.cli.commands import main

    config = load_config(None, ["seed=1"])
    configured = [name for name, command in main.commands.items() if "overrides" in {p.name for p in command.params}]
    for name in configured:
        assert unused(name, config, ["seed=1"], file=False) == []
    assert {"run", "local", "tune", "compare", "baselines"} <= set(configured)


def test_of_a_file_what_differs_from_the_default_is_said(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("model: {path: m}\nquestions: {sources: [{path: q.jsonl}]}\nbaselines: {seeds: 3, shots: 9}\n")
    config = load_config(path)
    assert unused("run", config, [], file=True) == ["`roma-ray run` does not use baselines.shots"]
    assert unused("run", load_config(), [], file=False) == [], "the embedded default says nothing"


def test_who_reads_whether_the_task_loss_is_judged_alone() -> None:
    override = "evaluation.task_loss_alone=true"
    config = load_config(None, [override])
    readers = {
        name
        for name in ("run", "local", "report", "tune", "verdict", "control", "baselines", "evaluate --tasks")
        if not unused(name, config, [override], file=False)
    }
    assert readers == {"run", "local", "report"}


def test_a_format_that_the_embedded_model_does_not_know_is_said() -> None:
    overrides = ["questions.prompt.format=letter"]
    (said,) = unused("run", load_config(None, overrides), overrides, file=False)
    assert "answers at chance level" in said


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["neighbors.epsilon=0.3"], "neighbors.epsilon does nothing here: neighbors.method is knn"),
        (
            ["questions.test_fraction=0.3", "questions.splits={train: 0.7, validation: 0.15, test: 0.15}"],
            "questions.test_fraction does nothing here: questions.splits is set",
        ),
        (["neighbors.k=4", "neighbors.method=epsilon"], "neighbors.k does nothing here: neighbors.method is epsilon"),
        (
            ["questions.prompt.instruction=Hi"],
            "questions.prompt.instruction does nothing here: questions.prompt.format is cloze",
        ),
        (
            ["finetune.regularizer.gradient_ratio=0.5", "finetune.regularizer.weight=0.8"],
            "finetune.regularizer.gradient_ratio does nothing here: ",
        ),
        (["finetune.regularizer={kind: none, weight: 2}"], "finetune.regularizer.weight does nothing here: "),
        (
            ["finetune.task_schedule.anneal_floor=0.5"],
            "finetune.task_schedule.anneal_floor does nothing here: finetune.task",
        ),
        (["finetune.decay_to=base"], "finetune.decay_to does nothing here: finetune.weight_decay is 0"),
        (
            ["finetune.logits.anneal=cosine"],
            "finetune.logits.anneal does nothing here: finetune.logits.temperature is 1",
        ),
        (
            ["finetune.guard={action: none, most_load: 0.5}"],
            "finetune.guard.most_load does nothing here: finetune.guard",
        ),
        (
            ["finetune.guard.action=halve", "finetune.epochs=1"],
            "finetune.guard.action does nothing here: finetune.epochs is 1",
        ),
        # What only the identities knew before.
        (
            ["neighbors.sigma=0.7", "neighbors.similarity=cosine"],
            "neighbors.sigma does nothing here: neighbors.similarity is",
        ),
        (
            ["finetune.select=best_validation", "finetune.epochs=1"],
            "finetune.select does nothing here: finetune.epochs is 1",
        ),
    ],
)
def test_a_setting_that_another_one_turns_off_is_said(overrides: list[str], line: str) -> None:
    (said,) = unused("run", load_config(None, overrides), overrides, file=False)
    assert said.startswith(line)
