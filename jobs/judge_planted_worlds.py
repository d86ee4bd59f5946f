"""Make worlds of some seeds and judge every way of training and every method on them: the tables of docs/control.md.

    python jobs/judge_planted_worlds.py --seeds 2 3 4 --out worlds

Each seed gives one merged model, run with two experts a token and with one; settings are those of the embedded default and of
the control. Of each regime there are two tables: RoMA with its controls, where nothing is chosen, and the methods of `roma-ray
baselines`, whose learning rate each world's own validation questions choose. What is finished is not made again.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from roma_ray.cluster.environment import quiet_libraries  # noqa: E402

# Before the libraries that it quiets.
quiet_libraries()

from planted_world.assemble import build  # noqa: E402
from planted_world.recipe import Recipe  # noqa: E402

from roma_ray.assets import assets_path  # noqa: E402
from roma_ray.baselines.method_registry import METHODS  # noqa: E402
from roma_ray.baselines.method_runs import read_failure  # noqa: E402
from roma_ray.borders.text import with_error  # noqa: E402
from roma_ray.config.loading import load_config  # noqa: E402
from roma_ray.config.schema import Config  # noqa: E402
from roma_ray.engine.answers import ANSWERS, read_answers  # noqa: E402
from roma_ray.engine.progress import Progress, Silence  # noqa: E402
from roma_ray.engine.setup import resolve  # noqa: E402
from roma_ray.errors import UnmovedError  # noqa: E402
from roma_ray.evaluation.statistics import holm, mcnemar, p_value, pair  # noqa: E402
from roma_ray.runs.control import ARMS, Arm, train_arms  # noqa: E402
from roma_ray.runs.method_comparison import compare  # noqa: E402
from roma_ray.store.artifacts import Stage  # noqa: E402

KL: dict[str, tuple[str, ...]] = {"RoMA, distance kl": ("finetune.regularizer.distance=kl",)}
REGIMES = {2: assets_path() / "demo.yaml", 1: assets_path() / "control.yaml"}
"""Experts of a token -> the frozen settings."""
GRID = (1e-4, 1e-3, 5e-3, 2.5e-2, 1e-1)
"""Learning rates of all methods that train, set by validation accuracy on the world of seed 0."""
Judged = tuple[np.ndarray, Mapping[str, Arm]]


@dataclass(frozen=True)
class Compared:
    """All methods on one world."""

    judged: Judged
    rates: Mapping[str, float]
    """The learning rate that validation chose, of those that train."""
    oracle: tuple[float, float] | None
    """What the oracle gains beyond what its control does, with its error; None where neither had a gradient to follow."""


def world(seed: int, top_k: int, out: Path) -> Path:
    """The folder of one world, made where it is not there."""
    folder = out / f"seed-{seed}-top-{top_k}"
    recipe = Recipe(seed=seed, top_k=top_k)
    # Written last but for its README.
    if not (folder / "recipe.json").exists():
        build(folder, recipe, None if top_k == 2 else world(seed, 2, out))
    if json.loads((folder / "recipe.json").read_text()) != asdict(recipe):
        sys.exit(f"{folder} is of another recipe: give another --out, or remove it")
    return folder


def settings(top_k: int, folder: Path, out: Path) -> Config:
    """The regime's configuration on a world."""
    sources = [{"path": str(folder / "questions" / f"{split}.jsonl")} for split in ("train", "test")]
    overrides = [
        f"model.path={folder / 'model'}",
        f"questions.sources={json.dumps(sources)}",
        f"storage={out / 'storage'}",
        f"baselines.learning_rates={json.dumps(GRID)}",
        # It is an arm of its own here.
        "evaluation.task_loss_alone=false",
    ]
    return load_config(REGIMES[top_k], overrides)


def table(
    judged: Mapping[int, Judged], rooms: Mapping[int, Path], columns: Mapping[str, Mapping[str, str]] | None = None
) -> list[str]:
    """Gains over base in points, by seed and together: the mean over seeds, its error over questions, and that over seeds.

    `columns`: further ones by heading, each a cell by arm.
    """
    seeds, columns = list(judged), columns or {}
    lines = [_line(["trained by", *(f"seed {seed}" for seed in seeds), "mean", "error over seeds", *columns])]
    lines.append("| --- |" + " --- |" * (len(seeds) + 2 + len(columns)))
    blank = [""] * (1 + len(columns))
    bases = [100 * float(base.mean()) for base, _ in judged.values()]
    lines.append(_line(["*base, %*", *(f"{value:.1f}" for value in bases), f"{np.mean(bases):.1f}", *blank]))
    room = [
        json.loads((rooms[seed] / "room.json").read_text())["test"]["domain expert at the last token"] for seed in seeds
    ]
    told = [with_error(r["room"], r["standard_error"], scale=1, digits=1, signed=True) for r in room]
    lines.append(_line(["*room at the last token*", *told, f"{np.mean([r['room'] for r in room]):+.1f}", *blank]))
    for name in next(iter(judged.values()))[1]:
        paired = [arms[name].paired for _, arms in judged.values()]
        cells = _cells([None if p is None else (p.difference, p.difference_stderr) for p in paired])
        lines.append(_line([name, *cells, *(column.get(name, "") for column in columns.values())]))
    return lines


