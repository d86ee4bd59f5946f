"""Which settings each command reads: one that was given and is not read is said, not swallowed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from roma_ray.config.loading import given_settings
from roma_ray.config.schema import EMBEDDED, Config
from roma_ray.engine.identity import idle_settings

_ALL = ("name", "seed", "device", "threads", "storage", "reuse")
_PASS = ("model", "questions", "routing", "extraction")
_WORK = {
    "extract": _PASS,
    "embed": (*_PASS, "embedding"),
    "neighbors": (*_PASS, "embedding", "neighbors"),
    "finetune": (*_PASS, "embedding", "neighbors", "finetune"),
}
_BESIDE = "evaluation.task_loss_alone"
# Command -> the sections and settings that it reads besides `_ALL`.
_READS: dict[str, tuple[str, ...]] = {
    **{stage: (*sections, "tracking", "ray") for stage, sections in _WORK.items()},
    **dict.fromkeys(("tune", "verdict"), (*_WORK["finetune"], "tracking", "ray")),
    **dict.fromkeys(
        ("run", "evaluate", "report", "track", "explain"), (*_WORK["finetune"], _BESIDE, "tracking", "ray")
    ),
    "local": (*_WORK["finetune"], _BESIDE, "tracking"),
    "baselines": (*_WORK["finetune"], "baselines", "tracking", "ray"),
    "evaluate --tasks": (*_WORK["finetune"], "evaluation", "tracking", "ray"),
    # Of a model that no run tunes, the prompt serves tasks that are question files.
    "evaluate --adapter": ("model", "questions.prompt", "evaluation", "tracking", "ray"),
    "control": _WORK["finetune"],
    "repair": (*_WORK["finetune"], "ray"),
    "routing": _PASS,
    "compare": ("tracking",),
}
_STAGE_OF_RAY = {
    "extract": ("ray.extract_workers", "ray.extract"),
    "embed": ("ray.embed_workers", "ray.embed"),
    "finetune": ("ray.finetune_workers", "ray.finetune"),
    "evaluate": ("ray.evaluate_workers", "ray.evaluate"),
    "baselines": ("ray.baselines_workers",),
}
_UP_TO_NEIGHBORS = tuple(n for stage in ("finetune", "evaluate", "baselines") for n in _STAGE_OF_RAY[stage])
_UP_TO_FINETUNE = tuple(n for stage in ("evaluate", "baselines") for n in _STAGE_OF_RAY[stage])
# Command -> what it leaves aside of the sections that it reads.
_NOT: dict[str, tuple[str, ...]] = {
    "extract": (*_STAGE_OF_RAY["embed"], *_UP_TO_NEIGHBORS),
    "embed": _UP_TO_NEIGHBORS,
    "neighbors": _UP_TO_NEIGHBORS,
    **dict.fromkeys(("finetune", "run", "evaluate", "tune", "verdict", "repair"), _UP_TO_FINETUNE),
    # Every method's learning rate comes from one grid, its micro-batches from `baselines`.
    "baselines": (
        *("finetune.learning_rate", "finetune.micro_batch_size", "finetune.checkpoint_steps"),
        *(*_STAGE_OF_RAY["finetune"], *_STAGE_OF_RAY["evaluate"]),
    ),
    "evaluate --tasks": (_BESIDE, *_STAGE_OF_RAY["baselines"]),
    "evaluate --adapter": (
        _BESIDE,
        *(n for stage in ("extract", "embed", "finetune", "baselines") for n in _STAGE_OF_RAY[stage]),
    ),
}


def unused(
    command: str, config: Config, overrides: Sequence[str], *, file: bool, without: Sequence[str] = ()
) -> list[str]:
    """Sentences about the settings that were given and do nothing here.

    Given are those of `--set`, and of a configuration `file` those that are not at their default. `without` names sections
    that the command's own options turn off.
    """
    given = given_settings(config)
    named = [override.partition("=")[0].strip() for override in overrides]
    said = [
        name
        for name, differs in given.items()
        if (file and differs) or any(_within(name, part) or _within(part, name) for part in named)
    ]
    idle = {name: why for name, why in idle_settings(config).items() if name in said}
    reads, leaves = (*_ALL, *_READS[command]), (*_NOT.get(command, ()), *without)
    unread = sorted(n for n in said if not _any(n, reads) or _any(n, leaves))
    prompt = config.questions.prompt
    lines = [f"`roma-ray {command}` does not use {', '.join(unread)}"] if unread else []
    lines += [f"{name} does nothing here: {why}" for name, why in sorted(idle.items()) if name not in unread]
    if config.model.path == EMBEDDED and prompt.format == "letter" and "questions.prompt.format" not in unread:
        lines.append(
            "the embedded model knows no lettered choices: with questions.prompt.format letter it answers at chance level"
        )
    return lines


def _within(name: str, section: str) -> bool:
    return name == section or name.startswith(f"{section}.")


def _any(name: str, sections: Iterable[str]) -> bool:
    return any(_within(name, section) for section in sections)
