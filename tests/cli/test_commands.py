"""The command line as a user meets it: in a process of its own, from another folder, with nothing of the test's."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from roma_ray import __version__
from roma_ray.cli.commands import main

HEAVY = ("torch", "transformers", "ray", "mlflow", "numpy", "pyarrow", "pydantic", "sentence_transformers", "faiss")
COMMANDS = sorted(main.commands)


ROOT = Path(__file__).parents[2]


def roma(folder: Path, *arguments: str, first: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command of this checkout in `folder`; packages found in `first` hide the installed ones."""
    path = os.pathsep.join(filter(None, [first, str(ROOT)]))
    return subprocess.run(
        [sys.executable, "-m", "roma_ray", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str
    exception: str = "SystemExit"


def together(folder: Path, commands: list[list[str]]) -> list[Done]:
    """Run commands one after another in one new process: they share the seconds that importing torch takes."""
    script = (
        "import json, sys\n"
        "from click.testing import CliRunner\n"
        "from roma_ray.cli.commands import main\n"
        "found = []\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    done = CliRunner().invoke(main, arguments)\n"
        "    found.append([done.exit_code, done.stdout, done.stderr, type(done.exception).__name__])\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [Done(*each) for each in json.loads(done.stdout.splitlines()[-1])]


def assert_readable(done: subprocess.CompletedProcess[str] | Done, *parts: str, code: int = 1) -> None:
    """An expected failure: exit 1 (2 for a wrong option), one message that begins with the command's name, no traceback."""
    assert done.returncode == code, done
    assert done.stderr.startswith("roma-ray: "), done
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    if isinstance(done, Done):
        assert done.exception == "SystemExit", done
    for part in parts:
        assert part in done.stderr, done


@pytest.mark.parametrize(
    "arguments", [[], *([command] for command in COMMANDS)], ids=lambda a: " ".join(a) or "roma-ray"
)
def test_help_needs_no_heavy_library(arguments: list[str]) -> None:
    # Half a second is the promise; what would break it is an import, and that can be asserted on any machine.
    script = (
        "import sys\n"
        "from roma_ray.cli.commands import main\n"
        "try:\n"
        "    main([*sys.argv[1:], '--help'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        f"found = sorted(set({HEAVY!r}) & set(sys.modules))\n"
        "assert not found, found\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_every_command_and_option_says_what_it_does() -> None:
    silent = []
    for name, command in main.commands.items():
        if not command.help:
            silent.append(name)
        options = [p for p in command.params if isinstance(p, click.Option)]
        # --format's choices say it all.
        silent += [f"{name} {p.opts[0]}" for p in options if not p.help and not isinstance(p.type, click.Choice)]
    assert not silent


def test_the_version_is_the_packages(tmp_path: Path) -> None:
    done = roma(tmp_path, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert f", version {__version__}\n" in done.stdout


def test_completion_works_as_documented(tmp_path: Path) -> None:
    def complete(**environment: str) -> str:
        script = "from roma_ray.cli.commands import main\nmain(prog_name='roma-ray')\n"
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout

    for shell in ("bash", "zsh", "fish"):
        assert f"_ROMA_RAY_COMPLETE={shell}_complete" in complete(_ROMA_RAY_COMPLETE=f"{shell}_source")
    found = complete(_ROMA_RAY_COMPLETE="bash_complete", COMP_WORDS="roma-ray run --sum", COMP_CWORD="2")
    assert "--summary" in found


def test_an_unknown_setting_is_one_readable_message(tmp_path: Path) -> None:
    done = roma(tmp_path, "local", "--set", "finetune.learning_rat=1")
    assert_readable(done, "finetune.learning_rat: unknown setting; did you mean `learning_rate`?", code=2)
    assert len(done.stderr.splitlines()) <= 2


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["local", "--config", "none.yaml"], "none.yaml"),
        (["local", "--config", "."], "cannot read"),
        (["local", "--config", "broken.yaml"], "not valid YAML"),
        (["local", "--set", "finetune.epochs"], "finetune.epochs=1"),
        (["local", "--set", "finetune.epochs=soon"], "finetune.epochs"),
    ],
    ids=["no file", "a folder", "no YAML", "no value", "no number"],
)
def test_a_users_mistake_is_one_readable_message(arguments: list[str], part: str, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    assert_readable(roma(tmp_path, *arguments), part, code=2)


def test_a_place_that_does_not_exist_is_one_readable_message(tmp_path: Path) -> None:
    storage, model = together(
        tmp_path, [["local", "--storage", "s3://bucket/x"], ["local", "--set", "model.path=./nowhere"]]
    )
    assert_readable(storage, "s3://bucket/x")
    assert_readable(model, "nowhere")


@pytest.mark.parametrize("arguments", [["frobnicate"], ["local", "--frobnicate"], ["inspect"], ["export", "a", "b"]])
def test_a_misspelt_command_is_a_usage_error(arguments: list[str], tmp_path: Path) -> None:
    done = roma(tmp_path, *arguments)
    assert done.returncode == 2
    assert "Usage:" in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_is_written_before_the_configuration_is_accepted(tmp_path: Path) -> None:
    roma(tmp_path, "local", "--set", "finetune.epochs=0", "--storage", "store")
    assert list(tmp_path.iterdir()) == []


# -- doctor ------------------------------------------------------------------------------------------------------------


def test_doctor_finds_this_installation_sound_and_a_fault_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sound, faulty = together(tmp_path, [["doctor", "--storage", "store"], ["doctor", "--storage", "file/below"]])
    assert (sound.returncode, sound.stderr) == (0, ""), sound
    lines = sound.stdout.splitlines()
    assert any(line.startswith("ok    torch: ") for line in lines)
    assert any(line.startswith("ok    storage: ") and str(tmp_path / "store") in line for line in lines)
    assert not any(line.startswith("FAIL") for line in lines)

    assert (faulty.returncode, faulty.stderr) == (1, ""), faulty
    lines = faulty.stdout.splitlines()
    fault = next(n for n, line in enumerate(lines) if line.startswith("FAIL"))
    assert lines[fault].startswith("FAIL  storage: ")
    assert "--storage" in lines[fault + 1]


def test_doctor_knows_an_untested_version_and_two_faiss(tmp_path: Path) -> None:
    for name, version in (("peft", "0.99.0"), ("faiss_cpu", "1.15.1"), ("faiss_gpu", "1.15.1")):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    done = roma(tmp_path, "doctor", first=str(tmp_path))
    assert done.returncode == 1
    assert "FAIL  peft: 0.99.0\n      pip install 'peft" in done.stdout
    assert "FAIL  faiss: faiss-cpu and faiss-gpu overwrite one another" in done.stdout


# -- inspect -----------------------------------------------------------------------------------------------------------


def garbage(folder: Path) -> list[Path]:
    """Paths that are no router checkpoint."""

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {folder / 'executed'}",)

    files = {
        "empty.pt": b"",
        "noise.pt": bytes(range(256)) * 40,
        "code.pt": pickle.dumps(Payload()),
        "router_ft.pt": pickle.dumps({"state_dict": {}}),
        "text.json": b'{"a": 1}',
        "torn.json": b'{"a": ',
        "noise.safetensors": b"\xff" * 64,
        "notes.txt": b"hello",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "nothing").mkdir()
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "adapter" / "roma.json").write_text("[]")
    return [*map(folder.joinpath, files), folder / "nothing", folder / "adapter", folder / "no"]


def test_inspect_refuses_what_is_no_checkpoint_and_runs_none_of_it(tmp_path: Path) -> None:
    paths = garbage(tmp_path)
    found = together(tmp_path, [["inspect", str(path)] for path in paths])
    for path, done in zip(paths, found, strict=True):
        assert_readable(done, path.name)
    assert not (tmp_path / "executed").exists(), "a checkpoint's pickled code was run"


def test_evaluations_that_make_no_sense_are_one_message(tmp_path: Path) -> None:
    wrong = {
        "without --tasks": (2, ["evaluate", "--limit", "5"]),
        "contradict": (2, ["evaluate", "--tasks", "piqa", "--base-only", "--adapter", "x"]),
        "which says the form": (2, ["compare", "x", "--out", "table.pdf"]),
        "did you mean roma?": (2, ["baselines", "--methods", "romo"]),
        "no finished evaluation": (1, ["compare", "nothing-here", "--storage", str(tmp_path)]),
    }
    ended = together(tmp_path, [arguments for _, arguments in wrong.values()])
    for (message, (code, _)), done in zip(wrong.items(), ended, strict=True):
        assert done.returncode == code, done
        assert message in done.stderr


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], ["run", "--help"], ["inspect", "adapter"]], ids=" ".join
)
def test_a_full_device_is_one_message(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "config.json").write_text("{}")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "roma_ray", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("roma-ray: ")
    assert len(done.stderr.splitlines()) == 1
    if "inspect" not in arguments:
        assert "standard output cannot be written (No space left on device)" in done.stderr


def test_summaries_of_commands_are_whole_on_eighty_columns() -> None:
    result = CliRunner().invoke(main, ["--help"], terminal_width=80)
    assert "..." not in result.output.partition("Commands:")[2]
    assert max(map(len, result.output.splitlines())) <= 80
    assert "Judge base and tuned models on Ray: on the run's own test questions, or with" in " ".join(
        result.output.split()
    )
