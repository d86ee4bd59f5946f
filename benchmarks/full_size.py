"""What `memory.py` and `full_shape.py` share: checkpoints of published shapes with random weights, and stages whose memory is measured.

Run as a script it is the process of one stage: `full_size.py UNTIL OVERRIDE ...` prints what that took as JSON.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common  # noqa: F401 - puts the repository's root on the path

ROOT = Path(__file__).resolve().parents[1]
_MARK = "MEASURED "


class Checkpoint:
    """Writes a bf16 checkpoint in the hub's layout a file at a time, so that it holds one file's tensors."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        import torch

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.index: dict[str, str] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int, scale: float = 0.02) -> Any:
        """A tensor of normal numbers."""
        import torch

        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, scale, generator=self.generator)

    def mlp(self, name: str, hidden: int, width: int) -> dict[str, Any]:
        """The three projections of a gated feed-forward block."""
        tensors = {f"{name}.{part}_proj.weight": self.random(width, hidden) for part in ("gate", "up")}
        return {**tensors, f"{name}.down_proj.weight": self.random(hidden, width)}

    def write(self, file: str, tensors: dict[str, Any]) -> None:
        """Write one file."""
        from safetensors.torch import save_file

        save_file(tensors, self.folder / file, metadata={"format": "pt"})
        self.index.update(dict.fromkeys(tensors, file))

    def ends(self, hidden: int, vocabulary: int) -> None:
        """Write embeddings, `lm_head` and the final norm."""
        self.write(
            "ends.safetensors",
            {
                "model.embed_tokens.weight": self.random(vocabulary, hidden),
                "lm_head.weight": self.random(vocabulary, hidden),
                "model.norm.weight": ones(hidden),
            },
        )

    def finish(self, config: dict[str, Any]) -> None:
        """Write the embedded model's tokenizer, the index and, last, the configuration: with it the checkpoint is whole."""
        assets = ROOT / "roma_ray" / "assets" / "model"
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(assets / file, self.folder / file)
        index = {"metadata": {}, "weight_map": self.index}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (self.folder / "config.json").write_text(json.dumps(config))


def ones(size: int) -> Any:
    """The weight of a norm."""
    import torch

    return torch.ones(size, dtype=torch.bfloat16)


def status(key: str) -> int:
    """Bytes of this process by a name of /proc/self/status: VmHWM is the peak of resident memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


class Peaks(threading.Thread):
    """Samples this process's own (anonymous) memory until it ends."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.own = 0

    def run(self) -> None:
        while True:
            self.own = max(self.own, status("RssAnon"))
            time.sleep(0.02)


def settings(model: Path, storage: str, questions: int, memory_gb: float, threads: int) -> list[str]:
    """The overrides of a run on the CPU that streams its extraction and finetunes the last five layers for an epoch."""
    from roma_ray.config.loading import load_config

    return [
        f"model.path={model}",
        "model.dtype=auto",
        f"storage={storage}",
        f"extraction.memory_gb={memory_gb}",
        f"questions.sources=[{{path: {load_config().questions.sources[0].path}, limit: {questions}}}]",
        "questions.test_fraction=0.2",
        "finetune.epochs=1",
        "finetune.batch_size=16",
        f"threads={threads}",
        "device=cpu",
    ]


def measure(until: str, overrides: Sequence[str]) -> dict[str, Any] | None:
    """Run the pipeline up to a stage in a process of its own; None where it fails, its last lines then on standard error.

    Keys: `resident` and `own` (peaks in GB), `seconds` and the process's `cpu` seconds, `stages` (seconds by stage), `self_check`
    (the extraction's figures).
    """
    command = [sys.executable, __file__, until, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        return None
    line = next(line for line in done.stdout.splitlines() if line.startswith(_MARK))
    found: dict[str, Any] = json.loads(line.removeprefix(_MARK))
    return found


def run_stage(until: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Run the pipeline up to a stage in this process; returns what `measure` does."""
    peaks = Peaks()
    peaks.start()
    from roma_ray.config.loading import load_config
    from roma_ray.engine.progress import Silence
    from roma_ray.engine.setup import resolve
    from roma_ray.runs.pipeline import run

    started = time.monotonic()
    stages = run(resolve(load_config(None, overrides)), Silence(), until=until).stages
    seconds = time.monotonic() - started
    manifests = {name: stage.manifest() for name, stage in stages.items()}
    return {
        "resident": status("VmHWM") / 1e9,
        "own": peaks.own / 1e9,
        "seconds": seconds,
        "cpu": time.process_time(),
        "stages": {name: manifest["seconds"] for name, manifest in manifests.items()},
        "self_check": manifests["extract"]["facts"]["self_check"],
    }


if __name__ == "__main__":
    print(_MARK + json.dumps(run_stage(sys.argv[1], sys.argv[2:])))
