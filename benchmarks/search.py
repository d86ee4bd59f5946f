"""Neighbors of many questions on workers: python benchmarks/search.py --questions 10000000 --successes 2000000 --workers 2

The search of the neighbors stage itself (`stages/neighbor_lists.py`), from embeddings of 384 numbers around topics, as sentence
embeddings lie: workers answer blocks of questions from shards of S, the driver merges, ranks in fp64, writes the table. Each worker
is a process. Printed: seconds of each part, recall, and the peak memory of driver and workers: their own (anonymous), and resident,
which counts the pages of mapped embeddings that are in memory though the system may take them back. Gates: own memory of the driver
under 4 GiB, of each worker under 8 GiB.

`--core` measures instead what `simulate.py` starts from, in CPU seconds of this process on one thread: putting a quarter of a full
shard (262,144 successes) into lists, answering 131,072 questions from it, and ranking their proposals as the driver does.

Disk: 4 x 384 bytes a question, and 92 bytes a question and shard of 1,048,576 successes.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from processes import Memory, Workers, cpu_seconds, memory_gates, timed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

WIDTH = 384


def write_embeddings(path: Path, rows: int) -> None:
    """Synthetic ones around two thousand topics, fp32, as one safetensors file, block by block."""
    import torch

    header = {"embeddings": {"dtype": "F32", "shape": [rows, WIDTH], "data_offsets": [0, rows * WIDTH * 4]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    centers, spread = torch.randn(2000, 24, generator=generator), torch.randn(24, WIDTH, generator=generator)
    path.parent.mkdir(parents=True)
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for part in torch.arange(rows).split(65536):
            near = centers[torch.randint(2000, (len(part),), generator=generator)]
            block = (near + 0.5 * torch.randn(len(part), 24, generator=generator)) @ spread
            stream.write(block.numpy().tobytes())


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Search, write and read the neighbors; seconds by part, peaks of memory."""
    import torch

    from roma_ray.config.loading import load_config
    from roma_ray.engine.progress import Silence
    from roma_ray.engine.setup import resolve
    from roma_ray.engine.work import Job
    from roma_ray.manifold.inverted import SHARD_ROWS
    from roma_ray.manifold.neighbors import find_neighbors
    from roma_ray.stages.embedding import VECTORS, read_embeddings
    from roma_ray.stages.neighbor_lists import spread
    from roma_ray.stages.neighborhoods import _write, read_neighborhoods
    from roma_ray.store.artifacts import Stage

    rows, times, memory = options.questions, {}, Memory()
    setup = resolve(load_config(None, [f"storage={folder}"]), device="cpu")
    embed = Stage(folder / "embed", "embed", {})
    with timed(times, "making the embeddings (not part of a run)"):
        write_embeddings(embed.path / VECTORS, rows)
    job = Job(setup, {"embed": embed}, setup.store.stage("neighbors", {}, {}, 1))
    workers, began = Workers(options.workers), cpu_seconds()
    everything = torch.ones(rows, dtype=torch.bool)
    # Evenly spaced, as many as are asked for.
    successful = torch.zeros(rows, dtype=torch.bool)
    successful[torch.linspace(0, rows - 1, options.successes, dtype=torch.float64).long()] = True
    with timed(times, "search and ranking"):
        found = find_neighbors(
            read_embeddings(embed),
            successful,
            training_N=everything,
            ids=torch.arange(rows),
            text_keys=torch.arange(rows),
            similarity="gaussian",
            sigma=0.5,
            backend="torch",
            device="cpu",
            propose=spread(job, workers, Silence()),
        )
    ranking = cpu_seconds() - began
    with timed(times, "writing the table"):
        _write(job.stage, found)
    pairs, recall = len(found.indices), found.recall
    del found
    with timed(times, "reading it"):
        assert len(read_neighborhoods(job.stage, rows).indices) == pairs
    times["of the search: workers, wall"] = workers.seconds
    times["of the search: workers, their seconds in batches"] = workers.busy
    times["of the search: workers, their CPU with their start"] = workers.cpu
    times["of the search: the driver's ranking"] = times["search and ranking"] - workers.seconds
    times["of the search: the driver's CPU"] = ranking
    return {
        "questions": rows,
        "successes": options.successes,
        "shards": -(-options.successes // SHARD_ROWS),
        "workers": options.workers,
        "recall": recall,
        "pairs": pairs,
        "seconds": times,
        "driver_gib": memory.look(),
        "worker_gib": workers.peaks,
    }


def one_core() -> None:
    """Print the rates of one core."""
    import torch

    from roma_ray.manifold.inverted import Lookup, ProposalsInMemory, Shard
    from roma_ray.manifold.ranking import QuestionTable
    from roma_ray.store.tensors import read_tensors

    torch.set_num_threads(1)
    successes, asked = 2**18, 2**17
    with tempfile.TemporaryDirectory(prefix="roma-neighbors-") as folder:
        write_embeddings(Path(folder) / "part" / "e.safetensors", successes + asked)
        table_NC = read_tensors(Path(folder) / "part" / "e.safetensors")[0]["embeddings"]
        rows_N = torch.arange(len(table_NC))
        table = QuestionTable(table_NC, rows_N < successes, rows_N, rows_N, "torch", "cpu")
        lookup = Lookup(table.candidates_M, rows_N[successes:], 4, 11)
        began = time.process_time()
        shard = Shard(table.unit, lookup, 0, torch.device("cpu"))
        opened = time.process_time()
        found = shard.top(0, asked)
        answered = time.process_time()
        table.propose = lambda *_: ProposalsInMemory(*found, 1.0)
        table.likely(lookup.rows_Q, 3, 2048)
        ranked = time.process_time()
    print(f"one core, {successes:,} successes in {len(shard.lists.means_LC):,} lists, {shard.probes} looked into")
    print(f"  into lists: {opened - began:.1f} CPU s")
    print(f"  questions answered: {asked / (answered - opened):,.0f} a CPU s")
    print(f"  questions ranked: {asked / (ranked - answered):,.0f} a CPU s")


def main() -> None:
    """Measure and print; exit code 1 when a gate is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=1_000_000)
    parser.add_argument("--successes", type=int, help="of them in S; default: half")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where there is room; default: a temporary one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--core", action="store_true", help="the rates of one core, for simulate.py")
    options = parser.parse_args()
    if options.core:
        one_core()
        return
    options.successes = options.successes or options.questions // 2
    with tempfile.TemporaryDirectory(prefix="roma-neighbors-", dir=options.folder) as folder:
        found = measure(Path(folder), options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    print(
        f"{found['questions']:,} questions, {found['successes']:,} in S ({found['shards']} shards), {found['workers']} "
        f"worker(s), {WIDTH} numbers: recall {found['recall']:.3f}"
    )
    for name, seconds in found["seconds"].items():
        print(f"  {name:<52} {seconds:>8.1f} s")
    memory_gates(found)


if __name__ == "__main__":
    main()
