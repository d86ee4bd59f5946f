"""The Python interface: its signatures, what importing it costs, and a run from ten lines."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import roma_ray
from tests.world import make_world

SIGNATURES = {
    "load_config": "(path: 'str | Path | None' = None, overrides: 'Sequence[str]' = ()) -> 'Config'",
    "run": "(config: 'Config', *, ray: 'bool' = False, address: 'str | None' = None, until: 'str' = 'report', "
    "quiet: 'bool' = False, track: 'bool | None' = None) -> 'Finished'",
    "routing_rows": "(model: 'PreTrainedModel', tokenizer: 'Any', texts: 'Sequence[str]', *, tokens: 'str' = 'Last1', "
    "layers: 'Sequence[int] | None' = None, batch_size: 'int' = 8) -> 'Tensor'",
    "manifold_loss": "(routing_BLE: torch.Tensor, targets: roma_ray.manifold.losses.NeighborTargets) -> torch.Tensor",
    "neighbor_targets": "(neighborhoods: roma_ray.manifold.neighbors.Neighborhoods, routing_NLE: torch.Tensor, "
    "zeros: collections.abc.Callable[..., torch.Tensor] | None = None) -> roma_ray.manifold.losses.NeighborTargets",
    "successful_set": "(correct_N: torch.Tensor, training_N: torch.Tensor) -> torch.Tensor",
    "manifold_trainer": "(term: 'ManifoldTerm') -> 'type[Trainer]'",
    "train_only_routers": "(model: 'PreTrainedModel', layers: 'Sequence[int] | None' = None) -> 'list[nn.Parameter]'",
    "ManifoldTerm": "(model: 'PreTrainedModel', targets: 'NeighborTargets', *, weight: 'float', "
    "layers: 'Sequence[int] | None' = None, tokens: 'str' = 'Last1', distance: 'DistanceName' = 'squared') -> 'None'",
}


def test_signatures_are_promises() -> None:
    assert {name: str(inspect.signature(getattr(roma_ray, name))) for name in SIGNATURES} == SIGNATURES
    assert set(SIGNATURES) | {"Config", "Finished", "find_neighbors"} == set(roma_ray.__all__)
    assert all(hasattr(roma_ray, name) for name in roma_ray.__all__)


def test_importing_it_loads_nothing() -> None:
    code = "import sys; before = set(sys.modules); import roma_ray; print(*sorted(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name.partition(".")[0] for name in found.stdout.split()} - sys.stdlib_module_names == {"roma_ray"}


def test_ten_lines_of_a_notebook(tmp_path: Path) -> None:
    finished = roma_ray.run(make_world(tmp_path), quiet=True)
    table = finished.results()
    assert list(table.index)[-1] == "all" or "all" in table.index
    assert table.loc["all", "n"] == len(finished.answers())
    assert table.loc["all", "tuned_accuracy"] == finished.summary["splits"]["test"]["all"]["tuned_accuracy"]
    assert finished.report.is_file()
    assert (finished.adapter / "adapter_model.safetensors").is_file()
    assert finished.figures
    assert all(path.is_file() for path in finished.figures.values())