def _cells(gains: Sequence[tuple[float, float] | None]) -> list[str]:
    """Gains with their errors, their mean with its own, and the mean's error over the seeds; these where no gain is missing."""
    cells = ["not trained" if gain is None else _gain(*gain) for gain in gains]
    known = [gain for gain in gains if gain is not None]
    if not len(known) == len(gains) > 1:
        return [*cells, "", ""]
    values, errors = zip(*known, strict=True)
    over_seeds = 100 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return [*cells, _gain(float(np.mean(values)), float(np.linalg.norm(errors)) / len(errors)), f"{over_seeds:.1f}"]


def _gain(value: float, error: float) -> str:
    return with_error(value, error, scale=100, digits=1, signed=True)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def methods_table(compared: Mapping[int, Compared], rooms: Mapping[int, Path]) -> list[str]:
    """As `table`, with the learning rates that were chosen and p of a difference to base, over all worlds' questions.

    p: McNemar's exact test, corrected by Holm for the number of methods that see no label. One that was not trained differs
    nowhere.
    """
    worlds = list(compared.values())
    base = np.concatenate([c.judged[0] for c in worlds])
    names = list(worlds[0].judged[1])
    usable = [name for name in names if not METHODS[name].sees_labels]
    right = {name: np.concatenate([c.judged[1][name].right for c in worlds]) for name in usable}
    p = holm({name: mcnemar(base, right[name]) for name in usable})
    rates = {name: ", ".join(f"{c.rates[name]:g}" if name in c.rates else "–" for c in worlds) for name in names}
    columns = {
        "p (Holm)": {name: p_value(p[name]) for name in usable},
        "learning rates": {name: text if text.strip("–, ") else "" for name, text in rates.items()},
    }
    lines = table({seed: c.judged for seed, c in compared.items()}, rooms, columns)
    return [*lines, _line(["*oracle beyond its control*", *_cells([c.oracle for c in worlds]), "", ""])]


def compare_all(config: Config, progress: Progress) -> Compared:
    """Run every method of `roma-ray baselines` with one seed. Exits where one fails for another reason than noise as gradient."""
    found = compare(resolve(config), list(METHODS), 1, progress)
    verdicts = {name: _right(stages[0]) for name, stages in found.methods.items() if name not in found.failures}
    base = verdicts.pop("base")
    arms = {}
    for name in METHODS:
        if name in verdicts:
            arms[name] = Arm(name, pair(base, verdicts[name]), verdicts[name])
        elif name in found.failures:
            failed = read_failure(found.methods[name][0])
            if failed is None or failed["kind"] != UnmovedError.__name__:
                sys.exit(f"{name} failed: {found.failures[name]}")
            arms[name] = Arm(name, None, base, failed["text"])
    rates = {row["name"]: row["learning_rate"] for row in found.summary["methods"] if row.get("learning_rate")}
    oracle = found.summary["oracle"]
    return Compared((base, arms), rates, oracle and (oracle["difference"], oracle["difference_stderr"]))


def _right(stage: Stage) -> np.ndarray:
    return np.asarray(read_answers(stage.path / ANSWERS, "test").column("correct").to_pylist())


def judge(seeds: Sequence[int], top_k: int, out: Path, progress: Progress) -> tuple[list[str], list[str]]:
    """The two tables of one regime: RoMA with its controls, and all methods."""
    folders = {seed: world(seed, top_k, out) for seed in seeds}
    configs = {seed: settings(top_k, folder, out) for seed, folder in folders.items()}
    arms = table({seed: train_arms(config, ARMS | KL, progress) for seed, config in configs.items()}, folders)
    return arms, methods_table({seed: compare_all(config, progress) for seed, config in configs.items()}, folders)


def main() -> None:
    """Parse the command line, make the worlds and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", required=True, help="seeds of worlds")
    parser.add_argument("--out", type=Path, required=True, help="folder for worlds and storage")
    arguments = parser.parse_args()
    for top_k, title in ((2, "two experts a token"), (1, "one expert a token, its weight scaled to 1")):
        arms, methods = judge(list(dict.fromkeys(arguments.seeds)), top_k, arguments.out, Silence())
        print(f"\n### {title}: RoMA and its controls\n", *arms, sep="\n")
        print(f"\n### {title}: all methods\n", *methods, sep="\n", flush=True)


if __name__ == "__main__":
    main()
