"""The positive control: a world in which better routing is known to help, and which the manifold term alone can reach.

Its model takes one expert a token and scales that one's weight to 1, so the task loss has no gradient on the gates. What
moves them is eq. 7. If the method works, RoMA gains there; a pull to random successes, to another question's neighborhood
or to a question's own routing must not. Whoever breaks the method anywhere between the questions and the figures is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from roma_ray.config.loading import with_overrides
from roma_ray.config.schema import Config
from roma_ray.engine.progress import Progress
from roma_ray.engine.setup import resolve
from roma_ray.errors import ConfigError, GuardError, IdenticalError, UnmovedError
from roma_ray.evaluation.measures import MEASURES, RULES
from roma_ray.evaluation.results_file import read_judged
from roma_ray.evaluation.statistics import Paired, changes, holm, p_value, pair, significant
from roma_ray.runs.pipeline import run

ROMA = "RoMA"
ARMS: dict[str, tuple[str, ...]] = {
    ROMA: (),
    "lambda = 0": ("finetune.regularizer.kind=none",),
    "random successes": ("neighbors.method=random",),
    "another question's neighbors": ("neighbors.method=shuffled",),
    "its own routing": ("neighbors.method=self",),
}
"""What is trained, each with the settings in which it differs from the control's configuration."""
_LEVEL = 0.01
"""Of RoMA's gain. The others' levels are the project's, corrected for their number."""


@dataclass(frozen=True)
class Arm:
    """One way of training, judged on the test questions against the base model."""

    name: str
    paired: Paired | None
    """None where nothing could be trained."""
    right: np.ndarray
    """Verdicts of the tuned routers, in the order of the test questions; the base's where nothing was trained."""
    reason: str = ""
    """Why nothing could be trained."""


@dataclass(frozen=True)
class Statement:
    """One statement that the control makes, and whether it holds."""

    text: str
    p: float
    holds: bool


@dataclass(frozen=True)
class Control:
    """The control's outcome: its arms, and what was checked of them."""

    base: np.ndarray
    """Verdicts of the base model."""
    arms: Mapping[str, Arm]
    checks: Sequence[Statement]

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(check.holds for check in self.checks)

    def rows(self) -> list[tuple[str, ...]]:
        """One arm a row: name, n, base, tuned, difference, one-sided p of a gain."""
        return [
            (arm.name, *("–" for _ in range(5)))
            if arm.paired is None
            else (
                arm.name,
                str(arm.paired.n),
                *(MEASURES["acc"].figure(arm.paired.plain(), which) for which in ("base", "tuned", "difference")),
                p_value(gains(self.base, arm.right)),
            )
            for arm in self.arms.values()
        ]

    def words(self) -> list[str]:
        """What was not trained and why, each check, and the verdict."""
        lines = [f"{arm.name}: not trained. {arm.reason}" for arm in self.arms.values() if arm.paired is None]
        lines += [f"{'holds' if c.holds else 'FAILS'}: {c.text} (one-sided p {p_value(c.p)})" for c in self.checks]
        return [*lines, f"control: {'passed' if self.passed else 'FAILED'}"]

    def plain(self) -> dict[str, Any]:
        """As data: {passed, arms {name: paired figures or {reason}}, checks [{text, p, holds}]}."""
        return {
            "passed": self.passed,
            "arms": {
                name: {"reason": arm.reason} if arm.paired is None else arm.paired.plain()
                for name, arm in self.arms.items()
            },
            "checks": [{"text": c.text, "p": c.p, "holds": c.holds} for c in self.checks],
        }


def control(config: Config, progress: Progress) -> Control:
    """Train every arm of the control's configuration on one extraction, in this process, and judge them.

    Raises what the stages raise (RomaError), ConfigError where RoMA would be trained as one of its controls is, GuardError where
    nothing at all could be trained.
    """
    for name, overrides in ARMS.items():
        if name != ROMA and overrides and with_overrides(config, overrides) == config:
            raise ConfigError(
                f'{", ".join(overrides)} is what the control "{name}" is trained with, beside {ROMA}: leave that setting out'
            )
    base, arms = train_arms(config, ARMS, progress)
    return Control(base, arms, checks_of(arms, base))


def train_arms(
    config: Config, settings: Mapping[str, Sequence[str]], progress: Progress
) -> tuple[np.ndarray, dict[str, Arm]]:
    """The base model's verdicts on the test questions, and each arm: the configuration with its settings on top."""
    base: np.ndarray | None = None
    arms: dict[str, Arm] = {}
    for name, overrides in settings.items():
        progress.say(f"{name}:")
        try:
            finished = run(resolve(with_overrides(config, overrides)), progress)
        except (UnmovedError, IdenticalError) as error:
            # Nothing to follow, or nothing that changed an answer's likelihood. What failed otherwise proves nothing.
            arms[name] = Arm(name, None, np.array([]), str(error))
            progress.say(f"nothing was trained: {error}")
            continue
        judged = read_judged(finished.stages["evaluate"].path)
        base, right = (judged.values(which)[RULES[judged.asked.rule]] == 1 for which in ("base", "tuned"))
        arms[name] = Arm(name, pair(base, right), right)
    if base is None:
        raise GuardError(
            "nothing could be trained: neither the manifold term nor any other moved a gate. Leave out the settings that were "
            "given; with none of them this is a fault of the program or of its installation"
        )
    return base, {n: arm if arm.paired else Arm(n, None, base, arm.reason) for n, arm in arms.items()}


def checks_of(arms: Mapping[str, Arm], base: np.ndarray) -> list[Statement]:
    """RoMA gains; no control does; RoMA is above each. One-sided exact tests on the same questions, the controls' by Holm."""
    roma = arms[ROMA]
    gain = gains(base, roma.right)
    checks = [Statement(f"{ROMA} gains over base", gain, roma.paired is not None and significant(gain, _LEVEL))]
    others = [name for name in arms if name != ROMA]
    gained = holm({name: gains(base, arms[name].right) for name in others})
    above = holm({name: gains(arms[name].right, roma.right) for name in others})
    checks += [Statement(f"{name} does not gain", gained[name], not significant(gained[name])) for name in others]
    checks += [Statement(f"{ROMA} is above {name}", above[name], significant(above[name])) for name in others]
    return checks


def gains(before: np.ndarray, after: np.ndarray) -> float:
    """One-sided exact McNemar p of the second answering more of the same questions rightly; 1 where none differ."""
    from scipy.stats import binomtest

    lost, won = changes(before, after)
    return float(binomtest(won, won + lost, 0.5, alternative="greater").pvalue) if won + lost else 1.0
