"""The driver's memory at many questions: python benchmarks/driver_memory.py --sizes 100000 1000000

Each part that the driver does itself runs in a process of its own on synthetic rows, at two sizes or more, and the peak of its
resident memory is printed, what of it was its own (anonymous: not pages of mapped files, which the system takes back), the seconds,
and the CPU's (which other jobs on the machine do not lengthen): planning and gathering extraction and embedding, neighbors,
manifests and MLflow, and what an evaluation reads beside the answers (`evaluating`); and a worker's part of an extraction (`worker`)
and of a training (`training`). No model runs. Questions are short ones of four choices, of 30 to 50 tokens: a table of random tokens.
Reading and encoding them is measured by reading.py. `training` and `evaluating` first gather an extraction, and map 1.2 GiB a million
questions in the folder's scratch, `training` twice as much: ten million take some 33 GB of disk. Embeddings have 384 numbers, those of
the neighbors around topics as sentence embeddings lie.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from processes import Memory, cpu_seconds
from reading import setup_for, write_questions

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WIDTH = 384
LOOKED_UP = 16_384


def make_table(folder: Path, rows: int) -> Any:
    """A finished questions stage with a table of random tokens, which nobody had to read or to encode; returns the set-up."""
    import numpy as np
    import pyarrow as pa

    from roma_ray.engine.question_table import QUESTIONS as COLUMNS
    from roma_ray.engine.question_table import TABLE
    from roma_ray.stages.preparation import QUESTIONS
    from roma_ray.store.tables import PART_ROWS, write_parts

    setup = setup_for(folder)
    stage = QUESTIONS.at(setup, {})
    rng = np.random.default_rng(0)

    def lists(lengths: Any, values: Any) -> Any:
        return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()), values)

    def part(start: int) -> Any:
        size = min(PART_ROWS, rows - start)
        prompts = rng.integers(30, 51, size)
        choices = np.full(size, 4)
        continuations = rng.integers(1, 4, 4 * size)
        ids = [f"q{n}" for n in range(start, start + size)]
        columns = {
            "row": pa.array(range(start, start + size)),
            "id": ids,
            "task": [f"t{n % 9}" for n in range(size)],
            "split": rng.choice(["train", "validation", "test"], size, p=[0.8, 0.1, 0.1]),
            "question": [f"Which word of number {id} is red green blue cat dog fish one two three?" for id in ids],
            "choices": lists(choices, pa.array(["apple", "pear", "plum", "north"] * size)),
            "answer": rng.integers(0, 4, size),
            "context": pa.nulls(size, pa.string()),
            "prompt_ids": lists(prompts, pa.array(rng.integers(0, 2000, prompts.sum()), pa.int32())),
            "choice_ids": lists(
                choices, lists(continuations, pa.array(rng.integers(0, 2000, continuations.sum()), pa.int32()))
            ),
            "choice_chars": lists(choices, pa.array(np.full(4 * size, 5), pa.int32())),
            "truncated": np.zeros(size, dtype=bool),
        }
        return pa.table([pa.array(columns[field.name], field.type) for field in COLUMNS], schema=COLUMNS)

    if not stage.complete:
        write_parts(stage.path / TABLE, COLUMNS, (part(start) for start in range(0, rows, PART_ROWS)))
        stage.finish(facts={"questions": rows, "drawn": {"test": True, "validation": True}}, seconds=1.0)
    return setup


class Left(Exception):
    """The batches are written; nothing is gathered."""


def _job(step: Any, folder: Path, rows: int) -> Any:
    from roma_ray.engine.steps import locate

    setup = make_table(folder, rows)
    return step.job(setup, locate(step, setup))


def leave_extraction(folder: Path, rows: int) -> None:
    """Not measured: the tables that workers would write, of uniform routing rows."""
    import contextlib

    import numpy as np

    from roma_ray.engine.batches import read_plan
    from roma_ray.engine.extractor import PLAN, _schema, batch_table
    from roma_ray.engine.progress import Silence
    from roma_ray.engine.question_table import write_table
    from roma_ray.engine.runners import Runners
    from roma_ray.engine.steps import complete
    from roma_ray.stages.extraction import EXTRACT
    from roma_ray.store.files import remove

    def pretend(work: Any, batches: Any) -> Any:
        _, plan = read_plan(Path(work.folder) / PLAN)
        schema, layers = _schema(work.tokens, False), len(work.setup.moe_layers)
        routing = np.full(64 * layers, 1 / 64, dtype=np.float32)
        for batch in batches:
            own = plan[batch]
            columns: dict[str, Any] = {name: [0] * len(own) for name in schema.names}
            columns |= {"row": own, "id": [f"q{row}" for row in own], "error": [None] * len(own)}
            columns |= {"batch": [batch] * len(own), "scores": [[0.0] * 4] * len(own), "is_correct": [True] * len(own)}
            columns |= {f"routing_{rule}": [routing] * len(own) for rule in work.tokens}
            write_table(batch_table(work.folder, batch), columns, schema, {"layers": layers, "experts": 64})
        # The measured process plans again.
        remove(Path(work.folder) / PLAN)
        raise Left
        yield

    with contextlib.suppress(Left):
        complete(EXTRACT, _job(EXTRACT, folder, rows), Runners(extract=pretend), Silence())


def extraction(folder: Path, rows: int) -> None:
    """Plan batches from the table of questions, find all done, and gather the batches' tables."""
    from roma_ray.engine.progress import Silence
    from roma_ray.engine.runners import LOCAL
    from roma_ray.engine.steps import complete
    from roma_ray.stages.extraction import EXTRACT

    assert complete(EXTRACT, _job(EXTRACT, folder, rows), LOCAL, Silence()).complete


