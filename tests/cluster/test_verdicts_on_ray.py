"""A verdict from end to end on Ray: settings chosen on validation, all seeds, one page; a second run trains nothing."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import yaml

from roma_ray.ablations.arms import BASE, load_arms
from roma_ray.ablations.sweep import DONE
from roma_ray.ablations.verdict import run_at
from roma_ray.ablations.verdict_page import write_page
from roma_ray.cluster.ray_cluster import Cluster
from roma_ray.cluster.ray_runners import Place, ray_runners
from roma_ray.config.schema import Config
from roma_ray.engine.progress import Silence
from roma_ray.engine.work import serial
from roma_ray.evaluation.results_file import read_judged
from roma_ray.store.artifacts import MANIFEST, Store
from roma_ray.store.contents import Storage
from tests.cluster.test_sweeps_on_ray import alone

ARMS = {
    "task loss alone": {"set": {"finetune.regularizer.kind": "none"}},
    "RoMA": {},
    # A pull to the start alone has nothing to follow: told, and no obstacle for the others.
    "no such pull": {"set": {"neighbors.method": "self", "finetune.regularizer.weight": "auto"}},
}


def test_a_verdict(world: Config, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = world.model_copy(update={"storage": str(tmp_path / "storage")}).model_dump(mode="json")
    file = tmp_path / "arms.yaml"
    content = {
        "base": base,
        "arms": ARMS,
        "grid": {"finetune.learning_rate": [0.01, 0.05]},
        "seeds": [3, 4],
        "margin": 5,
    }
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    arms = load_arms(file, ["tracking.enabled=false"])
    mine = alone(cluster)
    place = Place(ray_runners(mine, "cpu"), serial, "cpu", lambda spec: {}, mine)
    found, sweeps = run_at(place, arms, Silence())

    assert set(found.arms) == {"task loss alone", "RoMA"}
    assert "no such pull" in found.missing
    for name, arm in found.arms.items():
        tried = {s.trial.id: s for s in sweeps[0].having(DONE)}
        accuracies = {t.config.finetune.learning_rate: tried[t.id].validation_accuracy for t in arms.trials_of(name)}
        assert accuracies[arm.settings["finetune.learning_rate"]] == max(accuracies.values())
        assert [f.trial.seed for f in arm.trials] == [3, 4]
    # One question's value is its mean over the seeds; the difference is paired.
    one = found.found["acc"]["task loss alone", "RoMA"].paired
    means = {
        name: np.mean([read_judged(s.planned.stages["evaluate"].path).values("tuned")["acc"] for s in states], axis=0)
        for name in ("task loss alone", "RoMA")
        for states in [
            [s for s in sweeps[1].states.values() if s.trial.id in {f.trial.id for f in found.arms[name].trials}]
        ]
    }
    assert one.difference == pytest.approx((means["RoMA"] - means["task loss alone"]).mean())
    # The grid's settings that were not chosen were looked at too, and count.
    assert found.others == 2
    assert len(found.found["acc"]) == 3
    assert found.found["acc"][BASE, "RoMA"].tests == 3 + 2

    page = write_page(found, "arms", sweeps)
    text = (page.path / "report.html").read_text()
    assert "no such pull could not be trained" in text
    rows = list(csv.DictReader((page.path / "tables" / "statements.csv").open()))
    assert len(rows) == 3 * len(found.found)
    (listed,) = [item for item in Storage(Store(str(tmp_path / "storage"))).runs() if item.kind == "verdict"]
    assert listed.id == page.fingerprint

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "storage").glob(f"*/*/{MANIFEST}")}
    again, more = run_at(place, load_arms(file, ["tracking.enabled=false"]), Silence())
    assert write_page(again, "arms", more).path == page.path
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "storage").glob(f"*/*/{MANIFEST}")} == before
