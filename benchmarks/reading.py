"""Reading and encoding many questions, on workers: python benchmarks/reading.py --questions 1000000 --workers 2

The questions stage itself (`stages/preparation.py`, `stages/encoding.py`) on JSON lines of some 250 bytes, of four choices and 30 to
50 tokens, with the embedded model's tokenizer: the driver reads, splits and lays batches down, workers encode them, each with each
choice (`cloze`), the driver gathers. Each worker is a process, on one core (RAYON_NUM_THREADS=1). Printed: seconds of each part, CPU
seconds, and the peak memory of driver and workers: their own (anonymous), and resident, which counts the pages of mapped files that
are in memory though the system may take them back. Gates: own memory of the driver under 4 GiB, of each worker under 8 GiB.

Disk: some 1 kB a question.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from processes import Memory, Workers, cpu_seconds, memory_gates, timed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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
    return resolve(load_config(None, [sources, f"storage={folder}", "extraction.cache=false"]), device="cpu")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Fill the stage; seconds by part, peaks of memory."""
    from roma_ray.engine.progress import Silence
    from roma_ray.engine.runners import Runners
    from roma_ray.engine.steps import complete
    from roma_ray.stages.preparation import QUESTIONS

    times: dict[str, float] = {}
    with timed(times, "writing the file (not part of a run)"):
        write_questions(folder / "q.jsonl", options.questions)
    memory, workers, marks = Memory(), Workers(options.workers), {}

    def execute(work: Any, batches: Any) -> Iterator[Any]:
        marks["given"] = cpu_seconds()
        with timed(times, "encoding on workers"):
            yield from workers(work, batches)
        marks["encoded"] = cpu_seconds()

    began = cpu_seconds()
    with timed(times, "the stage"):
        job = QUESTIONS.job(setup_for(folder), {})
        stage = complete(QUESTIONS, job, Runners(encode=execute), Silence())
    ended = cpu_seconds()
    assert stage.manifest()["facts"]["questions"] > 0.99 * options.questions
    if marks:
        times["the driver's CPU: reading, splitting, laying batches down"] = marks["given"] - began
        times["the driver's CPU: gathering"] = ended - marks["encoded"]
        times["the workers' CPU, with their start"] = workers.cpu
    times["the driver's CPU"] = ended - began
    return {
        "questions": options.questions,
        "workers": options.workers,
        "seconds": times,
        "driver_gib": memory.look(),
        "worker_gib": workers.peaks,
    }


def main() -> None:
    """Measure and print; exit code 1 when a gate is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where there is room; default: a temporary one")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="roma-reading-", dir=options.folder) as folder:
        os.environ["ROMA_RAY_SCRATCH"] = str(Path(folder) / "scratch")
        found = measure(Path(folder), options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    print(f"{found['questions']:,} questions, {found['workers']} worker(s)")
    for name, seconds in found["seconds"].items():
        print(f"  {name:<58} {seconds:>8.1f} s")
    memory_gates(found)


if __name__ == "__main__":
    main()
