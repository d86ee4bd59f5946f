"""What a notebook or a script does with roma-ray: load a configuration, run it, take what it made.

import roma_ray

config = roma_ray.load_config("configs/olmoe.yaml", ["finetune.epochs=1"])    # without a path: the embedded default
finished = roma_ray.run(config)                # in this process; run(config, ray=True) on a cluster, or one of its own
finished.results()                             # paired figures, a pandas table: a row a task and one for all
finished.answers()                             # every test question's scores before and after, an Arrow table
finished.report, finished.figures, finished.adapter
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roma_ray.config.schema import Config
from roma_ray.store.files import listed

if TYPE_CHECKING:
    import pandas
    import pyarrow

    from roma_ray.runs.pipeline import Run


@dataclass(frozen=True)
class Finished:
    """A finished run and what it made. Everything lies in the storage; nothing is computed here."""

    stages: dict[str, Path]
    """The folder of each stage, by name in their order."""
    summary: dict[str, Any]
    """The documented summary (`roma_ray/stages/run_summary.py`); empty when the run ended before its evaluation."""

    def results(self, split: str = "test") -> pandas.DataFrame:
        """Paired figures of base and tuned routers, a row a task and `all` for all of them; with held-out tasks also a row a group.

        Raises KeyError.
        """
        import pandas

        groups = (self.summary["held_out"] or {"groups": {}})["groups"]
        rows = {**self.summary["splits"][split], **{name: one["accuracy"] for name, one in groups.items()}}
        return pandas.DataFrame.from_dict(rows, orient="index")

    def answers(self) -> pyarrow.Table:
        """Every judged question with its scores and verdicts before and after. Raises ArtifactError, KeyError."""
        from roma_ray.engine.question_table import read_table
        from roma_ray.evaluation.results_file import RESULTS

        return read_table(self.stages["evaluate"] / RESULTS)

    @property
    def adapter(self) -> Path:
        """The tuned routers as a PEFT adapter. Raises KeyError."""
        from roma_ray.stages.finetuning import ADAPTER

        return self.stages["finetune"] / ADAPTER

    @property
    def report(self) -> Path:
        """The report as one page. Raises KeyError."""
        from roma_ray.figures.run_report import PAGE

        return self.stages["report"] / PAGE

    @property
    def figures(self) -> dict[str, Path]:
        """The report's figures by name. Raises KeyError."""
        from roma_ray.figures.run_report import FIGURES

        return {path.stem: path for path in listed(self.stages["report"] / FIGURES, "*.svg")}


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """A configuration from a YAML file (the embedded default without one), with overrides as `--set` takes them.

    Raises ConfigError.
    """
    from roma_ray.config.loading import load_config as load

    return load(None if path is None else str(path), overrides)


def run(
    config: Config,
    *,
    ray: bool = False,
    address: str | None = None,
    until: str = "report",
    quiet: bool = False,
    track: bool | None = None,
) -> Finished:
    """Run a configuration up to the stage `until`, skipping what is complete, and record it in MLflow where `track` says so.

    In this process, or with `ray` (or an `address`) as `roma-ray run` does. `track` is by default `tracking.enabled` on Ray
    and off in this process, as in the commands. Raises what the stages raise (RomaError).
    """
    on_ray = ray or address is not None
    place = (address or config.ray.address) if on_ray else "local"
    kept = track if track is not None else on_ray and config.tracking.enabled
    finished = run_pipeline(config, place, until, quiet=quiet, track=kept)
    return Finished({name: stage.path for name, stage in finished.stages.items()}, finished.summary)


def run_pipeline(config: Config, address: str | None, until: str, *, quiet: bool, track: bool) -> Run:
    """The same for the commands: in this process where the address is `local`, and what the pipeline itself returns."""
    from contextlib import ExitStack

    from roma_ray.cluster.environment import quiet_libraries
    from roma_ray.cluster.ray_runners import open_place
    from roma_ray.engine.observers import NOBODY
    from roma_ray.runs.pipeline import run as pipeline
    from roma_ray.terminal import open_progress

    quiet_libraries()
    progress = open_progress(quiet)
    with ExitStack() as stack:
        place = stack.enter_context(open_place(config, address, progress))
        setup, observer = place.setup(config), NOBODY
        if track:
            from roma_ray.tracking import Tracker

            observer = stack.enter_context(Tracker(setup, progress))
        return pipeline(setup, progress, place.runners, until, observer)
