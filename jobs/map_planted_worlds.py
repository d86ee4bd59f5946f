"""When does the manifold term help? Every level of a space file, trained in every way, on the worlds of some seeds: docs/map.md.

    python jobs/map_planted_worlds.py --seeds 2 3 4 --space configs/map.yaml --out worlds

Each seed gives one merged model and what the space varies of it. For each level RoMA and the task loss alone (lambda = 0), for
some the controls, and where the model is another dense backprop at the same learning rate, judged on the same test questions, which
are pooled over the seeds. What is finished is not made again.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from roma_ray.cluster.environment import quiet_libraries  # noqa: E402

# Before the libraries that it quiets.
quiet_libraries()

from planted_world.variants import make_variants  # noqa: E402

from roma_ray.ablations.space import Space, Trial, load_space  # noqa: E402
from roma_ray.baselines.method_runs import read_failure, run_methods  # noqa: E402
from roma_ray.borders.text import with_error  # noqa: E402
from roma_ray.config.loading import parse_config, with_overrides  # noqa: E402
from roma_ray.config.schema import Config  # noqa: E402
from roma_ray.engine.answers import ANSWERS, read_answers  # noqa: E402
from roma_ray.engine.progress import Progress, Silence  # noqa: E402
from roma_ray.engine.question_table import matrix, read_table, table_facts  # noqa: E402
from roma_ray.engine.runners import LOCAL  # noqa: E402
from roma_ray.engine.setup import resolve  # noqa: E402
from roma_ray.evaluation.equivalence import Finding, findings, pooled  # noqa: E402
from roma_ray.evaluation.results_file import RESULTS  # noqa: E402
from roma_ray.evaluation.statistics import Paired, p_value  # noqa: E402
from roma_ray.runs.control import ARMS, ROMA, train_arms  # noqa: E402
from roma_ray.runs.pipeline import locate, run  # noqa: E402

TASK = "lambda = 0"
DENSE = "dense backprop"
CONTROLS = ("random successes", "another question's neighbors")
MARGIN = 0.015
"""Share of the questions that counts as nothing: under a quarter of what either term gains over base at the centre
(docs/control.md), and what 2,700 questions can show."""

COMPARED = frozenset({"length of the gates", "experts a token"})
"""Factors whose levels have another model: there, and at the centre, dense backprop is trained too."""
CONTROLLED = COMPARED | {"labels", "weight of the term", "choices"}
"""Factors whose levels, and the centre, are trained with the controls too: the others vary what the controls do not have."""


@dataclass(frozen=True)
class Answered:
    """Verdicts on one world's test questions at one level."""

    base: np.ndarray
    right: Mapping[str, np.ndarray]
    """By arm; the base's where nothing was trained."""
    untrained: Mapping[str, str]
    """Why an arm was not trained."""
    facts: Mapping[str, float]
    """What the routing is like (`routing_facts`)."""


def placed(config: Config, folder: Path, storage: Path) -> Config:
    """The configuration with its paths below a world's folder."""
    data = config.model_dump(mode="json")
    data["model"]["path"] = str(folder / config.model.path)
    for source in data["questions"]["sources"]:
        source["path"] = str(folder / source["path"])
    return parse_config({**data, "storage": str(storage)}, str(folder))


def without_term(config: Config, centre: Config) -> Config:
    """The configuration with the centre's neighbors, tokens and term: what does not act without the term is not varied."""
    finetune = config.finetune.model_copy(update={"regularizer": centre.finetune.regularizer})
    routing = config.routing.model_copy(update={"tokens": centre.routing.tokens})
    return config.model_copy(update={"neighbors": centre.neighbors, "finetune": finetune, "routing": routing})


def dense_backprop(config: Config, progress: Progress) -> tuple[np.ndarray | None, str]:
    """The verdicts of dense backprop at the configured learning rate, or why there are none."""
    rate = config.baselines.model_copy(update={"learning_rates": (config.finetune.learning_rate,)})
    setup = resolve(config.model_copy(update={"baselines": rate}))
    stages = run(setup, progress, until="neighbors", states=True).stages
    [stage] = run_methods(setup, stages, ["dense_backprop"], 1, LOCAL.baselines, progress)["dense_backprop"]
    if failure := read_failure(stage):
        return None, f"{failure['kind']}: {failure['text']}"
    return np.array(read_answers(stage.path / ANSWERS, "test").column("correct").to_pylist()), ""


