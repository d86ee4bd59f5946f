"""Where the pipeline stops scaling, by simulation: python benchmarks/simulate.py [--summary summary.json] [--measure]

Simulates 1 to 256 nodes of 8 workers for 49,000 to 10 million questions: extraction and embedding as batches that a driver
hands out one after the other to workers that start, load a model, compute and write to shared storage; the questions read by the
driver and encoded by workers; the extraction's rows gathered in the driver; neighbors found there up to 200,000 successes, beyond
that as blocks of questions and shards of successes on workers, ranked by the driver; finetuning on no more workers than a step has
micro-batches; evaluation as batches again, whose rows the driver puts in order.

What goes in is measured: `--summary` takes a finished run's rates (its stage seconds and counts, one worker), `--measure` the
driver's overhead by running empty batches through Ray on this machine. What was not measured here is an option with its default
printed first; change it to your cluster's. Comes out: seconds, speed-up over one node, and what the time goes to.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
QUESTIONS = (49_000, 200_000, 1_000_000, 10_000_000)
WORKERS_A_NODE = 8


@dataclass(frozen=True)
class Rates:
    """What the simulation starts from; rates are those of one worker."""

    extract_per_second: float = 500.0
    """Questions; an estimate for one H100 and a model of 1B active parameters, until --summary replaces it."""
    embed_per_second: float = 330.0
    """MiniLM on two CPU threads."""
    train_per_second: float = 400.0
    """Questions through the head, forward and backward; an estimate as above."""
    evaluate_per_second: float = 1500.0
    """Questions through the head, forward; each is asked twice, of base and tuned routers."""
    start_seconds: float = 20.0
    """A worker's process with its imports (12 to 26 s on CPUs)."""
    load_seconds: float = 15.0
    """Reading the model from the storage, when it is not busy."""
    dispatch_seconds: float = 0.00034
    """The driver's CPU time for a batch that is told of by itself, as --measure found it on one core; --measure replaces it."""
    questions_a_batch: float = 32.0
    bytes_a_question: float = 400_000.0
    """Activations of about 100 tokens of 2048 numbers in bfloat16."""
    storage_bytes_per_second: float = 5e9
    """Of the shared file system, all nodes together."""
    spread: float = 0.3
    """Of a batch's time (log-normal): prompts differ in length."""
    step_seconds: float = 0.01
    """Gathering gradient sums and stepping, whatever the workers."""
    questions_a_step: int = 32
    micro_batches: int = 4
    epochs: int = 3
    trained_part: float = 0.7
    read_per_second: float = 16_000.0
    """Questions that the driver reads twice, splits and lays down (reading.py at 100,000, a CPU core)."""
    encode_per_second: float = 2900.0
    """Questions encoded by a worker, each with each of four choices (reading.py at 100,000, a CPU core)."""
    table_per_second: float = 200_000.0
    """Encoded questions that the driver gathers (reading.py at 100,000, a CPU core)."""
    gather_per_second: float = 24_000.0
    """Questions whose extracted rows the driver puts in order (driver_memory.py at a million, a CPU core)."""
    vectors_per_second: float = 36_000.0
    """Questions whose embeddings the driver puts in order (driver_memory.py at a million, a CPU core)."""
    successful_part: float = 0.5
    """Of the training questions: S."""
    lookups_per_second: float = 8000.0
    """Questions a worker answers from a shard of S, on a core (search.py --core, a quarter of a full one). A larger shard has longer
    lists, and fewer of them suffice."""
    open_shard_seconds: float = 58.0
    """A worker's time to put a full shard into lists: eight times the 7.3 CPU s measured on a quarter of one."""
    ranked_per_second: float = 36_600.0
    """Questions whose proposals the driver ranks (search.py --core, a CPU core)."""
    pairs_per_second: float = 3.2e7
    """Questions times S up to 200,000 successes, where the search is exact (driver_memory.py, a CPU core)."""


def batches(questions: int, rate: float, workers: int, rates: Rates, written: float, loads: float) -> dict[str, float]:
    """Event simulation of planned batches: seconds in all, and the shares of the driver, the storage and the start."""
    rng = random.Random(0)
    count = max(1, round(questions / rates.questions_a_batch))
    workers = min(workers, count)
    size = questions / count
    # Beyond this many batches every further one repeats what is known: scale up.
    simulated = min(count, 40_000)
    begin = rates.start_seconds + loads
    free = [begin] * workers
    driver = storage = 0.0
    waited_driver = waited_storage = 0.0
    for _ in range(simulated):
        ready = heapq.heappop(free)
        driver = max(driver, ready) + rates.dispatch_seconds
        waited_driver += driver - ready
        done = driver + size / rate * rng.lognormvariate(-(rates.spread**2) / 2, rates.spread)
        storage = max(storage, done) + size * written / rates.storage_bytes_per_second
        waited_storage += storage - done
        heapq.heappush(free, storage)
    rest = (max(free) - begin) * (count / simulated - 1)
    lives = sum(free) - begin * workers or 1.0
    return {
        "seconds": max(free) + rest,
        "driver": waited_driver / lives,
        "storage": waited_storage / lives,
        "start": begin / (max(free) + rest),
    }


