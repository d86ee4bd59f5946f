"""The driver's memory at many questions: python benchmarks/driver_memory.py --sizes 100000 1000000

Each part that the driver does itself runs in a process of its own on synthetic rows, at two sizes, and the peak of its resident
memory is printed, with the seconds and the CPU's (which other jobs on the machine do not lengthen): reading and encoding questions,
planning and gathering extraction, neighbors, manifests and MLflow. No model runs. Questions are short ones of four choices;
embeddings have 384 numbers, around topics as sentence embeddings lie.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WIDTH = 384
LOOKED_UP = 16_384
WORDS = "red green blue cat dog fish one two three four five six apple pear plum north south east west".split()  # noqa: SIM905


def write_questions(path: Path, rows: int) -> None:
    """JSON lines of some 250 bytes."""
    rng = random.Random(0)
    with open(path, "w") as stream:
        for number in range(rows):
            choices = rng.sample(WORDS, 4)
            text = f"Which word of number {number} is {' '.join(rng.choices(WORDS, k=12))}?"
            row = {
                "id": f"q{number}",
                "task": f"t{number % 9}",
                "question": text,
                "choices": choices,
                "answer": number % 4,
            }
            stream.write(json.dumps(row) + "\n")


def setup_for(folder: Path) -> Any:
    """The embedded model with the synthetic questions."""
    from roma_ray.config.loading import load_config
    from roma_ray.engine.setup import resolve

    sources = f"questions.sources=[{{path: {folder / 'q.jsonl'}}}]"
    return resolve(load_config(None, [sources, f"storage={folder}"]), device="cpu")


def questions(folder: Path, rows: int) -> None:
    """Read, split, encode and write the question table."""
    from roma_ray.engine.progress import Silence
    from roma_ray.engine.runners import LOCAL
    from roma_ray.engine.steps import complete
    from roma_ray.stages.preparation import QUESTIONS

    setup = setup_for(folder)
    complete(QUESTIONS, QUESTIONS.job(setup, {}), LOCAL, Silence())


def extraction(folder: Path, rows: int) -> None:
    """Plan batches from the table of questions, and gather the batches' tables (written here with few layers)."""
    import numpy as np

    from roma_ray.engine.progress import Silence
    from roma_ray.engine.runners import Runners
    from roma_ray.engine.steps import complete, locate
    from roma_ray.engine.work import Report
    from roma_ray.stages.extraction import EXTRACT

    setup = setup_for(folder)

    def pretend(work: Any, batches: Any) -> Any:
        from roma_ray.engine.extractor import _schema, batch_table
        from roma_ray.engine.question_table import write_table

        plan = json.loads((Path(work.folder) / "plan.json").read_text())["batches"]
        schema = _schema(work.tokens)
        experts = 64 * len(setup.moe_layers)
        routing = np.full(experts, 1 / 64, dtype=np.float32)
        ids = _ids(work.questions)
        for batch in batches:
            size = len(plan[batch])
            columns: dict[str, Any] = {name: [0] * size for name in schema.names}
            columns |= {"row": plan[batch], "id": [ids[r] for r in plan[batch]], "error": [None] * size}
            columns |= {"batch": [batch] * size, "scores": [[0.0] * 4] * size, "is_correct": [True] * size}
            columns |= {f"routing_{rule}": [routing] * size for rule in work.tokens}
            write_table(
                batch_table(work.folder, batch), columns, schema, {"layers": len(setup.moe_layers), "experts": 64}
            )
            yield Report(batch, size, 0, 0, 0.0)

    job = EXTRACT.job(setup, locate(EXTRACT, setup))
    assert complete(EXTRACT, job, Runners(extract=pretend), Silence()).complete


def _ids(path: Path) -> list[str]:
    from roma_ray.engine.question_table import read_table

    return list(read_table(path, ["id"]).column("id").to_pylist())