def task_alone(centre: Config) -> tuple[str, ...]:
    """Settings of the task loss alone: with the centre's neighbors and tokens, so that one training serves where these vary."""
    neighbors = [f"neighbors.{name}={json.dumps(value)}" for name, value in centre.neighbors.model_dump().items()]
    return (*ARMS[TASK], f"routing.tokens={centre.routing.tokens}", *neighbors)


def answer(
    config: Config, centre: Config, progress: Progress, *, dense: bool = True, controls: bool = True
) -> Answered:
    """Train and judge both arms of one level on one world, with `dense` dense backprop and with `controls` the controls too."""
    settings = {
        ROMA: ARMS[ROMA],
        TASK: task_alone(centre),
        **({name: ARMS[name] for name in CONTROLS} if controls else {}),
    }
    base, arms = train_arms(config, settings, progress)
    right = {name: arm.right for name, arm in arms.items()}
    untrained = {name: arm.reason for name, arm in arms.items() if arm.paired is None}
    if dense:
        answered, reason = dense_backprop(without_term(config, centre), progress)
        right[DENSE] = base if answered is None else answered
        untrained |= {DENSE: reason} if reason else {}
    trained = {name: settings[name] for name in (ROMA, TASK) if name not in untrained}
    return Answered(base, right, untrained, routing_facts(config, centre, trained))


