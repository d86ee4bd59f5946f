"""A chain of slices: questions a second of one actor against two, their weights resident, and what memory each actor takes.

    python benchmarks/chain.py [--json FILE] [--questions 240] [--rounds 2]

An OLMoE of a quarter of OLMoE-1B-7B's width (1.7 GB in fp32) on one Ray cluster of this machine: a chain of one slice and a
chain of two stand side by side, and the same planned batches go through one after the other, in turns. An actor computes on one
thread. Timed from the first batch sent to the last report, filling and emptying of the chain included; starting, loading and
four first batches of each are not. Memory is a process's own (anonymous) at its peak, loading included, less that of an actor with
the same code and questions and a model of next to nothing; its share is what the weights of its slice take.
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Bench, machine, options, save_model, table
from full_size import Peaks

WORDS = [f"word{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
TINY = {"hidden": 32, "experts": 8, "expert_width": 8, "heads": 2}


@dataclass(frozen=True)
class Watched:
    """A link whose actor leaves the peak of its own memory in a file, batch after batch."""

    link: Any
    file: str

    def open(self) -> Callable[[int, Any], Any]:
        peaks = Peaks()
        peaks.start()
        run = self.link.open()

        def do(batch: int, before: Any) -> Any:
            left = run(batch, before)
            Path(self.file).write_text(json.dumps(peaks.own))
            return left

        return do


class Bed:
    """Chains of one extraction's slices, on a cluster of this machine."""

    def __init__(self, cluster: Any, work: Any, folder: Path) -> None:
        self.cluster, self.work, self.folder = cluster, work, folder

    def chain(self, name: str, slices: int) -> tuple[Any, Any]:
        """A loaded chain and its plan."""
        import ray

        from roma_ray.cluster.chain_actors import ActorChain
        from roma_ray.cluster.chain_plans import plan_chains
        from roma_ray.engine.chain import links_of

        plan = plan_chains(self.cluster, "extract", self.work.model, slices, None, 1, "cpu")
        links = [
            Watched(link, str(self.folder / f"{name}-{n}")) for n, link in enumerate(links_of(self.work, plan.ranges))
        ]
        chain = ActorChain(links, plan.needs, name, self.work.folder, str(self.folder / "roll"), 1)
        while not chain.ready:
            chain.hear(ray.wait(list(chain.asked))[0][0])
        return chain, plan

    def send(self, chain: Any, batches: Sequence[int]) -> tuple[float, list[Any]]:
        """All batches through a chain: the seconds, and their reports."""
        from roma_ray.cluster.chain_actors import Flow

        started = time.perf_counter()
        reports = [left.report for _, left in Flow([chain], batches, chain.name, 600).results()]
        return time.perf_counter() - started, reports

    def peak(self, name: str, number: int) -> int:
        """Bytes of an actor's own memory."""
        return int(json.loads((self.folder / f"{name}-{number}").read_text()))


@dataclass
class Measured:
    """What the two chains gave, by the number of slices."""

    seconds: dict[int, list[float]]
    """Of each round."""
    peaks: dict[int, list[tuple[int, int]]]
    """Of each actor: bytes of its own memory, and of its slice's weights."""
    bare: int
    """Bytes that an actor takes without a model to speak of."""
    reports: list[Any]


def measure(cluster: Any, work: Any, batches: Sequence[int], rounds: int, folder: Path) -> Measured:
    """Send the batches through both chains, in turns; the files that are left are the whole model's."""
    folder.mkdir()
    bed = Bed(cluster, work, folder)
    spec = dataclasses.replace(work.setup.model, path=str(folder.parent / "tiny"), checks="")
    bare = dataclasses.replace(work, setup=dataclasses.replace(work.setup, model=spec))
    empty, _ = Bed(cluster, bare, folder).chain("bare", 1)
    bed.send(empty, batches)
    empty.close()
    chains = {slices: bed.chain(f"slices-{slices}", slices) for slices in (1, 2)}
    for chain, _ in chains.values():
        bed.send(chain, batches[:4])
    seconds: dict[int, list[float]] = {slices: [] for slices in chains}
    reports: list[Any] = []
    for _ in range(rounds):
        for slices, (chain, _) in chains.items():
            spent, reports = bed.send(chain, batches)
            seconds[slices].append(spent)
            print(f"chain of {slices}: {spent:.1f} s", file=sys.stderr, flush=True)
    peaks = {
        slices: [(bed.peak(f"slices-{slices}", n), weights) for n, weights in enumerate(plan.weights)]
        for slices, (_, plan) in chains.items()
    }
    for chain, _ in chains.values():
        chain.close()
    return Measured(seconds, peaks, bed.peak("bare", 0), reports)


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of words, one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<pad>", "<eos>", "<unk>", *WORDS, *"ABCD.?:", "Question", "Answer", *map(str, range(10))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def save_rows(path: Path, count: int) -> None:
    """Write questions of 20 to 100 words."""
    rng = random.Random(0)
    rows = []
    for number in range(count):
        text = " ".join(rng.choices(WORDS, k=rng.randrange(20, 100)))
        row = {"id": str(number), "question": f"{text} {number}?", "choices": rng.sample(WORDS, 4), "answer": "A"}
        rows.append(json.dumps(row) + "\n")
    path.write_text("".join(rows))


