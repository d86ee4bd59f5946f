"""What acts: the settings that decide a stage's output, and no others, as plain data for fingerprints.

A setting without effect beside the others is left out, so that changing it redoes no work. What only the data can tell
(a `limit` above a file's length, `context` where no question has one, `exact_up_to` above the number of successes) stays in:
doing again what would come out the same costs time, the other mistake costs the truth.
"""

from __future__ import annotations

from typing import Any

from roma_ray.config import Config, FinetuneConfig, NeighborsConfig, PromptConfig, RegularizerConfig


def is_cloze(config: Config) -> bool:
    """Whether answers are scored as continuations."""
    return config.questions.prompt.format == "cloze"


def answer_rule(prompt: PromptConfig) -> str:
    """By which score a choice is answered with: `normalized` or `raw`; letters have no length."""
    return prompt.cloze_score if prompt.format == "cloze" else "raw"


def data_seed(config: Config) -> int:
    """The seed of everything that is drawn from the data: splits, samples, the training fraction."""
    return config.seed if config.questions.seed is None else config.questions.seed


def prompt_settings(prompt: PromptConfig) -> dict[str, Any]:
    """What decides a prompt's tokens. By which score its choices are judged is no part of it."""
    settings = prompt.model_dump(mode="json", exclude={"cloze_score"})
    if prompt.format == "cloze":
        del settings["instruction"]
    return settings


def neighbors_settings(config: Config) -> dict[str, Any]:
    """What decides S, N and W beside the extraction and the embeddings.

    Random neighbors, the ablation's control, are drawn with the run's own seed: they vary with the training. They are
    weighed by their similarity like all others.
    """
    chosen: NeighborsConfig = config.neighbors
    settings: dict[str, Any] = {"method": chosen.method, "similarity": chosen.similarity}
    if chosen.similarity == "gaussian":
        settings["sigma"] = chosen.sigma
    if chosen.method == "epsilon":
        settings["epsilon"] = chosen.epsilon
    else:
        settings["k"] = chosen.k
    if chosen.method == "knn":
        settings["exact_up_to"] = chosen.exact_up_to
    if chosen.method == "random":
        settings["seed"] = config.seed
    settings["fraction"] = config.questions.fraction
    if config.questions.fraction < 1:
        settings["fraction_seed"] = data_seed(config)
    return settings


def finetune_settings(config: FinetuneConfig, *, cloze: bool) -> dict[str, Any]:
    """What decides the tuned routers and their curves; how often a checkpoint is written does not."""
    settings = config.model_dump(mode="json", exclude={"checkpoint_steps", "regularizer"})
    if cloze:
        del settings["task_loss"]
    if config.epochs == 1:
        # The last epoch is the best one.
        del settings["select"]
    return {**settings, "regularizer": regularizer_settings(config.regularizer, config.epochs)}


def regularizer_settings(config: RegularizerConfig, epochs: int) -> dict[str, Any]:
    """What decides the second term of eq. 9."""
    if config.kind == "none":
        return {"kind": "none"}
    settings: dict[str, Any] = {"kind": config.kind, "weight": config.weight}
    if config.weight == "auto":
        settings["gradient_ratio"] = config.gradient_ratio
    if config.weight != 0:
        settings["warmup_fraction"] = config.warmup_fraction
    # The neighbors' routing is recomputed at the start of each epoch but the first, and only eq. 7 reads it.
    if config.kind == "manifold" and epochs > 1:
        settings["refresh"] = config.refresh
    return settings