def routing_facts(config: Config, centre: Config, arms: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Of finished arms: the share of successes, lambda, and how sure routing is on the test questions, before and after each.

    `sure` is the largest weight of a routing row, its mean over tuned layers and questions; of arms that pull another token's row
    than the centre's it is none.
    """
    facts = {}
    for name, overrides in arms.items():
        setup = resolve(with_overrides(config, overrides))
        stages = locate(setup)
        if name == ROMA:
            near = stages["neighbors"].manifest()["facts"]
            facts["successes"] = near["successful"] / near["training"]
            facts["lambda"] = stages["finetune"].manifest()["facts"]["probe"]["weight"]
        if setup.config.routing.tokens == centre.routing.tokens:
            table = read_table(stages["evaluate"].path / RESULTS, ["base_routing", "tuned_routing"])
            shape = (len(table), table_facts(table)["layers"], table_facts(table)["experts"])
            base, tuned = (
                matrix(table, f"{who}_routing", shape[1] * shape[2]).reshape(shape) for who in ("base", "tuned")
            )
            facts |= {"sure": float(base.max(2).mean()), f"sure, {name}": float(tuned.max(2).mean())}
    return facts


def level_name(trial: Trial) -> str:
    """`factor: level`; the centre has no level of its own."""
    return "centre" if trial.centre else ", ".join(f"{factor}: {level}" for factor, level in trial.factors)


def compared(worlds: Sequence[Answered], tuned: str, before: str | None = None) -> Paired:
    """An arm less another, or less the base, over the questions of all worlds."""
    return pooled((w.base if before is None else w.right[before], w.right[tuned]) for w in worlds)


def words(finding: Finding, *, task_trains: bool = True) -> str:
    """What the manifold term does beside the task loss."""
    points = f"{100 * finding.margin:g} points"
    text = {
        "better": "adds",
        "worse": "harms",
        "equivalent": f"equals it within {points}",
        "unresolved": "not resolved" + (f": about {finding.needed:,} questions would" if finding.needed else ""),
    }[finding.kind]
    if finding.within and finding.kind in ("better", "worse"):
        text += f", by less than {points}"
    return text if task_trains else f"{text} (the task loss trains nothing)"


def page(levels: Mapping[str, Sequence[Answered]], margin: float) -> list[str]:
    """The tables and the map in words, in Markdown."""
    found = findings({name: compared(worlds, ROMA, TASK) for name, worlds in levels.items()}, margin)
    said = {
        name: words(finding, task_trains=not any(TASK in w.untrained for w in levels[name]))
        for name, finding in found.items()
    }
    lines = ["| level | base % | λ = 0 | RoMA | RoMA − (λ = 0) | p of a difference | p of the margin | the term |"]
    lines.append("| --- " * 8 + "|")
    for name, worlds in levels.items():
        finding, (task, roma) = found[name], (compared(worlds, arm) for arm in (TASK, ROMA))
        gains = [_gain(worlds, TASK, task), _gain(worlds, ROMA, roma), _points(finding.paired)]
        tests = [p_value(finding.difference_p), p_value(finding.equivalence_p)]
        lines.append(f"| {name} | {100 * roma.base:.1f} | {' | '.join([*gains, *tests, said[name]])} |")
    lines += [
        "",
        "| level | dense backprop | dense backprop − (λ = 0) | random successes | another question's neighbors |",
    ]
    lines.append("| --- " * 5 + "|")
    for name, worlds in levels.items():
        others = [(DENSE, None), (DENSE, TASK), *((control, None) for control in CONTROLS)]
        cells = [_gain(worlds, arm, compared(worlds, arm, b)) if arm in worlds[0].right else "" for arm, b in others]
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *facts_table(levels), ""]
    for kind, title in (
        ("better", "adds"),
        ("equivalent", "equals"),
        ("worse", "harms"),
        ("unresolved", "not resolved"),
    ):
        names = [name for name, finding in found.items() if finding.kind == kind]
        lines.append(f"- {title}: {'; '.join(names) or 'nowhere'}")
    for name, worlds in levels.items():
        for arm, reason in {arm: why for w in worlds for arm, why in w.untrained.items()}.items():
            lines.append(f"- {name}, {arm}: not trained. {reason}")
    return lines


def facts_table(levels: Mapping[str, Sequence[Answered]]) -> list[str]:
    """What the routing is like at each level, the mean over the worlds."""
    lines = ["| level | successes % | λ | largest weight of a row, base | λ = 0 | RoMA |", "| --- " * 6 + "|"]
    keys = ("sure", f"sure, {TASK}", f"sure, {ROMA}")
    for name, worlds in levels.items():

        def mean(key: str, worlds: Sequence[Answered] = worlds) -> float | None:
            found = [w.facts[key] for w in worlds if key in w.facts]
            return sum(found) / len(found) if found else None

        successes, weight = mean("successes"), mean("lambda")
        cells = ["" if successes is None else f"{100 * successes:.0f}", "" if weight is None else f"{weight:.1f}"]
        cells += ["" if (value := mean(key)) is None else f"{value:.2f}" for key in keys]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _gain(worlds: Sequence[Answered], arm: str, paired: Paired) -> str:
    count = sum(arm in w.untrained for w in worlds)
    return "not trained" if count == len(worlds) else _points(paired) + (f" ({count} not trained)" if count else "")


def _points(paired: Paired) -> str:
    return with_error(paired.difference, paired.difference_stderr, digits=1, signed=True).replace("-", "−")


def answers(space: Space, seeds: Sequence[int], out: Path) -> dict[str, list[Answered]]:
    """Every level on every world, what is missing trained."""
    for seed in seeds:
        make_variants(out / f"seed-{seed}", seed)
    levels: dict[str, list[Answered]] = {}
    for trial in space.trials:
        name = level_name(trial)
        levels[name] = []
        for seed in seeds:
            config, centre = (placed(c, out / f"seed-{seed}", out / "storage") for c in (trial.config, space.centre))
            dense, controls = (
                trial.centre or not some.isdisjoint(dict(trial.factors)) for some in (COMPARED, CONTROLLED)
            )
            levels[name].append(answer(config, centre, Silence(), dense=dense, controls=controls))
        print(f"{name}: done", file=sys.stderr, flush=True)
    return levels


def main() -> None:
    """Parse the command line, make what is missing and print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", required=True, help="seeds of worlds")
    parser.add_argument("--space", type=Path, default=ROOT / "configs" / "map.yaml", help="what is varied")
    parser.add_argument("--out", type=Path, required=True, help="folder for worlds and storage")
    parser.add_argument(
        "--margin", type=float, default=100 * MARGIN, help="points that count as equal (default: %(default)s)"
    )
    arguments = parser.parse_args()
    seeds, out = list(dict.fromkeys(arguments.seeds)), arguments.out.resolve()
    print(*page(answers(load_space(arguments.space), seeds, out), arguments.margin / 100), sep="\n")


if __name__ == "__main__":
    main()