def show(bench: Bench, found: Measured, questions: int) -> None:
    """Print the tables and set the gates."""
    rates = {slices: questions / statistics.median(values) for slices, values in found.seconds.items()}
    table(
        ["chain of", "s, each round", "questions/s (median)", "times"],
        [
            [slices, ", ".join(f"{v:.1f}" for v in found.seconds[slices]), f"{rate:.2f}", f"{rate / rates[1]:.2f}"]
            for slices, rate in rates.items()
        ],
    )
    print(f"\nAn actor without a model to speak of: {found.bare / 1e9:.3f} GB of its own.\n")
    rows, worst = [], 0.0
    for slices, actors in found.peaks.items():
        for number, (peak, weights) in enumerate(actors):
            own = (peak - found.bare) / weights
            worst = max(worst, own)
            shown = [f"{value / 1e9:.3f}" for value in (weights, peak, peak - found.bare)]
            rows.append([f"{number + 1} of {slices}", *shown, f"{own:.3f}"])
    table(["slice", "weights, GB", "peak of its own, GB", "less the bare actor's", "of its weights"], rows)
    bench.figures |= {"questions_per_second": rates, "seconds": found.seconds, "memory_of_share": worst}
    bench.gate("a chain of 2 against one of 1, questions/s", rates[2] / rates[1], "at least", 1.7, "1.9")
    bench.gate("an actor's own memory beside a bare one's, of its share", worst, "at most", 1.15, "1.1")


def main() -> int:
    """Measure, print the tables and the gates."""

    def more(parser: Any) -> None:
        parser.add_argument("--questions", type=int, default=240)
        parser.add_argument("--rounds", type=int, default=2)
        parser.add_argument("--batch-tokens", type=int, default=512)

    chosen = options(__doc__ or "", more)
    from roma_ray.cluster.ray_cluster import open_cluster
    from roma_ray.config.loading import load_config
    from roma_ray.engine.progress import Silence
    from roma_ray.engine.runners import Runners
    from roma_ray.engine.setup import resolve
    from roma_ray.runs.pipeline import run

    bench, found = Bench("chain"), []
    with tempfile.TemporaryDirectory() as place:
        model, _ = (save_model(Path(place) / name, **sizes) for name, sizes in (("model", {}), ("tiny", TINY)))
        save_tokenizer(model)
        save_rows(Path(place) / "questions.jsonl", chosen.questions)
        config = load_config(
            None,
            [
                f"model.path={model}",
                f"storage={place}/storage",
                f"questions.sources=[{{path: {place}/questions.jsonl}}]",
                "questions.prompt={format: letter, max_tokens: 512}",
                f"extraction.batch_tokens={chosen.batch_tokens}",
                "device=cpu",
            ],
        )
        with open_cluster(config, "new", print) as cluster:
            cluster.connect()

            def measuring(work: Any, batches: Sequence[int]) -> Iterator[Any]:
                found.append(measure(cluster, work, batches, chosen.rounds, Path(place) / "measured"))
                yield from found[0].reports

            stage = run(resolve(config), Silence(), Runners(extract=measuring), until="extract").stages["extract"]
            facts = stage.manifest()["facts"]
    print(
        f"{machine()}\n{facts['rows']} questions, {facts['tokens']:,} tokens in {facts['batches']} planned batches; "
        f"{chosen.rounds} rounds\n"
    )
    show(bench, found[0], facts["rows"])
    return bench.finish(chosen.json)


if __name__ == "__main__":
    sys.exit(main())
