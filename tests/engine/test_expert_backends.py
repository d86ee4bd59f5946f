"""The experts backend: measured once a model and storage, then kept; and the cache's sample check."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from roma_ray.engine.expert_backends import CANDIDATES, backend_file, kept_backend, measure_backends
from roma_ray.engine.model_spec import ModelSpec
from roma_ray.engine.setup import resolve
from roma_ray.engine.verification import verify_sample
from roma_ray.errors import CacheError
from roma_ray.runs.pipeline import Run


def test_a_measurement_names_the_fastest_candidate(letter_run: Run) -> None:
    found = measure_backends(letter_run.setup.model)
    assert set(found["milliseconds"]) == set(CANDIDATES)
    assert found["milliseconds"][found["backend"]] == min(found["milliseconds"].values())


def test_a_gpu_run_measures_once_and_keeps_the_answer(letter_run: Run, tmp_path: Path) -> None:
    config = letter_run.setup.config.model_copy(update={"storage": str(tmp_path), "device": "auto"})
    asked: list[ModelSpec] = []

    def measure(spec: ModelSpec) -> dict[str, Any]:
        asked.append(spec)
        return {"backend": "grouped_mm", "milliseconds": {"grouped_mm": 1.0, "eager": 2.0}}

    first = resolve(config, device="cuda", measure=measure)
    assert first.model.experts_backend == "grouped_mm"
    assert resolve(config, device="cuda", measure=measure).model == first.model
    assert len(asked) == 1
    assert resolve(config, device="cpu").model.experts_backend == "eager"
    path = backend_file(first.store, first.model_identity, first.model.dtype)
    path.write_text("{damaged")
    assert kept_backend(first.store, first.model_identity, first.model, measure) == "grouped_mm"
    assert len(asked) == 2


def test_a_cache_of_other_states_is_refused_before_training(letter_run: Run, tmp_path: Path) -> None:
    run = letter_run
    folder = Path(shutil.copytree(run.stages["extract"].path, tmp_path / "copy"))
    for mark in folder.glob(".verified-*"):
        mark.unlink()
    arguments = (run.setup.model, folder, run.stages["questions"].path / "questions.parquet", run.setup.cut)
    verify_sample(*arguments)
    assert (folder / f".verified-{run.setup.cut}").exists()
    verify_sample(*arguments)
    (folder / f".verified-{run.setup.cut}").unlink()
    for shard in (folder / "batches").glob("*.safetensors"):
        hidden = load_file(shard)["hidden"]
        save_file({"hidden": hidden.roll(1, 0).contiguous()}, shard)
    with pytest.raises(CacheError, match="are not those of"):
        verify_sample(*arguments)
