"""The package as others install it: source archive and wheel, built without network, run outside the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import roma_ray

ROOT = Path(__file__).parents[1]
# Also those of an environment that takes them from another one (`make matrix`).
LIBRARIES = [place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")]
PARTS = ("pyproject.toml", "README.md", "LICENSE", "roma_ray")


def run(*command: object, folder: Path) -> str:
    """Run a command away from the checkout, without anything of it on the path; its standard output."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "ROMA_RAY_STORAGE")}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=kept, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source archive as `python -m build` does, with the setuptools that is here."""
    root = tmp_path_factory.mktemp("package")
    copy = root / "copy"
    copy.mkdir()
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    script = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
    archive = run(sys.executable, "-c", script, "build_sdist", root, folder=copy).splitlines()[-1]
    with tarfile.open(root / archive) as packed:
        # Early 3.11 knows no filters.
        packed.extractall(root / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = (root / "unpacked").iterdir()
    name = run(sys.executable, "-c", script, "build_wheel", root, folder=unpacked).splitlines()[-1]
    return root / name


def test_the_wheel_holds_all_that_the_package_reads(wheel: Path) -> None:
    assert wheel.name == f"roma_ray-{roma_ray.__version__}-py3-none-any.whl"
    held = set(zipfile.ZipFile(wheel).namelist())
    tracked = {p for p in (ROOT / "roma_ray").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    missing = {p.relative_to(ROOT).as_posix() for p in tracked} - held
    assert not missing
    assert not [name for name in held if name.startswith(("tests", "benchmarks", "jobs"))]


def test_the_wheel_runs_the_embedded_default_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", place, folder=tmp_path)
    python = place / "bin" / "python"
    packages = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", folder=tmp_path).strip())
    # The libraries are those that are here: a path and no more, so that no editable install comes with them.
    (packages / "libraries.pth").write_text("\n".join(LIBRARIES) + "\n")
    run(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python),
        *("install", "--quiet", "--no-deps", "--no-index", wheel),
        folder=tmp_path,
    )
    where = run(python, "-c", "import roma_ray; print(roma_ray.__file__)", folder=tmp_path).strip()
    assert Path(where).is_relative_to(place)
    command = place / "bin" / "roma-ray"
    assert roma_ray.__version__ in run(command, "--version", folder=tmp_path)
    sources = "[{path: 'assets:questions/train.jsonl', limit: 60}, {path: 'assets:questions/test.jsonl', limit: 24}]"
    run(
        *(command, "local", "--quiet", "--storage", tmp_path / "storage", "--summary", tmp_path / "summary.json"),
        *("--set", f"questions.sources={sources}", "--set", "finetune.epochs=1"),
        folder=tmp_path,
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["splits"]["test"]["all"]["n"] == 24


def test_the_version_is_said_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "roma_ray.__version__"}
    assert f"## {roma_ray.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_who_only_runs_it_installs_no_development_tools() -> None:
    told = {
        target: subprocess.run(
            ["make", "-n", target, "VENV=none"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for target in ("demo", "venv", "test", "check")
    }
    for target, commands in told.items():
        assert ",dev]" in commands if target in ("test", "check") else ",dev]" not in commands, target


def test_doctor_demands_what_pyproject_demands() -> None:
    from roma_ray.doctor.machine import _NEEDED

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for package, lowest, too_new, remedy in _NEEDED:
        (stated,) = [line for line in wanted if line.partition(">=")[0].partition("[")[0] == package]
        assert f"'{stated}'" in remedy
        bounds = [".".join(map(str, numbers)) for numbers in (lowest, too_new)]
        assert f">={bounds[0]},<{bounds[1]}" in stated