def worker(folder: Path, rows: int) -> None:
    """What an extraction's worker holds beside its model: the plan and all prompts; it lays out a thousand batches."""
    from roma_ray.engine.extractor import PLAN, Batches, ExtractWork
    from roma_ray.stages.extraction import EXTRACT
    from roma_ray.store.files import exists

    job = _job(EXTRACT, folder, rows)
    assert exists(job.stage.path / PLAN), "part `extraction` comes first"
    batches = Batches(ExtractWork(job.setup, job.stages, job.stage))
    for batch in range(0, len(batches.batches), max(1, len(batches.batches) // 1000)):
        batches.reading(batches.batches[batch])


def leave_embedding(folder: Path, rows: int) -> None:
    """Not measured: the tables that workers would write, of random vectors."""
    import contextlib

    import numpy as np
    import pyarrow as pa

    from roma_ray.engine.batches import read_plan
    from roma_ray.engine.progress import Silence
    from roma_ray.engine.runners import Runners
    from roma_ray.engine.steps import complete
    from roma_ray.stages.embedding import _SCHEMA, EMBED, PLAN, _part
    from roma_ray.store.tables import write_table

    rng = np.random.default_rng(0)

    def pretend(work: Any, batches: Any) -> Any:
        _, plan = read_plan(Path(work.folder) / PLAN)
        for batch in batches:
            own = plan[batch]
            flat = pa.array(rng.standard_normal(len(own) * WIDTH, dtype=np.float32))
            vectors = pa.FixedSizeListArray.from_arrays(flat, WIDTH).cast(pa.list_(pa.float32()))
            write_table(_part(work.folder, batch), {"row": own, "embedding": vectors}, _SCHEMA)
        raise Left
        yield

    with contextlib.suppress(Left):
        complete(EMBED, _job(EMBED, folder, rows), Runners(embed=pretend), Silence())


def embedding(folder: Path, rows: int) -> None:
    """Measure all texts, plan the embedding's batches, find all done, and gather the vectors into one file."""
    from roma_ray.engine.progress import Silence
    from roma_ray.engine.runners import LOCAL
    from roma_ray.engine.steps import complete
    from roma_ray.stages.embedding import EMBED

    assert complete(EMBED, _job(EMBED, folder, rows), LOCAL, Silence()).complete


def leave_training(folder: Path, rows: int) -> None:
    """Not measured: a gathered extraction, and for each training question three random members of S."""
    import torch

    from roma_ray.engine.question_table import TABLE, read_prompts
    from roma_ray.manifold.neighbors import Neighborhoods
    from roma_ray.stages.finetuning import FINETUNE
    from roma_ray.stages.neighborhoods import PAIRS, _write

    job = _job(FINETUNE, folder, rows)
    if not job.stages["extract"].complete:
        leave_extraction(folder, rows)
        extraction(folder, rows)
    stage = job.stages["neighbors"]
    if (stage.path / PAIRS).exists():
        return
    queried = torch.from_numpy(read_prompts(job.stages["questions"].path / TABLE).splits.mask(["train"]))
    members, pairs = queried.nonzero()[:, 0], 3 * int(queried.sum())
    drawn = members[torch.randint(len(members), (pairs,), generator=torch.Generator().manual_seed(0))]
    same = torch.ones(pairs, dtype=torch.float64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (3 * queried.long()).cumsum(0)])
    stage.path.mkdir(parents=True, exist_ok=True)
    _write(stage, Neighborhoods(offsets, drawn, same * 0.5, same / 3, queried))


def training(folder: Path, rows: int) -> None:
    """What a training's worker holds beside its head: prompts, neighborhoods, routing rows, targets, the plan of an epoch.

    A thousand micro-batches are laid out and their targets taken.
    """
    import torch

    from roma_ray.engine.batches import chunks, epoch_order
    from roma_ray.engine.forward import lay_out
    from roma_ray.manifold.losses import neighbor_targets
    from roma_ray.stages.finetuning import FINETUNE, TrainJob
    from roma_ray.store.scratch import roomy_zeros

    class Headless(TrainJob):
        """Without states, for which there would have to be a model."""

        def open_states(self) -> Any:
            return None

    job = _job(FINETUNE, folder, rows)
    data = Headless(job.setup, job.stages, job.stage).open_data()
    targets = neighbor_targets(data.neighborhoods, data.routing_NLE, roomy_zeros)
    settings = job.setup.config.finetune
    batches = chunks(epoch_order(data.train, 0, 0), settings.batch_size)
    planned = [part for batch in batches for part in chunks(batch, settings.micro_batch_size)]
    for part in planned[:: max(1, len(planned) // 1000)]:
        lay_out([data.prompts[row] for row in part], prefix=0)
        assert targets.take(torch.tensor(part)).present.all()


def evaluating(folder: Path, rows: int) -> None:
    """What the driver reads for an evaluation beside the answers: prompts, guards, stored rows of the distance, a pin."""
    import numpy as np

    from roma_ray.engine.question_table import TABLE, read_prompts
    from roma_ray.engine.scoring import Scores
    from roma_ray.stages.finetuning import FINETUNE
    from roma_ray.stages.neighborhoods import read_neighborhoods, usable_rows
    from roma_ray.stages.paired_evaluation import _guards, _judged_rows, evaluation_pin
    from roma_ray.stages.routing_change import DIAGNOSED_ROWS, manifold_distance, sampled

    job = _job(FINETUNE, folder, rows)
    setup, stages = job.setup, job.stages
    prompts = read_prompts(stages["questions"].path / TABLE)
    test = _judged_rows(prompts, usable_rows(stages["extract"]))["test"]
    near = read_neighborhoods(stages["neighbors"], len(prompts))
    assert sampled(near.queried & (near.sizes > 0))
    assert prompts.tasks.present(near.queried.numpy())

    def answered(every: list[int]) -> Scores:
        """Of as many rows as are diagnosed, from the whole table."""
        own = every[:: max(1, len(every) // DIAGNOSED_ROWS)]
        routing = np.full((len(own), len(setup.layers), 64), 1 / 64, dtype=np.float32)
        return Scores(own, [], [], np.ones(len(own), dtype=bool), routing)

    base = answered(test)
    assert _guards(stages["questions"], prompts, base.rows, base, base)["truncated"] == 0
    lived = {"train": answered(near.queried.nonzero()[:, 0].tolist())}
    embeddings, columns = stages["embed"], list(range(len(setup.layers)))
    found = manifold_distance(setup, stages["questions"], stages["extract"], embeddings, near, lived, columns)
    assert found["train"]["questions"] == len(lived["train"].rows)
    evaluation_pin(stages["questions"], {}, base.rows)


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


LEFT = {
    "extraction": leave_extraction,
    "embedding": leave_embedding,
    "training": leave_training,
    "evaluating": leave_training,
}
"""What a process of its own does before the measured one."""
PARTS = {
    "extraction": extraction,
    "worker": worker,
    "embedding": embedding,
    "records": records,
    "training": training,
    "evaluating": evaluating,
    "neighbors": neighbors,
    "shards": shards,
}


def measured(part: str, folder: Path, rows: int) -> None:
    """Do one part, and print its peaks in GiB and its seconds."""
    memory, began, idle = Memory(), time.monotonic(), cpu_seconds()
    PARTS[part](folder, rows)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{largest:.2f} {memory.look()[0]:.2f} {time.monotonic() - began:.1f} {cpu_seconds() - idle:.1f}")


def main() -> None:
    """Measure, or as a child process do one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--parts", default="extraction,embedding,records,neighbors", help=f"of: {', '.join(PARTS)}")
    parser.add_argument(
        "--folder", type=Path, help="where the files of a run lie (default: the system's temporary folder)"
    )
    parser.add_argument("--child", nargs=2)
    options = parser.parse_args()
    if options.child:
        part, folder = options.child[0], Path(options.child[1])
        if part.startswith("before-"):
            LEFT[part.removeprefix("before-")](folder, options.rows)
        else:
            measured(part, folder, options.rows)
        return
    print(f"{'part':<12} {'rows':>10} {'peak GiB':>9} {'own GiB':>8} {'seconds':>8} {'CPU s':>8}", flush=True)
    for rows in options.sizes:
        parts = options.parts.split(",")
        folder = Path(tempfile.mkdtemp(prefix="roma-memory-", dir=options.folder))
        try:
            write_questions(folder / "q.jsonl", 100)
            for part in parts:
                if part in LEFT:
                    run(f"before-{part}", folder, rows)
                found = run(part, folder, rows)
                peak, own, seconds, cpu = found.stdout.split()[-4:]
                note = found.stderr.strip()[-40:] if "recall" in found.stderr else ""
                print(f"{part:<12} {rows:>10,} {peak:>9} {own:>8} {seconds:>8} {cpu:>8}  {note}", flush=True)
        finally:
            shutil.rmtree(folder)


def run(part: str, folder: Path, rows: int) -> subprocess.CompletedProcess[str]:
    """A part in a process of its own."""
    command = [sys.executable, __file__, "--child", part, str(folder), "--rows", str(rows)]
    scratch = {"ROMA_RAY_SCRATCH": str(folder / "scratch")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **scratch})
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return done


if __name__ == "__main__":
    main()
