"""What jobs/judge_planted_worlds.py prints, figure by figure, and what it makes of methods that fail."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs"))

import judge_planted_worlds as judging

from roma_ray.evaluation.statistics import pair
from roma_ray.runs.control import Arm

BASE = np.array([True] * 50 + [False] * 50)


def answered(lost: int, won: int) -> np.ndarray:
    """Verdicts that differ from the base's in so many questions."""
    return np.array([False] * lost + [True] * (50 - lost) + [True] * won + [False] * (50 - won))


def arm(name: str, lost: int = 0, won: int = 0, trained: bool = True) -> Arm:
    right = answered(lost, won)
    return Arm(name, pair(BASE, right) if trained else None, right)


@pytest.fixture
def rooms(tmp_path: Path) -> dict[int, Path]:
    found = {}
    for seed in (2, 3):
        found[seed] = tmp_path / str(seed)
        found[seed].mkdir()
        room = {"room": 10.0 + seed, "standard_error": 1.25}
        (found[seed] / "room.json").write_text(json.dumps({"test": {"domain expert at the last token": room}}))
    return found


def test_the_table_of_arms(rooms: dict[int, Path]) -> None:
    judged: dict[int, Any] = {
        2: (BASE, {"RoMA": arm("RoMA", 2, 12), "lambda = 0": arm("lambda = 0", trained=False)}),
        3: (BASE, {"RoMA": arm("RoMA", 0, 20), "lambda = 0": arm("lambda = 0", 1, 1)}),
    }
    errors = [pair(BASE, answered(*n)).difference_stderr for n in ((2, 12), (0, 20), (1, 1))]
    mean = 100 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2
    assert judging.table(judged, rooms) == [
        "| trained by | seed 2 | seed 3 | mean | error over seeds |",
        "| --- | --- | --- | --- | --- |",
        "| *base, %* | 50.0 | 50.0 | 50.0 |  |",
        "| *room at the last token* | +12.0 ± 1.2 | +13.0 ± 1.2 | +12.5 |  |",
        # Gains of 10 and 20 points: the standard deviation is 7.07, over the root of 2.
        f"| RoMA | +10.0 ± {100 * errors[0]:.1f} | +20.0 ± {100 * errors[1]:.1f} | +15.0 ± {mean:.1f} | 5.0 |",
        f"| lambda = 0 | not trained | +0.0 ± {100 * errors[2]:.1f} |  |  |",
    ]


def test_the_table_of_methods(rooms: dict[int, Path]) -> None:
    """p over both worlds' questions, times the number of methods that see no label for the smallest (Holm)."""
    names = {"roma": (2, 12), "icl": (1, 1), "oracle": (0, 30)}
    arms = {name: arm(name, *n) for name, n in names.items()}
    untrained = {**arms, "router_tuning": arm("router_tuning", trained=False)}
    compared = {
        2: judging.Compared((BASE, untrained), {"roma": 0.001}, (0.04, 0.02)),
        3: judging.Compared((BASE, untrained), {"roma": 0.05}, (0.06, 0.02)),
    }
    lines = judging.methods_table(compared, rooms)
    cells = {line.split(" | ")[0][2:]: [c.strip(" |") for c in line.split(" | ")[1:]] for line in lines}
    assert cells["trained by"] == ["seed 2", "seed 3", "mean", "error over seeds", "p (Holm)", "learning rates"]
    assert {len(row) for row in cells.values()} == {6}
    # 4 of 28 lost: 2 x (sum of C(28, 0..4)) / 2^28, times 3 methods.
    p = 3 * 2 * (1 + 28 + 378 + 3276 + 20475) / 2**28
    assert cells["roma"][2:] == [cells["roma"][2], "0.0", f"{p:.3g}", "0.001, 0.05"]
    assert cells["icl"][4:] == ["1", ""]
    assert cells["router_tuning"] == ["not trained", "not trained", "", "", "1", ""]
    # It sees labels: it is no member of the tests' family.
    assert cells["oracle"][4:] == ["", ""]
    assert cells["*oracle beyond its control*"] == ["+4.0 ± 2.0", "+6.0 ± 2.0", "+5.0 ± 1.4", "1.0", "", ""]


@dataclass
class Found:
    """What `compare` gives, as far as it is read."""

    failures: dict[str, str]
    methods: dict[str, list[Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)


def test_a_method_that_would_follow_noise_is_not_trained_and_any_other_failure_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verdicts = {"base": BASE, "roma": answered(2, 12)}
    kinds = {"router_tuning": "UnmovedError"}
    rows = [{"name": "base", "learning_rate": None}, {"name": "roma", "learning_rate": 0.01}, {"name": "router_tuning"}]
    found = Found({"router_tuning": "UnmovedError: noise"}, summary={"methods": rows, "oracle": None})
    found.methods = {name: [name] for name in (*verdicts, *kinds)}
    monkeypatch.setattr(judging, "resolve", lambda config: config)
    monkeypatch.setattr(judging, "compare", lambda *_: found)
    monkeypatch.setattr(judging, "_right", verdicts.get)
    monkeypatch.setattr(judging, "read_failure", lambda name: {"kind": kinds[name], "text": "noise"})
    compared = judging.compare_all(None, judging.Silence())  # type: ignore[arg-type]
    base, arms = compared.judged
    assert np.array_equal(base, BASE)
    assert list(arms) == ["router_tuning", "roma"]
    assert arms["router_tuning"].paired is None
    assert arms["roma"].paired == pair(BASE, verdicts["roma"])
    assert compared.rates == {"roma": 0.01}
    kinds["router_tuning"] = "CacheError"
    with pytest.raises(SystemExit, match="router_tuning failed"):
        judging.compare_all(None, judging.Silence())  # type: ignore[arg-type]
