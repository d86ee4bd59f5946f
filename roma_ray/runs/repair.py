"""`roma-ray repair`: a student's routers retrained against its teacher on plain texts, and what that did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roma_ray.engine.progress import Progress
from roma_ray.engine.runners import LOCAL, Runners
from roma_ray.engine.setup import Setup
from roma_ray.engine.steps import complete, locate
from roma_ray.moe.adapters import read_adapter
from roma_ray.moe.merged import save_merged
from roma_ray.runs.pipeline import run
from roma_ray.stages.finetuning import ADAPTER
from roma_ray.stages.repairing import SUMMARY, repair_step
from roma_ray.store.artifacts import Stage
from roma_ray.store.files import read_json

HEADER = ("", "perplexity", "nats a token", "next token as teacher's %", "KL from teacher")


@dataclass(frozen=True)
class Repair:
    """A finished repair."""

    stages: Mapping[str, Stage]
    found: dict[str, Any]

    @property
    def adapter(self) -> Path:
        """The retrained routers."""
        return self.stages["finetune"].path / ADAPTER

    def rows(self) -> list[tuple[str, ...]]:
        """Teacher, student before and after, under `HEADER`."""
        rows: list[tuple[str, ...]] = []
        for name in ("teacher", "before", "after"):
            one = self.found[name]
            beside = ("", "") if name == "teacher" else (f"{100 * one['agreement']:.2f}", f"{one['divergence']:.4f}")
            rows.append((name, f"{one['perplexity']:.4g}", f"{one['nll']:.4f}", *beside))
        return rows

    def words(self) -> list[str]:
        """What the repair did, a sentence a figure."""
        change, before = self.found["change"], self.found["before"]
        lost = before["nll"] - self.found["teacher"]["nll"]
        told = (
            f"on {self.found['texts']:,} test texts of {self.found['tokens']:,} tokens: nats a token "
            f"{_signed(change['nll'])}, agreement {_signed(change['agreement'], 100, 2)} points, KL {_signed(change['divergence'])}"
        )
        back = -change["nll"]["difference"]
        share = f"{100 * back / lost:.1f} %" if back > 0 else "nothing"
        closed = f"; of what the student had lost to its teacher, {share} came back" if lost > 0 else ""
        return [told + closed, *_answer_words(self.found["answers"])]


def _signed(one: Mapping[str, float], scale: float = 1, digits: int = 4) -> str:
    return f"{scale * one['difference']:+.{digits}f} ± {scale * one['stderr']:.{digits}f}"


def _answer_words(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    right, same = found["accuracy"], found["agreement"]
    return [
        f"{found['questions']:,} questions: right answers {100 * right['base']:.2f} % before, {100 * right['tuned']:.2f} % after "
        f"(teacher {100 * found['teacher_accuracy']:.2f} %); the teacher's own answer {100 * same['base']:.2f} % before, "
        f"{100 * same['tuned']:.2f} % after, difference {100 * same['difference']:+.2f} ± {100 * same['difference_stderr']:.2f} points"
    ]


def repair(
    setup: Setup, progress: Progress, runners: Runners = LOCAL, *, asked: Setup | None = None, merged: str | None = None
) -> Repair:
    """Distil the teacher into the student's routers, measure what that did, and write the merged model where one is wanted.

    Raises what the stages raise (RomaError).
    """
    stages = dict(run(setup, progress, runners, until="finetune", states=True).stages)
    step = repair_step(asked)
    planned = locate(step, setup, stages)
    complete(step, step.job(setup, planned), runners, progress)
    stages["repair"] = planned["repair"]
    found: dict[str, Any] = read_json(planned["repair"].path / SUMMARY)
    if merged is not None:
        save_merged(read_adapter(stages["finetune"].path / ADAPTER), merged)
    return Repair(stages, found)
