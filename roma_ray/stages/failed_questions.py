"""Questions that fail in extraction: how many are tolerated, and what is said when there are more.

A model that drops most questions gives no result: what is left is not the suite that was asked for.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from roma_ray.engine.batches import read_plan
from roma_ray.engine.extractor import NOT_FINITE, PLAN, batch_table
from roma_ray.engine.forward import lay_out
from roma_ray.engine.question_table import TABLE, read_some_prompts
from roma_ray.engine.setup import Setup
from roma_ray.engine.streaming import plan_chain
from roma_ray.engine.work import Executor, Job, Report
from roma_ray.errors import ModelError, RomaError
from roma_ray.moe.finite import begins, watching
from roma_ray.moe.packing import Packing
from roma_ray.moe.passes import run_packed
from roma_ray.store.artifacts import Stage, write_json
from roma_ray.store.files import present, read_json, remove
from roma_ray.store.tables import read_tables

ORIGIN = ".not-finite.json"
_SHOWN = 3


def failed_rows(stage: Stage, batches: Iterable[int]) -> dict[int, str]:
    """Row and reason of every question that failed in these finished batches. Raises ArtifactError."""
    found: dict[int, str] = {}
    for table in read_tables([batch_table(stage.path, batch) for batch in batches], ["row", "error"]):
        rows = zip(table.column("row").to_pylist(), table.column("error").to_pylist(), strict=True)
        found.update((row, error) for row, error in rows if error is not None)
    return found


def too_many(setup: Setup, failed: int, questions: int) -> bool:
    """Whether more than the tolerated share of all questions failed."""
    return failed > setup.config.extraction.max_failed * questions


def refuse(job: Job, execute: Executor) -> ModelError:
    """The error for an extraction in which too many questions failed: how many, why, and where it begins."""
    setup, stage = job.setup, job.stage
    if stage.complete:
        facts = stage.manifest()["facts"]
        done, seen, total = list(range(facts["batches"])), facts["rows"], facts["rows"]
    else:
        plan = read_plan(stage.path / PLAN)[1]
        done = [n for n, there in enumerate(present([batch_table(stage.path, n) for n in range(len(plan))])) if there]
        seen, total = sum(len(plan[n]) for n in done), len(plan.rows)
    failed = failed_rows(stage, done)
    reasons = Counter(failed.values()).most_common()
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons[:_SHOWN])
    more = f"; and {len(reasons) - _SHOWN} other reasons" if len(reasons) > _SHOWN else ""
    # The same question on every run, whatever order the batches ran in.
    first = min((row for row, reason in failed.items() if reason == NOT_FINITE), default=None)
    origin = "" if first is None else f" {_origin(job, first, execute)}."
    so_far = f" so far (of {total:,} in all)" if seen < total else ""
    return ModelError(
        f"{len(failed):,} of {seen:,} questions failed in extraction{so_far}, more than the "
        f"{setup.config.extraction.max_failed:.1%} that extraction.max_failed tolerates: {listed}{more}.{origin} What was done is "
        f"kept in {stage.path}; remove it to try again."
    )


def _origin(job: Job, row: int, execute: Executor) -> str:
    """Where one question's values first stop being finite, in a sentence without its stop."""
    stage = job.stage
    work = OriginWork(job.setup, job.stages, stage, row)
    remove(stage.path / ORIGIN)
    try:
        for _ in execute(work, [0]):
            pass
    except RomaError as error:
        return f"Where values first stop being finite could not be found out: {error}"
    found: str | None = read_json(stage.path / ORIGIN)["origin"]
    remove(stage.path / ORIGIN)
    return f"Of the first of them, {begins(found)}"


@dataclass(frozen=True)
class OriginWork(Job):
    """One question alone through the model, a layer at a time: no more than one layer's weights are held."""

    row: int

    def open(self) -> Callable[[int], Report]:
        """Nothing is held; returns the function that writes what it finds into the stage's folder."""
        return self._find

    @torch.inference_mode()
    def _find(self, batch: int) -> Report:
        started = time.monotonic()
        packing = lay_out(read_some_prompts(self.stages["questions"].path / TABLE, [self.row])).packing
        # With a limit that holds nothing every layer is a slice of its own.
        chain = plan_chain(self.setup.model, 0.0, least=True)
        states, origin = None, None
        for start, stop in chain:
            states, origin = self._layer(start, None if stop == chain[-1][1] else stop, packing, states)
            if origin is not None:
                break
        write_json(Path(self.folder) / ORIGIN, {"origin": origin})
        return Report(batch, 1, len(packing), 0, time.monotonic() - started)

    def _layer(
        self, start: int, stop: int | None, packing: Packing, states_TD: torch.Tensor | None
    ) -> tuple[torch.Tensor, str | None]:
        part = self.setup.model.load(start, stop, with_lm_head=stop is None)
        with watching(part.model, start) as seen:
            states_TD = run_packed(part, packing, states_TD).states
        return states_TD, seen.origin
