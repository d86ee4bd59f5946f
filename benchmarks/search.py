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
import multiprocessing
import os
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

WIDTH = 384
DRIVER_GIB, WORKER_GIB = 4.0, 8.0


class Memory:
    """The peak of this process's own memory and of what of it is resident, in GiB, looked at every tenth of a second."""

    def __init__(self) -> None:
        self.own = self.resident = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def look(self) -> tuple[float, float]:
        """Both peaks until now."""
        facts = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        own, resident = (float(facts[name].split()[0]) / 2**20 for name in ("RssAnon", "VmRSS"))
        self.own, self.resident = max(self.own, own), max(self.resident, resident)
        return self.own, self.resident

    def _watch(self) -> None:
        while True:
            self.look()
            time.sleep(0.1)


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


def work_off(work: Any, queue: Any, reports: Any) -> None:
    """A worker: does batches until there are none, then says what memory it took."""
    memory = Memory()
    do = work.open()
    while (batch := queue.get()) is not None:
        reports.put(do(batch))
    reports.put(memory.look())


class Workers:
    """An executor of processes; afterwards it knows their peaks and its own seconds."""

    def __init__(self, count: int) -> None:
        self.count, self.peaks, self.seconds, self.busy = count, [], 0.0, 0.0

    def __call__(self, work: Any, batches: Sequence[int]) -> Iterator[Any]:
        began, context = time.monotonic(), multiprocessing.get_context("spawn")
        queue, reports = context.Queue(), context.Queue()
        for batch in [*batches, *[None] * self.count]:
            queue.put(batch)
        processes = [context.Process(target=work_off, args=(work, queue, reports)) for _ in range(self.count)]
        for process in processes:
            process.start()
        while len(self.peaks) < self.count:
            said = reports.get(timeout=3600)
            if isinstance(said, tuple):
                self.peaks.append(said)
                continue
            self.busy += said.seconds
            yield said
        for process in processes:
            process.join()
        self.seconds = time.monotonic() - began


@contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    times[name] = time.monotonic() - began


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
    workers = Workers(options.workers)
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
    with timed(times, "writing the table"):
        _write(job.stage, found)
    pairs, recall = len(found.indices), found.recall
    del found
    with timed(times, "reading it"):
        assert len(read_neighborhoods(job.stage, rows).indices) == pairs
    times["of the search: workers, wall"] = workers.seconds
    times["of the search: workers, their seconds in batches"] = workers.busy
    times["of the search: the driver's ranking"] = times["search and ranking"] - workers.seconds
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
    own, resident = found["driver_gib"]
    print(f"  driver: own memory {own:.2f} GiB, resident {resident:.2f} (gate: own {DRIVER_GIB:g})")
    for own_worker, resident_worker in found["worker_gib"]:
        print(f"  worker: own memory {own_worker:.2f} GiB, resident {resident_worker:.2f} (gate: own {WORKER_GIB:g})")
    if own > DRIVER_GIB or any(peak > WORKER_GIB for peak, _ in found["worker_gib"]):
        sys.exit("a gate is missed")


if __name__ == "__main__":
    main()
