"""What newcomers read first runs, and the documentation's pictures are what their script draws."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]


def test_the_method_in_one_sitting(capsys: pytest.CaptureFixture[str]) -> None:
    path = REPOSITORY / "examples" / "method.py"
    assert len(path.read_text().splitlines()) <= 150
    threads = torch.get_num_threads()
    try:
        names = runpy.run_path(str(path))
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "in S; tuning layers" in printed
    assert "test accuracy on" in printed
    hoods, training, successful = names["neighborhoods"], names["training"], names["successful"]
    assert bool(successful[hoods.indices].all())
    assert torch.equal(hoods.queried, training)
    # Of all weights the gates alone have moved, and the pull shows: the term is smaller in the second epoch.
    gates = names["masters"].state()
    whole = dict(names["model"].model.named_parameters())
    for name, tensor in gates.items():
        layer = name.split(".")[1]
        assert not torch.equal(tensor, whole[f"model.layers.{layer}.mlp.gate.weight"])
    first = names["layers"][0]
    for name, tensor in names["head"].model.named_parameters():
        if name.startswith("model.layers."):
            index, rest = name.removeprefix("model.layers.").split(".", 1)
            assert torch.equal(tensor, whole[f"model.layers.{int(index) + first}.{rest}"])
    pulls = [float(value) for value in re.findall(r"manifold ([0-9.]+)", printed)]
    assert len(pulls) == 2
    assert pulls[1] < pulls[0]


def numbers(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"-?[0-9]+\.?[0-9]*", text)]


def test_pictures_are_what_the_script_draws(tmp_path: Path) -> None:
    draw = runpy.run_path(str(REPOSITORY / "docs" / "draw.py"))["draw"]
    draw(tmp_path)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in (REPOSITORY / "docs" / "pictures").iterdir()}
    assert drawn.keys() == kept.keys()
    for name in drawn:
        assert re.sub(r"[0-9.]+", "", drawn[name]) == re.sub(r"[0-9.]+", "", kept[name])
        # Another processor may round the last digit of what is computed otherwise.
        assert numbers(drawn[name]) == pytest.approx(numbers(kept[name]), abs=0.3)