def embeddings(rows: int) -> Any:
    """Synthetic ones around two thousand topics, fp32."""
    import torch

    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(2000, 24, generator=generator)
    spread = torch.randn(24, WIDTH, generator=generator)
    table = torch.empty(rows, WIDTH)
    for part in torch.arange(rows).split(65536):
        near = centers[torch.randint(2000, (len(part),), generator=generator)]
        table[part] = (near + 0.5 * torch.randn(len(part), 24, generator=generator)) @ spread
    return table


def neighbors(folder: Path, rows: int) -> None:
    """Find three neighbors of every row among two thirds of them, and write and read them."""
    import torch

    from roma_ray.manifold.neighbors import find_neighbors
    from roma_ray.stages.neighborhoods import _write, read_neighborhoods
    from roma_ray.store.artifacts import Store

    everything = torch.ones(rows, dtype=torch.bool)
    found = find_neighbors(
        embeddings(rows),
        torch.arange(rows) % 3 > 0,
        training_N=everything,
        ids=[f"q{n}" for n in range(rows)],
        text_keys=[f"t{n}" for n in range(rows)],
        similarity="gaussian",
        sigma=0.5,
    )
    stage = Store(folder).stage("neighbors", {}, {}, 1)
    _write(stage, found)
    assert len(read_neighborhoods(stage, rows).indices) == 3 * rows
    print(f"recall {found.recall:.4f}", file=sys.stderr)


def shards(folder: Path, rows: int) -> None:
    """The index alone, a shard of S at a time: all rows are in S, some thousands are looked up."""
    import torch

    from roma_ray.manifold.inverted import propose
    from roma_ray.manifold.similarity import UnitRows

    found = propose(
        UnitRows(embeddings(rows)),
        torch.arange(rows),
        torch.arange(0, rows, max(1, rows // LOOKED_UP)),
        4,
        12,
        torch.device("cpu"),
    )
    print(f"recall {found.recall:.4f}", file=sys.stderr)


def records(folder: Path, rows: int) -> None:
    """A manifest over a file a batch, and what MLflow is told of a stage."""
    from roma_ray.store.artifacts import Store
    from roma_ray.tracking.mlflow import Mlflow
    from roma_ray.tracking.run_records import stage_metrics

    stage = Store(folder).stage("embed", {}, {}, 1)
    for number in range(rows // 512):
        (stage.path / "batches").mkdir(parents=True, exist_ok=True)
        (stage.path / "batches" / f"{number:06d}.parquet").write_bytes(number.to_bytes(4, "big"))
    stage.finish(facts={"rows": rows}, seconds=1.0)
    stage.verify()
    client = Mlflow(f"sqlite:///{folder}/mlflow.db", "memory", folder / "artifacts")
    client.log(client.create("stage", {}, 0), metrics=stage_metrics(stage))


PARTS = {"questions": questions, "extraction": extraction, "records": records, "neighbors": neighbors, "shards": shards}


def main() -> None:
    """Measure, or as a child process do one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--parts", default="questions,extraction,records,neighbors", help=f"of: {', '.join(PARTS)}")
    parser.add_argument("--child", nargs=2)
    options = parser.parse_args()
    if options.child:
        began, idle = time.monotonic(), time.process_time()
        PARTS[options.child[0]](Path(options.child[1]), options.rows)
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu = used.ru_utime + used.ru_stime - idle
        print(f"{used.ru_maxrss / 2**20:.2f} {time.monotonic() - began:.1f} {cpu:.1f}")
        return
    print(f"{'part':<12} {'rows':>9} {'peak GiB':>9} {'seconds':>8} {'CPU s':>8}", flush=True)
    for rows in options.sizes:
        folder = Path(tempfile.mkdtemp(prefix="roma-memory-"))
        if {"questions", "extraction"} & set(options.parts.split(",")):
            write_questions(folder / "q.jsonl", rows)
        for part in options.parts.split(","):
            command = [sys.executable, __file__, "--child", part, str(folder), "--rows", str(rows)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            peak, seconds, cpu = done.stdout.split()[-3:]
            note = done.stderr.strip()[-40:] if "recall" in done.stderr else ""
            print(f"{part:<12} {rows:>9,} {peak:>9} {seconds:>8} {cpu:>8}  {note}", flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
