"""What acts: the settings that decide a stage's output, and no others, as plain data for fingerprints.

A setting without effect beside the others is left out, so that changing it redoes no work. What only the data can tell
(a `limit` above a file's length, `context` where no question has one, `exact_up_to` above the number of successes) stays in:
doing again what would come out the same costs time, the other mistake costs the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from roma_ray.config.baseline_settings import BaselinesConfig
from roma_ray.config.finetune_settings import (
    DistillConfig,
    FinetuneConfig,
    GuardConfig,
    LogitsConfig,
    RegularizerConfig,
    ScheduleConfig,
)
from roma_ray.config.free_form import FREE, SuccessConfig
from roma_ray.config.schema import Config, NeighborsConfig, PromptConfig
from roma_ray.config.section import Section
from roma_ray.errors import ConfigError

# Settings that came after storages were filled: their defaults stand in no identity.
_YOUNGER_SCHEDULE = ("warmup_steps", "anneal", "anneal_floor")
_YOUNGER_TERM = (*_YOUNGER_SCHEDULE, "distance", "positions", "prior", "entropy_sign", "entropy_target")
_YOUNGER_TUNING = (*_YOUNGER_SCHEDULE, "decay_to", "task_schedule", "logits", "guard", "distill")
_YOUNGER_QUESTIONS = ("splits", "held_out_tasks")
_YOUNGER_METHODS = ("steering", "fragile")
# Of finetuning: which workers hold what.
_PLACES = ("chain", "chain_activations")


def is_cloze(config: Config) -> bool:
    """Whether answers are scored as continuations: of `cloze` questions the choices, of `free` ones the answer."""
    return config.questions.prompt.format != "letter"


def is_free(config: Config) -> bool:
    """Whether the questions have no choices: their answer is one text."""
    return config.questions.prompt.format == FREE


def refuse_free_form(config: Config, what: str) -> None:
    """Raise ConfigError where the questions are free-form and `what` knows multiple choice alone."""
    if is_free(config):
        raise ConfigError(
            f"{what} compares the choices of multiple-choice questions, and questions.prompt.format is free: ask questions with "
            "choices (format letter or cloze). Of free-form questions, `roma-ray run` and `roma-ray local` train and judge."
        )


def refuse_distilled(config: Config, what: str) -> None:
    """Raise ConfigError where the task loss is the distance to a teacher and `what` has task losses of its own."""
    if config.finetune.task_loss == "distill":
        raise ConfigError(
            f"{what} trains by the right answers, and finetune.task_loss is distill: set it to choices. `roma-ray run`, `local` and "
            "`repair` train against a teacher"
        )


def refuse_chain(config: Config, what: str) -> None:
    """Raise ConfigError where the head is to be divided among workers and `what` holds it whole."""
    if config.finetune.chain is not None:
        raise ConfigError(
            f"{what} holds the head whole, and finetune.chain divides it among workers: leave finetune.chain out. `roma-ray run` and "
            "`repair` train and judge over a chain"
        )


def answer_rule(prompt: PromptConfig) -> str:
    """By which score a choice is answered with: `normalized` or `raw`; letters have no length. `greedy` where there are no choices:
    whether each token of the answer is the likeliest.
    """
    if prompt.format == FREE:
        return "greedy"
    return prompt.cloze_score if prompt.format == "cloze" else "raw"


def data_seed(config: Config) -> int:
    """The seed of everything that is drawn from the data: splits, samples, the training fraction."""
    return config.seed if config.questions.seed is None else config.questions.seed


def success_settings(config: Config) -> dict[str, Any]:
    """What decides which free-form questions are answered rightly; nothing of multiple choice, where the choices do."""
    success = config.extraction.success
    return {"success": success.model_dump(mode="json", exclude=set(_idle_success(success)))} if is_free(config) else {}


def writing_settings(config: Config) -> dict[str, Any]:
    """What decides the answers that are written, whichever metric judges them; nothing where none are."""
    success = config.extraction.success
    chosen = success.model_dump(mode="json", include={"max_new_tokens", "stop", "generation_batch"})
    return {"writing": chosen} if is_free(config) and success.writes else {}


def prompt_settings(prompt: PromptConfig) -> dict[str, Any]:
    """What decides a prompt's tokens. By which score its choices are judged is no part of it."""
    return prompt.model_dump(mode="json", exclude={"cloze_score", *_idle_prompt(prompt)})


def neighbors_settings(config: Config) -> dict[str, Any]:
    """What decides S, N and W beside the extraction and the embeddings.

    Neighbors that are drawn, as controls, are so with the run's own seed: they vary with the training. Random ones are weighed
    by their similarity like all others.
    """
    chosen = config.neighbors
    settings = chosen.model_dump(mode="json", exclude={"backend", *_idle_neighbors(chosen)})
    if chosen.method in ("random", "task", "shuffled"):
        settings["seed"] = config.seed
    settings["fraction"] = config.questions.fraction
    if config.questions.held_out_tasks:
        # Their questions are no training questions, nor is a validation question of theirs judged by later stages.
        settings["held_out_tasks"] = sorted(set(config.questions.held_out_tasks))
    if config.questions.fraction < 1:
        settings["fraction_seed"] = data_seed(config)
    return {**settings, **success_settings(config)}


