"""Every fault on a simulated cluster of three nodes: python -m tests.chaos. `make chaos` runs it and prints a table.

After each fault the storage must hold the undisturbed run's files to the bit. Needs no GPU; the faults of storage need the
right to mount a file system in memory (root).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from roma_ray.engine.progress import Silence
from roma_ray.engine.setup import resolve
from roma_ray.runs.pipeline import run
from tests.bucket import bucket_server
from tests.chaos.faults import FAULTS
from tests.chaos.scene import Scene
from tests.chaos.simulated import simulated_cluster
from tests.world import make_world


def main() -> int:
    """Run the faults; the exit code is the number of those not survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a part of the fault's name")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))
    config = make_world(
        folder / "world",
        count=90,
        extraction={"batch_tokens": 256},
        embedding={"batch_size": 1},
        finetune={"epochs": 2, "batch_size": 8, "micro_batch_size": 3, "checkpoint_steps": 2},
        ray={"extract_workers": 3, "embed_workers": 3, "finetune_workers": 3, "evaluate_workers": 3},
    )
    reference = run(resolve(config, device="cpu"), Silence())
    failed = 0
    with bucket_server() as proxy, simulated_cluster(folder / "ray") as nodes:
        nodes.add()
        nodes.add()
        scene = Scene(nodes, config, reference, folder, proxy)
        print(f"{'fault':<40} {'outcome':<10} {'seconds':>7}", flush=True)
        for fault in FAULTS:
            if options.only not in fault.name:
                continue
            began = time.monotonic()
            outcome = "survived"
            try:
                fault.run(scene)
            except Exception:  # noqa: BLE001 - the table goes on; the traceback says why
                traceback.print_exc()
                outcome, failed = "FAILED", failed + 1
            print(f"{fault.name:<40} {outcome:<10} {time.monotonic() - began:>7.1f}", flush=True)
    print(f"{failed} of the faults not survived")
    if not failed:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"logs: {folder}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
