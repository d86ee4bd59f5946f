"""Processes in which some packages are as if they were not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]

HEAVY = ("ray", "mlflow", "faiss")
"""What a run on one machine can do without."""

KERNELS = (
    *("flash_attn", "flash_attn_3", "triton", "kernels", "causal_conv1d", "mamba_ssm", "fla", "xformers", "deep_gemm"),
    *("liger_kernel", "bitsandbytes", "apex", "cutlass", "sonicmoe"),
)
"""Kernels of CUDA, or of some GPUs alone, that transformers takes where they are installed."""

# The path finder is what finds installed packages: one that it does not find is not there, for `find_spec` as for `import`.
_BLOCKER = """
import importlib.machinery as machinery
hidden, found = frozenset({names!r}), machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else found(name, path, target)
machinery.PathFinder.find_spec = staticmethod(find_spec)
"""


def run_without(names: Sequence[str], folder: Path, *command: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python with these packages hidden; `path` is searched for modules before anything else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_BLOCKER.format(names=tuple(names)))
    places = os.pathsep.join(filter(None, (path, str(folder), str(ROOT))))
    environment = {**os.environ, "PYTHONPATH": places, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
