"""Identities as text: a storage that an earlier version filled is found complete by this one.

`identities.json` was written by the code at hand when it was last meant to change: `python -m tests.test_identities` prints
it anew. A stage that moves here without a change of what it computes throws users' finished work away.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from roma_ray.ablations.plan import make_plan
from roma_ray.ablations.space import load_space
from roma_ray.ablations.sweep import sweep_stage
from roma_ray.baselines.method_registry import METHODS
from roma_ray.baselines.method_runs import method_stage
from roma_ray.benchmarks.judge import Wanted, judge
from roma_ray.benchmarks.judged_model import resolve_subject
from roma_ray.benchmarks.requests import PLAN, SCORED, batch_file
from roma_ray.config.loading import load_config
from roma_ray.config.schema import Config
from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import write_table
from roma_ray.engine.setup import Setup, resolve
from roma_ray.engine.work import Report, Work
from roma_ray.runs.method_comparison import comparison_stage
from roma_ray.runs.pipeline import locate
from roma_ray.stages.base_scores import base_stage
from roma_ray.store.artifacts import Stage, Store, run_identity

TEXT = Path(__file__).with_name("identities.json")

SPACE = """
name: two seeds of two layer choices
grid:
  routing.layers: [L5, All]
  finetune.epochs: [1]
seeds: [0, 1]
"""


def config_in(storage: Path) -> Config:
    """The embedded default where nothing of the machine decides: neither its device nor its number of cores."""
    return load_config(None, [f"storage={storage}", "device=cpu", "threads=1"])


def told(stage: Stage) -> dict[str, Any]:
    """A stage's place and what it stands for, as plain JSON."""
    found: dict[str, Any] = json.loads(json.dumps({"fingerprint": stage.fingerprint, **stage.identity}))
    return found


def default_run(setup: Setup) -> dict[str, Any]:
    stages = locate(setup)
    base = base_stage(setup, stages["extract"])
    found: dict[str, Any] = {stage.name: told(stage) for stage in [*stages.values(), base]}
    return {**found, "run": run_identity(stages)}


def sweep(storage: Path) -> dict[str, Any]:
    file = storage / "space.yaml"
    file.write_text(SPACE)
    plan = make_plan(load_space(str(file), ["device=cpu", "threads=1"], str(storage)))
    trials = {
        planned.trial.name: {name: stage.fingerprint for name, stage in planned.stages.items()}
        for planned in plan.trials
    }
    return {"sweep": told(sweep_stage(plan)), "trials": trials}


def baselines(setup: Setup) -> dict[str, Any]:
    stages = locate(setup)
    methods = {name: [method_stage(setup, stages, name, seed) for seed in (0, 1)] for name in METHODS}
    found: dict[str, Any] = {
        f"{name} {seed}": told(stage) for name in methods for seed, stage in enumerate(methods[name])
    }
    return {**found, "comparison": told(comparison_stage(setup, methods))}


def made_up(work: Work, batches: Sequence[int]) -> Iterator[Report]:
    """In place of a model: an identity is made of what is asked, never of what is answered."""
    plan = json.loads((Path(work.folder) / PLAN).read_text())
    for batch in batches:
        rows = plan[batch]
        columns: dict[str, Any] = {"request": rows}
        for name, share in (("base", 1.0), ("tuned", 0.5)):
            columns |= {name: [-share * (1 + row) for row in rows], f"{name}_greedy": [False] * len(rows)}
        facts = {"seconds": {}, "tokens": 0, "flops": {}}
        write_table(batch_file(work.folder, batch), columns, SCORED, facts)
        yield Report(batch, len(rows), 0, 0, 0.0)


def benchmarks(config: Config, storage: Path) -> dict[str, Any]:
    rows = [
        {
            "id": f"b{n}",
            "task": "sums",
            "question": f"What is {n} and {n + 1}?",
            "choices": [str(n), str(2 * n + 1)],
            "answer": 1,
        }
        for n in range(5)
    ]
    file = storage / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    subject = replace(
        resolve_subject(config, adapter=None),
        adapter="nowhere",
        adapter_identity="of no adapter",
        layers=(4,),
        keep_states=True,
    )
    store = Store(storage)
    training = [("Which one?", ["this", "that"])]
    made = judge(config, subject, Wanted((str(file),), limit=4), store, made_up, Silence(), training)
    asked = [
        Stage(path, "requests", json.loads((path / ".identity.json").read_text()))
        for path in sorted((store.root / "requests").iterdir())
    ]
    states = [path.name for path in sorted((store.root / "states").iterdir())]
    return {"benchmarks": told(made), "requests": [told(stage) for stage in asked], "states": states}


def identities(storage: Path) -> dict[str, Any]:
    setup = resolve(config_in(storage), device="cpu")
    return {
        "default": default_run(setup),
        "sweep": sweep(storage),
        "baselines": baselines(setup),
        "benchmarks": benchmarks(setup.config, storage),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return identities(tmp_path_factory.mktemp("identities"))


@pytest.mark.parametrize("part", ["default", "sweep", "baselines", "benchmarks"])
def test_no_stage_has_moved(found: dict[str, Any], part: str) -> None:
    assert found[part] == json.loads(TEXT.read_text(encoding="utf-8"))[part]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(identities(Path(folder)), indent=1))