def finetune_settings(config: FinetuneConfig, *, cloze: bool) -> dict[str, Any]:
    """What decides the tuned routers and their curves; how often a checkpoint is written does not, nor who holds which layers."""
    term = config.regularizer
    younger = {
        "task_schedule": (config.task_schedule, _idle_schedule(config.task_schedule, "finetune.task_schedule")),
        "logits": (config.logits, _idle_logits(config.logits)),
    }
    # What a teacher says is another stage, which the training is made of.
    outside = {"checkpoint_steps", "regularizer", "guard", "distill", *_PLACES, *younger}
    outside |= set(_idle_finetune(config, cloze=cloze))
    settings = _aged(config.model_dump(mode="json", exclude=outside), FinetuneConfig, _YOUNGER_TUNING)
    acting = term.model_dump(mode="json", exclude=set(_idle_regularizer(term, config.epochs)))
    settings["regularizer"] = _aged(acting, RegularizerConfig, _YOUNGER_TERM)
    for name, (section, idle) in younger.items():
        own = _aged(section.model_dump(mode="json", exclude=set(idle)), type(section), list(type(section).model_fields))
        settings |= {name: own} if own else {}
    return settings | guard_settings(config) if guard_acts(config) else settings


def guard_settings(config: FinetuneConfig) -> dict[str, Any]:
    """What decides which epochs the guard finds fault with."""
    acting = config.guard.model_dump(mode="json", exclude=set(_idle_guard(config)))
    own = _aged(acting, GuardConfig, list(GuardConfig.model_fields))
    return {"guard": own} if own else {}


def guard_acts(config: FinetuneConfig) -> bool:
    """Whether the guard may change the training. A warning changes no gate and no curve."""
    return config.guard.action == "stop" or (config.guard.action == "halve" and "action" not in _idle_guard(config))


def aged(data: dict[str, Any]) -> dict[str, Any]:
    """A whole configuration's plain data as it was before its youngest settings, wherever those have their defaults.

    Whether the task loss alone is judged beside it decides nothing of the run itself, nor do chains.
    """
    asked, tuned, judged = data["questions"], data["finetune"], data["evaluation"]
    return {
        **data,
        "baselines": _aged(data["baselines"], BaselinesConfig, _YOUNGER_METHODS),
        "questions": {k: v for k, v in asked.items() if v or k not in _YOUNGER_QUESTIONS},
        "finetune": {
            **{k: v for k, v in _aged(tuned, FinetuneConfig, _YOUNGER_TUNING).items() if k not in _PLACES},
            "regularizer": _aged(tuned["regularizer"], RegularizerConfig, _YOUNGER_TERM),
        },
        "extraction": {
            k: v
            for k, v in data["extraction"].items()
            if k != "chain" and (k != "success" or v != SuccessConfig().model_dump(mode="json"))
        },
        "evaluation": {name: value for name, value in judged.items() if name != "task_loss_alone"},
    }


def _aged(data: dict[str, Any], section: type[Section], younger: Sequence[str]) -> dict[str, Any]:
    usual = {name: section.model_fields[name].default for name in younger}
    usual |= {name: value.model_dump(mode="json") for name, value in usual.items() if isinstance(value, Section)}
    return {name: value for name, value in data.items() if name not in usual or value != usual[name]}


def idle_settings(config: Config) -> dict[str, str]:
    """The settings that another one turns off, by full name, and which one does."""
    prompt, tuned = config.questions.prompt, config.finetune
    sections = {
        "questions": _idle_questions(config),
        "questions.prompt": _idle_prompt(prompt),
        "extraction": _idle_extraction(config),
        "extraction.success": _idle_success(config.extraction.success) if is_free(config) else {},
        "neighbors": _idle_neighbors(config.neighbors),
        "finetune": _idle_finetune(tuned, cloze=is_cloze(config)),
        "finetune.regularizer": _idle_regularizer(tuned.regularizer, tuned.epochs),
        "finetune.task_schedule": _idle_schedule(tuned.task_schedule, "finetune.task_schedule"),
        "finetune.logits": _idle_logits(tuned.logits),
        "finetune.guard": _idle_guard(tuned),
        "finetune.distill": _idle_distill(tuned),
    }
    return {f"{section}.{name}": why for section, found in sections.items() for name, why in found.items()}


def _idle_questions(config: Config) -> dict[str, str]:
    divided = config.questions.splits is not None
    return dict.fromkeys(("validation_fraction", "test_fraction"), "questions.splits is set") if divided else {}


