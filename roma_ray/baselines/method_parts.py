"""What a method does at each question by itself, in planned parts: a file a part, so that any number of workers share them.

In the folder of the method's stage: `.parts/plan.json`, the rows of each part, and `.parts/NNNNNN.parquet`, what was found for
them. Whoever completes the stage does the parts that are missing, so one process needs nobody else.
"""

from __future__ import annotations

import time
from pathlib import Path

from roma_ray.baselines.bench import Bench
from roma_ray.baselines.contract import Method
from roma_ray.engine.answers import Answers, gathered, write_found
from roma_ray.errors import ArtifactError
from roma_ray.store.artifacts import Stage, write_json
from roma_ray.store.files import exists, present, read_json
from roma_ray.store.tables import read_tables, table_facts

PARTS = ".parts"
_PLAN = "plan.json"


def given(bench: Bench, method: Method) -> Bench:
    """The bench as the method may see it."""
    return bench if method.sees_labels else bench.blinded()


def plan_parts(stage: Stage, method: Method, bench: Bench) -> list[list[int]]:
    """The rows of each part, as saved by the first attempt or planned now. Raises ArtifactError."""
    path = stage.path / PARTS / _PLAN
    if not exists(path):
        write_json(path, method.parts(given(bench, method)))
    return read_parts(stage)


def read_parts(stage: Stage) -> list[list[int]]:
    """The rows of each part. Raises ArtifactError for a damaged plan."""
    path = stage.path / PARTS / _PLAN
    try:
        return [[int(row) for row in rows] for rows in read_json(path)]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); remove {path.parent} and run again") from None


def missing_parts(stage: Stage, count: int) -> list[int]:
    """The parts that are not done."""
    done = present([_file(stage, part) for part in range(count)])
    return [part for part, there in enumerate(done) if not there]


def do_part(stage: Stage, method: Method, bench: Bench, seed: int, part: int) -> None:
    """Work on the questions of a part and write what is found. Raises what the method raises."""
    # Loaded before the clock starts: reading a model from disk is no part of a question's time.
    _ = bench.whole if method.runs_whole_model else bench.head
    clock = time.monotonic()
    found = method.work(given(bench, method), read_parts(stage)[part], seed)
    write_found(_file(stage, part), found, {"seconds": time.monotonic() - clock})


def all_parts(stage: Stage, method: Method, bench: Bench, seed: int) -> tuple[Answers, float]:
    """What was found for all questions, in their order, the missing parts done now; and the seconds that it took.

    Raises what the method raises, ArtifactError.
    """
    assert method.works_on is not None
    count = len(plan_parts(stage, method, bench))
    for part in missing_parts(stage, count):
        do_part(stage, method, bench, seed, part)
    tables = list(read_tables([_file(stage, part) for part in range(count)]))
    seconds = sum(float(table_facts(table)["seconds"]) for table in tables)
    return gathered(tables, bench.rows[method.works_on]), seconds


def _file(stage: Stage, part: int) -> Path:
    return stage.path / PARTS / f"{part:06d}.parquet"