def reading(questions: int, workers: int, rates: Rates) -> float:
    """Seconds until questions are encoded: read and gathered by the driver, between them by workers where they are many."""
    encoded = questions / rates.encode_per_second
    if questions > ENCODED_HERE:
        batch = replace(rates, questions_a_batch=ENCODED_HERE)
        encoded = batches(questions, rates.encode_per_second, workers, batch, ENCODED_BYTES, 0.0)["seconds"]
    return questions / rates.read_per_second + encoded + questions / rates.table_per_second


def without_model(questions: int, successes: int, workers: int, rates: Rates) -> dict[str, float]:
    """Seconds of what needs no model, all questions being looked up: what a run on synthetic rows can be held against."""
    return {
        "questions": reading(questions, workers, rates),
        "gathering the extraction": questions / rates.gather_per_second,
        "gathering the embeddings": questions / rates.vectors_per_second,
        "neighbors": neighbors(questions, successes, workers, rates),
    }


def neighbors(trained: float, successes: float, workers: int, rates: Rates) -> float:
    """Seconds of the search: exact in the driver, or lookups in shards on workers that open each shard they meet, and the ranking."""
    if successes <= EXACT_UP_TO:
        return trained * successes / rates.pairs_per_second
    full, rest = divmod(successes, SHARD)
    opening = rates.open_shard_seconds * (full + (rest / SHARD) ** 1.5)
    shards, blocks = math.ceil(successes / SHARD), math.ceil(trained / BLOCK)
    workers = min(workers, shards * blocks)
    # A worker takes blocks of one shard after another, so it opens its part of the shards, and one at least.
    opened = max(1.0, shards / workers) * opening / shards
    lookups = trained * shards / rates.lookups_per_second / workers
    return rates.start_seconds + opened + lookups + trained / rates.ranked_per_second


def pipeline(questions: int, nodes: int, rates: Rates) -> dict[str, Any]:
    """Seconds of each stage and why the first of them does not scale further."""
    workers = nodes * WORKERS_A_NODE
    # All nodes read the model at once, each once (its page cache serves its workers).
    loading = max(rates.load_seconds, nodes * rates.load_seconds / 16)
    extract = batches(questions, rates.extract_per_second, workers, rates, rates.bytes_a_question, loading)
    embed = batches(questions, rates.embed_per_second, workers, rates, WIDTH_BYTES, 2.0)
    trained = rates.trained_part * questions
    successes = rates.successful_part * trained
    # A part of the evaluation is up to eight batches (roma_ray/stages/answer_work.py).
    judged, parts = 2 * (questions - trained), replace(rates, questions_a_batch=8 * rates.questions_a_batch)
    evaluate = batches(int(judged), rates.evaluate_per_second, workers, parts, ROUTING_BYTES, loading)
    steps = rates.epochs * trained / rates.questions_a_step
    trainers = min(workers, rates.micro_batches)
    step = rates.questions_a_step / rates.train_per_second / trainers + rates.step_seconds
    stages = {
        "questions": reading(questions, workers, rates),
        "extract": extract["seconds"],
        "gather": questions / rates.gather_per_second,
        "embed": embed["seconds"] + questions / rates.vectors_per_second,
        "neighbors": neighbors(trained, successes, workers, rates),
        "finetune": rates.start_seconds + rates.load_seconds + steps * step,
        "evaluate": evaluate["seconds"] + judged / rates.gather_per_second,
    }
    shares = {name: extract[name] for name in ("driver", "storage", "start")}
    busiest = max(shares, key=lambda name: shares[name])
    why = f"extraction: {busiest} {shares[busiest]:.0%}" if shares[busiest] > 0.2 else "extraction: computing"
    return {"stages": stages, "total": sum(stages.values()), "why": why}


WIDTH_BYTES = 384 * 4.0
# Of 5 layers of 64 experts.
ROUTING_BYTES = 5 * 64 * 4.0
# Of a question and what it becomes, compressed.
ENCODED_BYTES = 300.0
ENCODED_HERE = 16_384
EXACT_UP_TO = 200_000
SHARD, BLOCK = 2**20, 2**17


