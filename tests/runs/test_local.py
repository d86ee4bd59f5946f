"""`roma-ray local` as a process: kill -9 in the middle of each heavy stage, same command again, same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from roma_ray.config.schema import Config
from tests.world import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    root = tmp_path_factory.mktemp("kill")
    config = make_world(
        root, count=120, extraction={"batch_tokens": 200}, finetune={"epochs": 4, "checkpoint_steps": 1}
    )
    (root / "config.yaml").write_text(config.to_yaml())
    return root, config


def command(root: Path, storage: str) -> list[str]:
    # A shell that runs the tests in the background ignores SIGINT, which its children inherit.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from roma_ray.cli.commands import main; main()"
    summary = str(root / f"{storage}.json")
    return [
        sys.executable,
        "-c",
        code,
        "local",
        "--config",
        str(root / "config.yaml"),
        "--storage",
        str(root / storage),
        "--summary",
        summary,
    ]


def start(root: Path, storage: str, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command(root, storage), *more],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(root: Path, storage: str) -> dict[str, object]:
    process = start(root, storage)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return json.loads((root / f"{storage}.json").read_text())


def comparable(summary: dict[str, object]) -> dict[str, object]:
    return {
        k: v
        for k, v in summary.items()
        if k in {"splits", "probe", "diagnostics", "guards", "fingerprints", "neighborhoods", "selected_epoch"}
    }


def wait_for(root: Path, storage: str, pattern: str, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while len(list((root / storage).glob(pattern))) < count:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def straight(world: tuple[Path, Config]) -> dict[str, object]:
    return finish(world[0], "straight")


@pytest.mark.parametrize(
    ("storage", "pattern", "count"),
    [
        ("in-extraction", "extract/*/batches/*.parquet", 5),
        ("in-training", "finetune/*/checkpoint.safetensors", 1),
        ("in-evaluation", "evaluate/*/.parts/tuned/*.parquet", 1),
    ],
)
def test_kill_9_and_the_same_command_give_the_same_bits(
    world: tuple[Path, Config], straight: dict[str, object], storage: str, pattern: str, count: int
) -> None:
    root, _ = world
    process = start(root, storage)
    wait_for(root, storage, pattern, count, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    batches = {p: p.stat().st_mtime_ns for p in (root / storage).glob("extract/*/batches/*.parquet")}
    summary = finish(root, storage)
    assert comparable(summary) == comparable(straight)
    # No batch that was done is done again.
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in batches.items())
    for name in ("adapter_model.safetensors",):
        mine, theirs = (load_file(next((root / s).glob(f"finetune/*/adapter/{name}"))) for s in (storage, "straight"))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_second_run_recomputes_nothing(world: tuple[Path, Config], straight: dict[str, object]) -> None:
    root, _ = world
    before = {
        p: p.stat().st_mtime_ns for p in (root / "straight").rglob("*") if p.is_file() and not p.name.startswith(".")
    }
    again = finish(root, "straight")
    assert comparable(again) == comparable(straight)
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in before.items())


def test_ctrl_c_says_how_to_go_on(world: tuple[Path, Config]) -> None:
    root, _ = world
    # Too long to end before the signal, however busy the machine is.
    process = start(root, "interrupted", "--set", "finetune.epochs=100000")
    wait_for(root, "interrupted", "extract/*/batches/*.parquet", 2, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "run the same command to go on" in output
    assert "Traceback" not in output
