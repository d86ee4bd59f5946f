"""Make worlds of some seeds and judge every way of training on them: the table of docs/control.md.

    python jobs/judge_planted_worlds.py --seeds 2 3 4 --out worlds

Each seed gives one merged model, run with two experts a token and with one; settings are those of configs/planted.yaml and of
the control, and nothing is chosen here. Three seeds take about half an hour on two cores. What is finished is not made again.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
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
from roma_ray.borders.text import with_error  # noqa: E402
from roma_ray.config.loading import load_config  # noqa: E402
from roma_ray.config.schema import Config  # noqa: E402
from roma_ray.engine.progress import Progress, Silence  # noqa: E402
from roma_ray.runs.control import ARMS, Arm, train_arms  # noqa: E402

KL = {"RoMA, distance kl": ("finetune.regularizer.distance=kl",)}
REGIMES = {2: ROOT / "configs" / "planted.yaml", 1: assets_path() / "control.yaml"}
"""Experts of a token -> the frozen settings."""
Judged = tuple[np.ndarray, Mapping[str, Arm]]


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
    ]
    return load_config(REGIMES[top_k], overrides)


def table(judged: Mapping[int, Judged], rooms: Mapping[int, Path]) -> list[str]:
    """Gains over base in points, by seed and together: the mean over seeds, its error over seeds, and that over questions."""
    seeds = list(judged)
    lines = ["| trained by | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | error over seeds |"]
    lines.append("| --- |" + " --- |" * (len(seeds) + 2))
    bases = [100 * float(base.mean()) for base, _ in judged.values()]
    lines.append("| *base, %* | " + " | ".join(f"{value:.1f}" for value in bases) + f" | {np.mean(bases):.1f} | |")
    room = [
        json.loads((rooms[seed] / "room.json").read_text())["test"]["domain expert at the last token"] for seed in seeds
    ]
    told = [with_error(r["room"], r["standard_error"], scale=1, digits=1, signed=True) for r in room]
    lines.append(
        "| *room at the last token* | " + " | ".join(told) + f" | {np.mean([r['room'] for r in room]):+.1f} | |"
    )
    for name in next(iter(judged.values()))[1]:
        arms = [arms[name] for _, arms in judged.values()]
        cells = [
            "not trained" if a.paired is None else _gain(a.paired.difference, a.paired.difference_stderr) for a in arms
        ]
        gains = [a.paired.difference for a in arms if a.paired is not None]
        if len(gains) == len(arms) > 1:
            errors = [a.paired.difference_stderr for a in arms if a.paired is not None]
            over_seeds = 100 * float(np.std(gains, ddof=1)) / len(gains) ** 0.5
            cells += [_gain(float(np.mean(gains)), float(np.linalg.norm(errors)) / len(errors)), f"{over_seeds:.1f}"]
        else:
            cells += ["", ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _gain(value: float, error: float) -> str:
    return with_error(value, error, scale=100, digits=1, signed=True)


def judge(seeds: Sequence[int], top_k: int, out: Path, progress: Progress) -> list[str]:
    """The table of one regime."""
    folders = {seed: world(seed, top_k, out) for seed in seeds}
    judged = {s: train_arms(settings(top_k, folder, out), ARMS | KL, progress) for s, folder in folders.items()}
    return table(judged, folders)


def main() -> None:
    """Parse the command line, make the worlds and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", required=True, help="seeds of worlds")
    parser.add_argument("--out", type=Path, required=True, help="folder for worlds and storage")
    arguments = parser.parse_args()
    for top_k, title in ((2, "two experts a token"), (1, "one expert a token, its weight scaled to 1")):
        print(
            f"\n### {title}\n",
            *judge(list(dict.fromkeys(arguments.seeds)), top_k, arguments.out, Silence()),
            sep="\n",
            flush=True,
        )


if __name__ == "__main__":
    main()