def _idle_extraction(config: Config) -> dict[str, str]:
    found = {} if config.extraction.cache else {"activation_dtype": "extraction.cache is false"}
    why = f"questions.prompt.format is {config.questions.prompt.format}"
    return found if is_free(config) else {**found, **{f"success.{name}": why for name in SuccessConfig.model_fields}}


def _idle_success(success: SuccessConfig) -> dict[str, str]:
    idle = [] if success.metric == "likelihood" else ["threshold"]
    idle += [] if success.writes else ["max_new_tokens", "stop", "generation_batch"]
    return dict.fromkeys(idle, f"extraction.success.metric is {success.metric}")


def _idle_prompt(prompt: PromptConfig) -> dict[str, str]:
    idle = {"letter": ("cloze_score",), "cloze": ("instruction",), "free": ("instruction", "cloze_score")}
    return dict.fromkeys(idle[prompt.format], f"questions.prompt.format is {prompt.format}")


def _idle_neighbors(chosen: NeighborsConfig) -> dict[str, str]:
    if chosen.method == "self":
        idle = ["k", "epsilon", "similarity", "sigma", "exact_up_to"]
    else:
        idle = ["k"] if chosen.method == "epsilon" else ["epsilon"]
        idle += ["exact_up_to"] if chosen.method not in ("knn", "shuffled") else []
    found = dict.fromkeys(idle, f"neighbors.method is {chosen.method}")
    if chosen.similarity != "gaussian":
        found.setdefault("sigma", f"neighbors.similarity is {chosen.similarity}")
    return found


def _idle_finetune(config: FinetuneConfig, *, cloze: bool) -> dict[str, str]:
    found = _idle_schedule(config, "finetune")
    if config.weight_decay == 0:
        found["decay_to"] = "finetune.weight_decay is 0"
    if config.chain is None:
        found["chain_activations"] = "finetune.chain is not set"
    if cloze and config.task_loss != "distill":
        found["task_loss"] = "questions.prompt.format is not letter"
    # The last epoch is the best one.
    return found if config.epochs > 1 else {**found, "select": "finetune.epochs is 1"}


def _idle_schedule(schedule: ScheduleConfig, name: str) -> dict[str, str]:
    found = {} if schedule.warmup_steps is None else {"warmup_fraction": f"{name}.warmup_steps is given"}
    return found if schedule.anneal != "none" else {**found, "anneal_floor": f"{name}.anneal is none"}


def _idle_distill(config: FinetuneConfig) -> dict[str, str]:
    if config.task_loss != "distill":
        return dict.fromkeys(DistillConfig.model_fields, f"finetune.task_loss is {config.task_loss}")
    return {} if config.distill.teacher else {"revision": "finetune.distill.teacher is not set"}


def _idle_logits(logits: LogitsConfig) -> dict[str, str]:
    return {"anneal": "finetune.logits.temperature is 1"} if logits.temperature == 1 else {}


def _idle_guard(config: FinetuneConfig) -> dict[str, str]:
    guard, term = config.guard, config.regularizer
    if guard.action == "none":
        return dict.fromkeys(set(GuardConfig.model_fields) - {"action"}, "finetune.guard.action is none")
    # The first epoch is what gradients are compared with, and the second the first to train with half the lambda.
    found = {"most_gradient": "finetune.epochs is 1"} if config.epochs == 1 else {}
    if guard.action == "halve" and (config.epochs == 1 or term.kind == "none" or term.weight == 0):
        one = "finetune.epochs is 1" if config.epochs == 1 else "there is no lambda"
        found["action"] = f"{one}, so nothing is halved"
    return found


def _idle_regularizer(term: RegularizerConfig, epochs: int) -> dict[str, str]:
    if term.kind == "none":
        others = set(RegularizerConfig.model_fields) - {"kind"}
        return dict.fromkeys(others, "finetune.regularizer.kind is none")
    found = _idle_schedule(term, "finetune.regularizer")
    if term.weight != "auto":
        found["gradient_ratio"] = "finetune.regularizer.weight is a number"
    if term.kind != "prior":
        found["prior"] = f"finetune.regularizer.kind is {term.kind}"
    if term.kind != "entropy":
        found |= dict.fromkeys(("entropy_sign", "entropy_target"), f"finetune.regularizer.kind is {term.kind}")
    if term.weight == 0:
        found |= dict.fromkeys(("warmup_fraction", *_YOUNGER_SCHEDULE), "finetune.regularizer.weight is 0")
    # The neighbors' routing is recomputed at the start of each epoch but the first, and only eq. 7 reads it.
    if term.kind != "manifold":
        found |= dict.fromkeys(("distance", "positions", "refresh"), f"finetune.regularizer.kind is {term.kind}")
    elif epochs == 1:
        found["refresh"] = "finetune.epochs is 1"
    return found