def report(rates: Rates, say: Callable[[str], None] = print) -> None:
    """Print the tables."""
    for name, value in asdict(rates).items():
        say(f"  {name:<26} {value:g}")
    for questions in QUESTIONS:
        base = pipeline(questions, 1, rates)
        names = list(base["stages"])
        say(f"\n{questions:,} questions; seconds a stage, and extraction's efficiency against one node")
        say("nodes  workers " + " ".join(f"{name:>10}" for name in names) + f" {'total':>10} {'efficiency':>11}  limit")
        knee = None
        for nodes in NODES:
            found = pipeline(questions, nodes, rates)
            efficiency = base["stages"]["extract"] / found["stages"]["extract"] / nodes
            if efficiency < 0.5 and knee is None:
                knee = (nodes, found["why"])
            cells = " ".join(f"{found['stages'][name]:>10.0f}" for name in names)
            say(
                f"{nodes:>5}  {nodes * WORKERS_A_NODE:>7} {cells} {found['total']:>10.0f} {efficiency:>10.0%}  {found['why']}"
            )
        largest = pipeline(questions, NODES[-1], rates)["stages"]
        serial = max(largest, key=lambda name: largest[name])
        say(f"extraction is half idle from {knee[0]} nodes ({knee[1]})" if knee else "extraction scales to the end")
        say(
            f"at {NODES[-1]} nodes the run is bound by {serial}: {largest[serial] / sum(largest.values()):.0%} of its time"
        )


def from_summary(path: Path, rates: Rates) -> Rates:
    """Rates of a finished run with one worker a stage."""
    summary = json.loads(path.read_text())
    seconds = summary["stage_seconds"]
    train, validation, test = (
        summary["neighborhoods"]["training"],
        summary["validation"]["n"],
        summary["splits"]["test"]["all"]["n"],
    )
    asked = train + validation + test
    # The base answers test and validation questions, the tuned routers the test questions and a sample of the trained ones.
    sample = summary["diagnostics"]["manifold_distance"]["train"]
    scored = validation + 2 * test + (sample["questions"] if sample else 0)
    return replace(
        rates,
        extract_per_second=asked / seconds["extract"],
        embed_per_second=asked / seconds["embed"],
        train_per_second=train * len(summary["epochs"]) / seconds["finetune"],
        evaluate_per_second=scored / seconds["evaluate"],
        epochs=len(summary["epochs"]),
        trained_part=train / asked,
    )


@dataclass(frozen=True)
class EmptyWork:
    """Batches that do nothing, to measure what handing them out costs."""

    folder: str
    each: bool
    """Each is told of by itself, as long ones are; else those of a second together, as short ones are."""
    name: str = "extract"

    def open(self) -> Callable[[int], Any]:
        """Nothing to load."""
        from roma_ray.cluster import batch_worker
        from roma_ray.engine.work import Report

        if self.each:
            batch_worker._SECONDS_BETWEEN_REPORTS = 0.0
        return lambda batch: Report(batch, 1, 0, 0, 0.0)


def measure_dispatch(count: int = 1500) -> tuple[float, float]:
    """CPU seconds of the driver's process for a batch through the pipeline's own Ray executor: told of by itself, and with others."""
    from roma_ray.cluster.batch_actors import ray_executor
    from roma_ray.cluster.ray_cluster import open_cluster
    from roma_ray.config.loading import load_config

    def seconds(execute: Any, work: EmptyWork, batches: int) -> float:
        began = time.process_time()
        list(execute(work, range(batches)))
        return time.process_time() - began

    config, found = load_config(None, ["ray.extract_workers=2"]), []
    with tempfile.TemporaryDirectory() as folder, open_cluster(config, "new") as cluster:
        execute = ray_executor(cluster, "extract", "cpu")
        for each in (False, True):
            work = EmptyWork(folder, each)
            seconds(execute, work, 50)
            short = seconds(execute, work, 50)
            found.append((seconds(execute, work, 50 + count) - short) / count)
    return found[1], found[0]


def main() -> None:
    """Parse, measure, simulate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--summary", type=Path, help="the --summary file of a finished run")
    parser.add_argument(
        "--without-model",
        type=int,
        nargs=3,
        metavar=("QUESTIONS", "SUCCESSES", "WORKERS"),
        help="print instead what reading.py, driver_memory.py and search.py would take",
    )
    parser.add_argument("--measure", action="store_true", help="measure the driver's overhead here (starts Ray)")
    for one in fields(Rates):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default))
    options = parser.parse_args()
    rates = Rates()
    if options.summary:
        rates = from_summary(options.summary, rates)
    if options.measure:
        alone, together = measure_dispatch()
        print(
            f"the driver's CPU milliseconds a batch: {1e3 * alone:.2f} told of by itself, {1e3 * together:.2f} with others"
        )
        rates = replace(rates, dispatch_seconds=alone)
    given = {f.name: getattr(options, f.name) for f in fields(Rates) if getattr(options, f.name) is not None}
    rates = replace(rates, **given)
    if options.without_model:
        for stage, seconds in without_model(*options.without_model, rates).items():
            print(f"  {stage:<26} {seconds:>8.0f} s")
        return
    report(rates)


if __name__ == "__main__":
    main()
