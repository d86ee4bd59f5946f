"""Figure 3's fourth panel: it joins the report when the oracle was run, and never without the control's figures."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from roma_ray.baselines.method_runs import run_methods
from roma_ray.engine.progress import Silence
from roma_ray.engine.work import serial
from roma_ray.figures.run_report import task_maps
from roma_ray.runs.pipeline import Run, locate, oracle_answers, revisit
from roma_ray.store.artifacts import Store


def test_the_oracle_joins_the_report_with_its_control(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.setup.store.root, tmp_path / "storage")
    setup = dataclasses.replace(finished.setup, store=Store(str(tmp_path / "storage")))
    planned = locate(setup)
    assert planned["report"].complete
    run_methods(setup, planned, ("base", "oracle"), 1, serial, Silence())
    # The oracle alone changes nothing.
    assert locate(setup)["report"].path == planned["report"].path
    run_methods(setup, planned, ("oracle_control",), 1, serial, Silence())
    oracle = oracle_answers(setup, planned)
    assert locate(setup)["report"].path != planned["report"].path

    found = finished.summary["diagnostics"]
    titles = [axis.get_title() for axis in task_maps(setup, planned, found, oracle).axes]
    assert [title.partition("\n")[0] for title in titles] == [
        "task embedding",
        "routing, base",
        "routing, tuned",
        "routing, oracle",
    ]
    assert len(task_maps(setup, planned, found, {}).axes) == 3
    again = revisit(setup, Silence())
    for name in ("report.md", "report.html"):
        text = (again.stages["report"].path / name).read_text()
        assert "its control, optimized in the same way towards a random wrong choice" in text
        assert "Difference:" in text
        assert "its control" not in (planned["report"].path / name).read_text()
