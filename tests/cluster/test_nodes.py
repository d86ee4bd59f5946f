"""Stages on nodes of several kinds, simulated: Ray's own scheduler, fake GPUs, real labels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_stages_run_on_the_nodes_that_they_need(environment: dict[str, str], temporary: Path) -> None:
    """Extraction on any GPU, or one kind, or by label; training on one kind; a kind that is not there fails at once.

    And a node that goes away takes nothing with it.
    """
    folder = temporary / "nodes"
    folder.mkdir()
    script = Path(__file__).with_name("nodes_script.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["any GPU"] == [{"kind": "a100", "gpus": 1}, {"kind": "mi300x", "gpus": 1}]
    assert found["one kind"] == [{"gpus": 1, "kind": "mi300x"}]
    assert found["by label"] == [{"gpus": 1, "kind": "a100"}]
    assert found["training"]["workers"] == 1
    assert found["training"]["kind"] in ("a100", "mi300x")
    assert found["training"]["gpus"] == 1
    # The driver has no GPU, so a stage that needs one goes to a worker, and is tried again when that is killed.
    assert found["called"] == {"gpus": 1, "driver": False, "batches": [0, 1, 2]}
    # A node goes away in the middle: every batch is done, and reported once.
    assert found["node removed"] == {"reported": list(range(24)), "written": 24}
    # Workers that may outlive their run serve the next one of the same settings, and no other.
    first, second, other = map(set, found["kept"])
    assert first & second
    assert not other & (first | second)
    assert "room for 0 workers of 0.5 CPU, 1 GPU, accelerator H100" in found["refused"]
    assert "1 x (4 CPU, 1 GPU AMD-Instinct-MI300X-OAM" in found["refused"]
