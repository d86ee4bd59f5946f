"""No path needs kernels of CUDA, or of some GPUs: without any of them every kind of layer still passes the check on load."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from roma_ray.moe.packing import Segment, pack
from roma_ray.moe.passes import run_packed
from roma_ray.moe.slices import load_slice
from tests.hiding import KERNELS, ROOT, run_without
from tests.tiny import save_tiny, tiny_moe

# Attention alone, with sinks, and every recurrent layer there is: each has kernels of its own in transformers.
KINDS = ("olmoe", "gpt_oss", "qwen3_next", "granitemoehybrid", "lfm2_moe", "nemotron_h")

CHECK = """
import importlib.util, sys, tempfile, torch
from roma_ray.moe.selfcheck import check_slice
from roma_ray.moe.slices import load_slice
from tests.tiny import save_tiny, tiny_moe
found = [name for name in {hidden!r} if importlib.util.find_spec(name)]
assert not found, found
for family in {kinds!r}:
    with tempfile.TemporaryDirectory() as folder:
        path = save_tiny(tiny_moe(family, seed=1), folder)
        checks = [
            check_slice(load_slice(path, dtype=torch.float32, with_lm_head=True, experts_backend=backend))
            for backend in ("eager", "grouped_mm")
        ]
    assert all(checks), family
print("checked", *{kinds!r})
"""


def test_every_kind_of_layer_passes_its_check_without_kernels(tmp_path: Path):
    script = CHECK.format(hidden=KERNELS, kinds=KINDS)
    done = run_without(KERNELS, tmp_path / "site", "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["checked", *KINDS]


def test_nothing_here_imports_a_kernel():
    for file in (ROOT / "roma_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.partition(".")[0] in KERNELS], file


def test_grouped_experts_fall_back_where_torch_has_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save_tiny(tiny_moe("olmoe"), tmp_path)
    packing = pack([Segment((1, 2, 3)), Segment((4, 5), 0), Segment((6,), 0)])
    eager, grouped = (
        load_slice(path, dtype=torch.float32, with_lm_head=True, experts_backend=name)
        for name in ("eager", "grouped_mm")
    )
    called = []
    monkeypatch.delattr(torch, "_grouped_mm", raising=False)
    monkeypatch.delattr(torch.nn.functional, "grouped_mm", raising=False)
    fallback = torch.ops.transformers.grouped_mm_fallback
    monkeypatch.setattr(
        torch.ops.transformers,
        "grouped_mm_fallback",
        lambda *given, **named: called.append(1) or fallback(*given, **named),
    )
    with torch.no_grad():
        torch.testing.assert_close(run_packed(grouped, packing).states, run_packed(eager, packing).states)
    assert called, "transformers' own loop ran in place of the kernel"
